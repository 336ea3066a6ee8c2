"""Which engine runs what, and the conversion of checkpoints on first use."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from quant_samples import checkpoint

from quasr.engine.device import Placement
from quasr.errors import MissingDependencyError, OptionError
from quasr.export.folder import ExportOptions, export_folder
from quasr.export.manifest import read_manifest
from quasr.pipeline import onnx
from quasr.pipeline.onnx import EngineWish, Weights, choose_engine, converted, onnx_retry, onnx_weights, verify_graphs
from quasr.weights.hub import DEMO_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

AUTO = EngineWish()
HUB = "org/name"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "sixteen")


@pytest.fixture(scope="module")
def graphs(source: Path) -> Path:
    export_folder(source, source.with_name("onnx"), ExportOptions("int8"))
    return source.with_name("onnx")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/quasr/onnx"


def lacking(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = onnx.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name in packages else real(name))


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        ("auto", Weights()),
        ("fp32", Weights("fp32")),
        ("int8", Weights("int8")),
        ("int8-g64", Weights("int8", 64)),
        ("int4", Weights("int4")),
        ("int4-g32", Weights("int4", 32)),
        *((name, None) for name in ("bf16", "fp16", "llm-int8", "nf4")),
    ],
)
def test_what_compute_types_mean(precision: str, weights: Weights | None) -> None:
    assert onnx_weights(precision) == weights


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_the_demo_runs_on_its_graphs(precision: str) -> None:
    choice = choose_engine("demo", DEMO_FOLDER, EngineWish(precision=precision, device="cpu"))
    assert choice.graphs == onnx.DEMO_GRAPHS
    assert read_manifest(onnx.DEMO_GRAPHS).weights == "int8"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine": "torch"}, "torch, because the torch engine was asked for"),
        ({"device": "cuda:1"}, "torch, because the device cuda:1 was asked for"),
        ({"precision": "bf16"}, "torch, because bf16 is torch's alone"),
        ({"precision": "nf4"}, "torch, because nf4 is torch's alone"),
        ({"torch_only": "a plan says so"}, "torch, because a plan says so"),
        ({"precision": "fp32"}, "torch, because the folder holds no such ONNX graphs"),
        ({"precision": "int4"}, "torch, because the folder holds no such ONNX graphs"),
    ],
)
def test_what_the_demo_runs_in_torch_for(changes: dict[str, str], why: str) -> None:
    choice = choose_engine("demo", DEMO_FOLDER, replace(AUTO, **changes))  # type: ignore[arg-type]
    assert choice.graphs is None
    assert choice.why.startswith(why)


def test_an_onnx_folder_runs_as_it_is(graphs: Path) -> None:
    for precision in ("auto", "int8", "int8-g128"):
        assert choose_engine(str(graphs), graphs, EngineWish(precision=precision)).graphs == graphs
    with pytest.raises(OptionError, match="holds int8 in groups of 128: leave the compute type at auto"):
        choose_engine(str(graphs), graphs, EngineWish(precision="int4"))
    with pytest.raises(OptionError, match="is an ONNX folder, but the torch engine was asked for"):
        choose_engine(str(graphs), graphs, EngineWish("torch"))
    with pytest.raises(OptionError, match=r"is an ONNX folder, but bf16 is torch's alone"):
        choose_engine(str(graphs), graphs, EngineWish(precision="bf16"))


def test_wishes_that_contradict_each_other(source: Path) -> None:
    with pytest.raises(OptionError, match="the onnx engine was asked for, but the device cuda was asked for"):
        choose_engine(str(source), source, EngineWish("onnx", device="cuda"))
    with pytest.raises(OptionError, match="unknown engine 'tensorflow': use auto, torch, onnx"):
        choose_engine(str(source), source, EngineWish("tensorflow"))


def test_a_checkpoint_folder_stays_with_torch_unless_onnx_is_asked_for(source: Path, cache: Path) -> None:
    assert choose_engine(str(source), source, AUTO).graphs is None
    made = choose_engine(str(source), source, EngineWish("onnx", precision="fp32")).graphs
    assert made is not None
    assert made.parent == cache
    assert read_manifest(made).weights == "fp32"


def test_a_hub_model_is_converted_once(source: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    wish = EngineWish(device="cpu")
    with caplog.at_level(logging.WARNING):
        made = choose_engine(HUB, source, wish).graphs
    assert made is not None
    assert (made.parent, read_manifest(made).weights) == (cache, "int8")
    assert f"org/name is converted to int8 ONNX graphs, once, into {made}" in caplog.text
    before = made.stat().st_mtime_ns
    assert choose_engine(HUB, source, wish).graphs == made
    assert made.stat().st_mtime_ns == before
    assert choose_engine(HUB, source, replace(wish, precision="int4")).graphs != made
    assert len(list(cache.iterdir())) == 2


def test_another_upload_is_another_conversion(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    first = converted(HUB, copy, Weights())
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert converted(HUB, copy, Weights()) != first


def test_a_damaged_conversion_is_made_again(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = converted(HUB, source, Weights())
    (made / "stem.onnx").write_bytes(b"")
    assert converted(HUB, source, Weights()) == made
    assert "it is converted again" in caplog.text
    assert verify_graphs(made) == []


def test_a_conversion_that_fails_leaves_nothing(source: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(OptionError, match="groups of 48"):
        converted(HUB, copy, Weights("int8", 48))
    assert not cache.exists() or not list(cache.iterdir())


def test_what_is_missing_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        lacking(patch, "onnx")
        assert "needs 'quasr[quant]'" in choose_engine(HUB, source, EngineWish(device="cpu")).why
        lacking(patch, "torch", "onnx")
        for model in (HUB, str(source)):
            with pytest.raises(MissingDependencyError, match=r"no ONNX graphs and torch .* 'quasr\[quant\]'"):
                choose_engine(model, source, AUTO)
    monkeypatch.setitem(sys.modules, "quasr.export.folder", None)
    with pytest.raises(MissingDependencyError, match=r"converting org/name to ONNX needs .* 'quasr\[quant\]'"):
        converted(HUB, source, Weights())


def test_a_gpu_keeps_hub_models_in_torch(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx, "NVIDIA_DRIVERS", (tmp_path,))
    gpu = Placement(torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr("quasr.engine.device.choose", lambda: gpu)
    assert choose_engine(HUB, source, AUTO).why == "torch, because there is a CUDA device"


def test_second_tries_have_the_same_weights(source: Path, graphs: Path, tmp_path: Path) -> None:
    retry = onnx_retry(choose_engine(str(graphs), graphs, AUTO))
    assert (retry.weights, retry.reason) == ("quantised", "the ONNX folder holds no 16-bit weights")
    export_folder(source, tmp_path / "full", ExportOptions("fp32"))
    assert onnx_retry(choose_engine("full", tmp_path / "full", AUTO)).weights == "same"


def test_verify_finds_what_has_the_right_size(graphs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(graphs, tmp_path / "copy")
    assert verify_graphs(copy) == []
    data = bytearray((copy / "encoder.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "encoder.onnx.data").write_bytes(data)
    assert verify_graphs(copy) == ["encoder.onnx.data has another content than when it was exported"]
