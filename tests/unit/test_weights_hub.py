"""Names to folders, against a hub on this machine; each network test runs with both protocols."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
from weights_local_hub import MODEL, Hub, LocalHub, sha256

import quasr
from quasr.errors import CheckpointError, HubError, ModelNotFoundError, OptionError, QuasrError, ResourceError
from quasr.weights import hub as hub_module
from quasr.weights import huggingface, modelscope, record
from quasr.weights.hub import HubOptions, resolve, resolve_config, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": b'{"model_type": "qwen3_asr"}',
    "model.safetensors": WEIGHTS,
    "merges.txt": b"a b\n",
    "README.md": b"not needed",
    "pytorch_model.bin": b"not needed",
}
NEEDED = {"config.json", "model.safetensors", "merges.txt"}
REUPLOADED = WEIGHTS[::-1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(modelscope, "PAUSE", 0.001)
    with LocalHub(Hub(dict(FILES))) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.url + "/")
        yield served


@pytest.fixture(params=["huggingface", "modelscope"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> HubOptions:
    return HubOptions(hub=request.param, cache_dir=tmp_path / "cache")


def offline(options: HubOptions) -> HubOptions:
    return HubOptions(hub=options.hub, offline=True, cache_dir=options.cache_dir)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != record.RECORD_FILE}


def refused(
    kind: type[QuasrError],
    options: HubOptions,
    *words: str,
    model: str = MODEL,
    resolver: Callable[[str, HubOptions], Path] = resolve,
) -> None:
    with pytest.raises(kind) as caught:
        resolver(model, options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_local_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_client", None)
    assert resolve(str(tmp_path), HubOptions()) == tmp_path


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "DEMO_FOLDER", tmp_path)
    refused(ModelNotFoundError, HubOptions(), "install", model="demo")
    (tmp_path / "config.json").write_text("{}")
    assert resolve("demo", HubOptions()) == tmp_path


def test_demo_lies_in_the_package() -> None:
    assert Path(quasr.__file__).parent / "demo" / "model" == hub_module.DEMO_FOLDER


@pytest.mark.parametrize("model", ["nothing", "/no/such/folder", "./x", "../a/b", "a/b/c", "../x", "a/..", "", "a b/c"])
def test_neither_folder_nor_id(model: str) -> None:
    refused(ModelNotFoundError, HubOptions(), "give a folder", model=model)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    refused(ModelNotFoundError, HubOptions(), "file", model=str(tmp_path / "x"))


def test_unknown_hub() -> None:
    refused(OptionError, HubOptions(hub="github"), "modelscope")


def test_hub_imports_no_torch() -> None:
    code = "import sys, quasr.weights.hub; assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fetches_only_what_is_needed_and_records_it(hub: Hub, options: HubOptions) -> None:
    folder = resolve(MODEL, options)
    assert contents(folder) == {name: FILES[name] for name in NEEDED}
    saved = json.loads((folder / "quasr_source.json").read_text())
    assert (saved["hub"], saved["id"], saved["commit"]) == (options.hub, MODEL, "a" * 40)
    assert saved["files"]["model.safetensors"] == {"size": 102_400, "sha256": sha256(WEIGHTS)}
    assert saved["files"].keys() == NEEDED
    assert verify(folder) == []
    assert sorted(hub.downloads()) == sorted(NEEDED)


def test_graphs_of_an_export_come_along(hub: Hub, options: HubOptions) -> None:
    ours = {"quasr_onnx.json": b"{}", "decoder.onnx": b"graph", "decoder.onnx.data": WEIGHTS}
    hub.files |= ours | {"onnx/decoder.onnx": b"another's", "decoder_model.onnx": b"another's"}
    folder = resolve(MODEL, options)
    assert contents(folder).keys() == NEEDED | ours.keys()
    assert {name: (folder / name).read_bytes() for name in ours} == ours
    hub.requests.clear()
    assert resolve(MODEL, options) == folder
    assert hub.downloads() == []


def test_second_time_downloads_nothing(hub: Hub, options: HubOptions, caplog: pytest.LogCaptureFixture) -> None:
    folder = resolve(MODEL, options)
    hub.requests.clear()
    assert resolve(MODEL, options) == folder
    assert hub.requests == []
    assert "re-uploaded" not in caplog.text


def test_the_config_alone_comes_without_weights(hub: Hub, options: HubOptions) -> None:
    hub.files["quasr_quantization.json"] = b"{}"
    hub.files["generation_config.json"] = b"{ }"
    names = {"config.json", "quasr_quantization.json", "generation_config.json"}
    refused(ModelNotFoundError, offline(options), "without --offline", resolver=resolve_config)
    folder = resolve_config(MODEL, options)
    assert contents(folder) == {name: hub.files[name] for name in names}
    assert set(hub.downloads()) == names
    hub.requests.clear()
    assert resolve_config(MODEL, options) == resolve_config(MODEL, offline(options)) == folder
    assert hub.downloads() == []
    # It does not pass for the checkpoint, and is no obstacle to it.
    refused(ModelNotFoundError, offline(options), "without --offline")
    whole = resolve(MODEL, options)
    assert contents(whole).keys() == NEEDED | names
    assert verify(whole) == []


def test_the_config_of_a_cached_checkpoint(hub: Hub, options: HubOptions) -> None:
    whole = resolve(MODEL, options)
    assert resolve_config(MODEL, offline(options)) == whole
    hub.files["config.json"] = b'{"model_type": "changed"}'
    hub.commit = "b" * 40
    assert (resolve_config(MODEL, options) / "config.json").read_bytes() == hub.files["config.json"]


def test_no_config_no_checkpoint(hub: Hub, options: HubOptions) -> None:
    del hub.files["config.json"]
    refused(ModelNotFoundError, options, "no config.json", resolver=resolve_config)
    assert hub.downloads() == []


def test_local_configs_need_no_hub(tmp_path: Path) -> None:
    assert resolve_config(str(tmp_path), HubOptions()) == tmp_path
    assert resolve_config("demo", HubOptions()) == resolve("demo", HubOptions())


def test_resumes_after_a_cut(hub: Hub, options: HubOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    # The library keeps whole pieces of this size when a connection is cut; its 10 MB is more than this file.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut["model.safetensors"] = 60_000
    assert contents(resolve(MODEL, options))["model.safetensors"] == WEIGHTS
    assert any(span.startswith("bytes=60000-") for span in hub.ranges())


def test_server_without_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = 60_000
    hub.ignore_range = True
    folder = resolve(MODEL, HubOptions(hub="modelscope", cache_dir=tmp_path))
    assert contents(folder)["model.safetensors"] == WEIGHTS


def test_next_run_resumes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = HubOptions(hub="modelscope", cache_dir=tmp_path)
    monkeypatch.setattr(modelscope, "ATTEMPTS", 0)
    refused(HubError, options, "resume")
    monkeypatch.setattr(modelscope, "ATTEMPTS", 1)
    hub.sent["model.safetensors"] = WEIGHTS[:70_000]
    refused(HubError, options, "model.safetensors", "resume")
    hub.sent.clear()
    assert contents(resolve(MODEL, options))["model.safetensors"] == WEIGHTS
    assert hub.ranges()[-1] == "bytes=70000-"


@pytest.mark.parametrize("same_size", [True, False])
def test_reupload_is_noticed(hub: Hub, options: HubOptions, same_size: bool, caplog: pytest.LogCaptureFixture) -> None:
    resolve(MODEL, options)
    hub.files["model.safetensors"] = REUPLOADED if same_size else REUPLOADED[5:]
    hub.files["vocab.json"] = b"{}"
    del hub.files["merges.txt"]
    hub.commit = "b" * 40
    hub.requests.clear()
    with caplog.at_level(logging.WARNING):
        folder = resolve(MODEL, options)
    assert contents(folder).keys() == {"config.json", "model.safetensors", "vocab.json"}
    assert contents(folder)["model.safetensors"] == hub.files["model.safetensors"]
    assert "re-uploaded" in caplog.text
    assert "merges.txt, model.safetensors, vocab.json" in caplog.text
    assert verify(folder) == []
    assert resolve(MODEL, offline(options)) == folder


def test_changed_hash_at_the_same_commit(hub: Hub, options: HubOptions) -> None:
    resolve(MODEL, options)
    hub.files["model.safetensors"] = REUPLOADED
    if options.hub == "huggingface":
        # The library keeps its own listing of a commit, which it takes for unchangeable.
        for path in (options.cache_dir or Path()).rglob("trees/*.json"):
            path.unlink()
    assert contents(resolve(MODEL, options))["model.safetensors"] == REUPLOADED


def test_offline(hub: Hub, options: HubOptions) -> None:
    refused(ModelNotFoundError, offline(options), "--offline")
    folder = resolve(MODEL, options)
    hub.requests.clear()
    hub.status = 500
    assert resolve(MODEL, offline(options)) == folder
    assert hub.requests == []


def test_offline_with_a_damaged_cache(hub: Hub, options: HubOptions) -> None:
    folder = resolve(MODEL, options)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    refused(CheckpointError, offline(options), "model.safetensors", "--offline")
    hub.requests.clear()
    assert contents(resolve(MODEL, options))["model.safetensors"] == WEIGHTS
    assert hub.downloads() == ["model.safetensors"]


def test_verify_finds_changed_content(hub: Hub, options: HubOptions) -> None:
    folder = resolve(MODEL, options)
    (folder / "model.safetensors").resolve().write_bytes(REUPLOADED)
    (folder / "merges.txt").unlink()
    first, second = sorted(verify(folder))
    assert first.startswith("merges.txt")
    assert second.startswith("model.safetensors")


def test_verify_without_record(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_content(hub: Hub, options: HubOptions, name: str) -> None:
    hub.sent[name] = FILES[name][::-1]
    refused(HubError, options, name, "wrong hash")
    hub.sent.clear()
    assert contents(resolve(MODEL, options))[name] == FILES[name]


def test_record_that_is_no_record(hub: Hub, options: HubOptions, caplog: pytest.LogCaptureFixture) -> None:
    folder = resolve(MODEL, options)
    for text in ("{", "[]", '{"files": 3}', '{"files": {"a": {}}}'):
        (folder / record.RECORD_FILE).write_text(text)
        assert resolve(MODEL, options) == folder
        assert verify(folder) == []
    assert "cannot be used" in caplog.text


def test_no_such_model(hub: Hub, options: HubOptions) -> None:
    refused(ModelNotFoundError, options, "lab/none", model="lab/none")


def test_no_such_revision(hub: Hub, options: HubOptions) -> None:
    wrong = HubOptions(hub=options.hub, revision="v9", cache_dir=options.cache_dir)
    refused(ModelNotFoundError, wrong, "revision")


def test_invalid_id(hub: Hub, tmp_path: Path) -> None:
    refused(ModelNotFoundError, HubOptions(cache_dir=tmp_path), "org/name", model="a--b/c..d")


@pytest.mark.parametrize(("status", "code"), [(401, ""), (403, ""), (403, "GatedRepo")])
def test_refusal(hub: Hub, options: HubOptions, status: int, code: str) -> None:
    hub.status, hub.error_code = status, code
    refused(HubError, options, MODEL, "gated" if code and options.hub == "huggingface" else f"HTTP {status}")


def test_broken_hub(hub: Hub, options: HubOptions) -> None:
    hub.status = 500
    refused(HubError, options, "500")
    hub.status, hub.garbage = 200, True
    refused(HubError, options, "makes no sense")


def test_unreachable_hub(options: HubOptions, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(MODEL, options)
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    refused(HubError, options, "--offline")
    other = HubOptions(hub=options.hub, cache_dir=(options.cache_dir or Path()) / "empty")
    refused(HubError, other, "network")


def test_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "file:///etc")
    refused(OptionError, HubOptions(hub="modelscope", cache_dir=tmp_path), "MODELSCOPE_ENDPOINT")


@pytest.mark.parametrize(("code", "word"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not be written")])
def test_disk(hub: Hub, options: HubOptions, code: int, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(huggingface, "_download", fail)
    monkeypatch.setattr(modelscope, "_download", fail)
    refused(ResourceError, options, word)


def test_listing_cannot_leave_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"../evil.json": b"{}", "/tmp/evil.json": b"{}", "a/../../evil.txt": b""}
    folder = resolve(MODEL, HubOptions(hub="modelscope", cache_dir=tmp_path / "cache"))
    assert contents(folder).keys() == NEEDED
    assert not list(tmp_path.rglob("evil*"))
