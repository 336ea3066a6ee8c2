"""What an ONNX folder holds, what its reader refuses, and that it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from quant_samples import CONFIG, CPU, RAW, checkpoint
from safetensors.torch import load_file

from quasr.errors import CheckpointError, OptionError, ResourceError
from quasr.export import folder as exporting
from quasr.export.folder import ExportOptions, export_folder
from quasr.export.manifest import MANIFEST_FILE, VERSION, is_onnx_folder, read_manifest
from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config
from quasr.quant.apply import load_quantising
from quasr.quant.recipe import recipe_for
from quasr.quant.store import METADATA_FILE, save_quantised
from quasr.weights.save import save_model

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "sixteen")


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    export_folder(source, source.with_name("onnx"), ExportOptions("int8"))
    return source.with_name("onnx")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(exported, tmp_path / "copy")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_folder_alone_has_everything(source: Path, exported: Path) -> None:
    graphs = {f"{name}.onnx{ending}" for name in ("stem", "encoder", "decoder") for ending in ("", ".data")}
    assert {path.name for path in exported.iterdir()} == {*graphs, MANIFEST_FILE, "config.json", "tokenizer.json"}
    for name in ("config.json", "tokenizer.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    assert is_onnx_folder(exported)
    assert not is_onnx_folder(source)


def test_the_manifest_tells_hashes_sizes_and_source(source: Path, exported: Path) -> None:
    manifest = read_manifest(exported)
    for name, file in manifest.files.items():
        content = (exported / name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    weights = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.source["files"]["model.safetensors"]["sha256"] == weights
    assert (manifest.version, manifest.weights, manifest.group, manifest.activations) == (VERSION, "int8", 128, "int8")


def test_the_facts_are_those_of_the_network(exported: Path) -> None:
    facts = read_manifest(exported).graph
    text, audio = CONFIG.text, CONFIG.audio
    assert (facts.layers, facts.kv_heads, facts.head_dim) == (text.layers, text.kv_heads, text.head_dim)
    assert (facts.hidden, facts.vocab, facts.positions) == (text.hidden, text.vocab_size, 32_768)
    assert (facts.mel_bins, facts.chunk_frames, facts.chunk_tokens) == (audio.mel_bins, 100, 13)
    assert facts.window_tokens == 104


def test_the_config_may_limit_the_positions(source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "short")
    raw = json.loads((other / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = 512
    (other / "config.json").write_text(json.dumps(raw))
    assert export_folder(other, tmp_path / "onnx", ExportOptions("fp32")).graph.positions == 512


@pytest.mark.parametrize(
    ("weights", "group", "dtype"), [("int8", None, "int8"), ("int8", 64, "uint8"), ("fp32", None, "float32")]
)
def test_embedding_rows_can_be_looked_up(
    source: Path, weights: str, group: int | None, dtype: str, tmp_path: Path
) -> None:
    export_folder(source, tmp_path / "onnx", ExportOptions(weights, group))
    table = read_manifest(tmp_path / "onnx").embedding
    assert table.dtype == dtype
    data = (tmp_path / "onnx" / table.file).read_bytes()
    rows = np.frombuffer(data, table.dtype, table.shape[0] * table.shape[1], table.offset).reshape(table.shape)
    if weights == "int8":
        count = table.scale_shape[0] * table.scale_shape[1]
        scale = np.frombuffer(data, np.float32, count, table.scale_offset).reshape(table.scale_shape)
        wide = rows.astype(np.float32).reshape(len(rows), -1, table.group) - table.zero_point
        rows = (wide * scale[:, :, None]).reshape(table.shape)
    truth = load_file(source / "model.safetensors")["model.language_model.embed_tokens.weight"].float().numpy()
    limit = np.abs(truth).max() / 127 if weights == "int8" else 0
    assert np.abs(rows - truth).max() <= limit


def test_weights_default_to_what_the_source_has(source: Path, tmp_path: Path) -> None:
    assert export_folder(source, tmp_path / "sixteen", ExportOptions()).weights == "int8"
    recipe = recipe_for("int4-g64")
    save_quantised(load_quantising(source, CONFIG, recipe, torch.bfloat16, CPU), recipe, source, tmp_path / "q", {})
    manifest = export_folder(tmp_path / "q", tmp_path / "four", ExportOptions())
    assert (manifest.weights, manifest.group) == ("int4", 64)
    with pytest.raises(OptionError, match="already quantised as int4-g64: leave --weights out"):
        export_folder(tmp_path / "q", tmp_path / "eight", ExportOptions("int8"))
    with pytest.raises(OptionError, match="quantised in groups of 64: leave --group out"):
        export_folder(tmp_path / "q", tmp_path / "wide", ExportOptions(group=128))
    with pytest.raises(OptionError, match="already quantised as int4-g64: leave --head out"):
        export_folder(tmp_path / "q", tmp_path / "eight", ExportOptions("int4", head="int4"))
    assert not (tmp_path / "eight").exists()


def test_a_scheme_that_onnx_cannot_hold(source: Path, tmp_path: Path) -> None:
    recipe = recipe_for("int8")
    save_quantised(load_quantising(source, CONFIG, recipe, torch.bfloat16, CPU), recipe, source, tmp_path / "q", {})
    metadata = json.loads((tmp_path / "q" / METADATA_FILE).read_text())
    metadata["recipe"] = recipe_for("llm-int8").to_json()
    (tmp_path / "q" / METADATA_FILE).write_text(json.dumps(metadata))
    with pytest.raises(OptionError, match="quantised as llm-int8, which ONNX cannot hold"):
        export_folder(tmp_path / "q", tmp_path / "onnx", ExportOptions())


def test_layers_that_run_as_one_must_be_quantised_alike(source: Path, tmp_path: Path) -> None:
    recipe = recipe_for("int4", rules=["decoder.layers.1.self_attn.k_proj=int8"])
    save_quantised(load_quantising(source, CONFIG, recipe, torch.bfloat16, CPU), recipe, source, tmp_path / "q", {})
    with pytest.raises(OptionError, match=r"layers\.1\.self_attn\.q_proj, .* are quantised differently"):
        export_folder(tmp_path / "q", tmp_path / "onnx", ExportOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("int8", 100), "128 input features, which groups of 100 do not divide: take --group 128"),
        (ExportOptions("int4", 0), "4 bits need a scale for every group: take --group 128, or leave it out"),
        (ExportOptions("fp32", 64), "fp32 weights have no scales: leave --group out"),
        (ExportOptions("int5"), "unknown weights 'int5': there is fp32, int8, int4"),
        (ExportOptions("int4", head="fp32"), "unknown head 'fp32': there is int8, int4"),
        (ExportOptions("int8", head="int4"), "--head is a choice beside --weights int4"),
    ],
    ids=["group", "row", "float", "weights", "head", "head of int8"],
)
def test_options_that_do_not_fit_leave_nothing_behind(
    source: Path, options: ExportOptions, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        export_folder(source, tmp_path / "onnx", options)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_no_group_divides(tmp_path: Path) -> None:
    raw = {**RAW, "text_config": {**RAW["text_config"], "intermediate_size": 72}}
    save_model(Qwen3ASR(parse_config(raw)), tmp_path / "source", raw, "hf")
    with pytest.raises(OptionError, match="72 input features, no multiple of 16: export it with --weights fp32"):
        export_folder(tmp_path / "source", tmp_path / "onnx", ExportOptions("int8"))


def test_an_existing_folder_is_kept(source: Path, exported: Path) -> None:
    before = (exported / MANIFEST_FILE).read_bytes()
    with pytest.raises(OptionError, match="already exists"):
        export_folder(source, exported, ExportOptions())
    assert (exported / MANIFEST_FILE).read_bytes() == before


def test_an_onnx_folder_is_no_source(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is an ONNX folder already"):
        export_folder(exported, tmp_path / "onnx", ExportOptions())


def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write"):
        export_folder(source, tmp_path / "file" / "onnx", ExportOptions())


def test_a_failure_on_the_way_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "build_decoder", fail)
    with pytest.raises(ResourceError, match="the disk is full"):
        export_folder(source, tmp_path / "onnx", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_newer_folder_is_refused(folder: Path) -> None:
    edit(folder, version=VERSION + 1)
    with pytest.raises(CheckpointError, match=r"written by a newer quasr .* upgrade quasr"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None},
        {"graph": {}},
        {"embedding": []},
        {"files": {"../x": {"size": 1, "sha256": ""}}},
        {"group": "x"},
        {"group": float("inf")},
        {"decoder": []},
        {"decoder": {"norm.weight": {"offset": float("inf"), "shape": [8], "dtype": "float32"}}},
        {"decoder": {"norm.weight": {"offset": -64, "shape": [8], "dtype": "float32"}}},
        {"decoder": {"norm.weight": {"offset": 0, "shape": [-2, -4], "dtype": "float32"}}},
        {"decoder": {"norm.weight": {"offset": 0, "shape": [2, 0], "dtype": "float32"}}},
    ],
    ids=[
        "version",
        "graph",
        "embedding",
        "path",
        "group",
        "endless-group",
        "tensors",
        "endless-offset",
        "offset-before",
        "negative-shape",
        "empty-shape",
    ],
)
def test_a_damaged_manifest_is_one_line(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match="export the model again") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["x", 0, -1, 0.5, None])
def test_sizes_of_the_graphs_are_whole_numbers(folder: Path, size: object) -> None:
    graph = json.loads((folder / MANIFEST_FILE).read_text())["graph"]
    edit(folder, graph=graph | {"positions": size})
    with pytest.raises(CheckpointError, match=r"is damaged \(the graph's positions is .*\): export the model again$"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "vocab.bin"},
        {"dtype": "float64"},
        {"dtype": "float32"},
        {"offset": 10**9},
        {"offset": -1},
        {"offset": 0.5},
        {"group": 0},
        {"group": 7},
        {"shape": [CONFIG.text.vocab_size + 1, CONFIG.text.hidden]},
        {"shape": [CONFIG.text.vocab_size, 2 * CONFIG.text.hidden]},
        {"scale_offset": 10**9},
        {"scale_offset": None},
        {"scale_shape": [CONFIG.text.vocab_size, 2]},
        {"zero_point": "x"},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_a_token_table_that_does_not_fit_its_file_is_one_line(folder: Path, changes: dict[str, Any]) -> None:
    table = json.loads((folder / MANIFEST_FILE).read_text())["embedding"]
    edit(folder, embedding=table | changes)
    with pytest.raises(CheckpointError, match=r"is damaged \(.*embedding.*\): export the model again") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [("int8", None), ("int8", 64), ("int4", 64, "int8", "int4")], ids=["row", "groups", "nibbles"]
)
def test_a_token_table_may_end_with_its_file_and_not_a_byte_later(
    source: Path, options: tuple[Any, ...], tmp_path: Path
) -> None:
    """By hand: one byte or half a byte a number, four a scale, and the file's size in place of the manifest's."""
    export_folder(source, tmp_path / "onnx", ExportOptions(*options))
    table = read_manifest(tmp_path / "onnx").embedding
    file = tmp_path / "onnx" / table.file
    (rows, columns), (scale_rows, scales) = table.shape, table.scale_shape
    numbers = rows * columns // (2 if "int4" in options else 1)
    last = file.stat().st_size - max(numbers, 4 * scale_rows * scales)
    name = "offset" if numbers > 4 * scale_rows * scales else "scale_offset"
    edit(tmp_path / "onnx", embedding=asdict(replace(table, **{name: last})))
    assert getattr(read_manifest(tmp_path / "onnx").embedding, name) == last
    edit(tmp_path / "onnx", embedding=asdict(replace(table, **{name: last + 1})))
    with pytest.raises(CheckpointError, match="beyond the end of"):
        read_manifest(tmp_path / "onnx")


def test_a_cut_file_is_found(folder: Path) -> None:
    path = folder / "encoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"encoder\.onnx\.data is missing or has not"):
        read_manifest(folder)


def test_reading_a_manifest_imports_neither_torch_nor_onnx(exported: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quasr.export.manifest import read_manifest; "
        f"read_manifest(Path({str(exported)!r})); print('torch' in sys.modules, 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]
