from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from weights_samples import (
    EMBEDDING,
    HEAD,
    HF,
    NORM,
    ORIGINAL,
    SIZES,
    original_tensors,
    random_network,
    write,
    write_large,
    write_sharded,
)

from quasr.errors import CheckpointError
from quasr.model.config import read_config
from quasr.weights import load as load_module
from quasr.weights import staging
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)
CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3ASR:
    return load_model(folder, read_config(folder), dtype, CPU)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for word in words:
        assert word in message


def same_weights(model: Qwen3ASR, *, tied: bool = True) -> bool:
    truth = random_network(tied=tied).state_dict()
    mine = model.state_dict()
    return mine.keys() == truth.keys() and all(torch.equal(mine[name], truth[name]) for name in truth)


def test_single_file(tmp_path: Path) -> None:
    model = load(write(tmp_path, original_tensors()))
    assert same_weights(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_shards(tmp_path: Path) -> None:
    names = list(tensors := original_tensors())
    half = {name: tensors[name] for name in names[::2]}
    assert same_weights(load(write_sharded(tmp_path, half, {name: tensors[name] for name in names[1::2]})))


def test_tensors_longer_than_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(staging.BUFFERS, "cpu", (2, 64))
    assert same_weights(load(write(tmp_path, original_tensors())))


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, original_tensors()) / "model.safetensors"
    check = load_module._check_tensors

    def checked_then_cut(*of: Any) -> None:
        check(*of)
        path.write_bytes(path.read_bytes()[:-10])

    monkeypatch.setattr(load_module, "_check_tensors", checked_then_cut)
    refused(tmp_path, "cut off while it was read", "download")


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    model = load(write(tmp_path, original_tensors()))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert same_weights(model)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16])
def test_conversion(tmp_path: Path, stored: torch.dtype, asked: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in original_tensors().items()}
    model = load(write(tmp_path, tensors), asked)
    assert {parameter.dtype for parameter in model.parameters()} == {asked}
    assert torch.equal(model.decoder.embed_tokens.weight, tensors[EMBEDDING].to(asked))


def test_values_beyond_float16(tmp_path: Path) -> None:
    tensors = original_tensors()
    tensors[NORM][3] = 70_000.0
    folder = write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="bfloat16 or float32"):
        load(folder, torch.float16)
    assert float(load(folder).decoder.norm.weight[3]) == 70_000.0


def test_untied_head(tmp_path: Path) -> None:
    config = copy.deepcopy(ORIGINAL)
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = False
    assert same_weights(load(write(tmp_path, original_tensors(tied=False), config)), tied=False)
    refused(write(tmp_path, original_tensors(), config), "missing", HEAD)


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    tensors = original_tensors()
    assert same_weights(load(write(tmp_path, {**tensors, HEAD: tensors[EMBEDDING].clone()})))
    other = tensors[EMBEDDING].clone()
    other[-1, -1] += 1
    refused(write(tmp_path, {**tensors, HEAD: other}), HEAD, "tie_word_embeddings")
    refused(write(tmp_path, {**tensors, HEAD: other[1:].clone()}), HEAD, "differs")


def test_names_of_the_other_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert same_weights(load(write(tmp_path, original_tensors(), HF)))
    assert "'hf'" in caplog.text
    assert "'original'" in caplog.text


def test_missing_unknown_misshapen(tmp_path: Path) -> None:
    tensors = original_tensors()
    short = {name: tensor for name, tensor in tensors.items() if name != NORM}
    refused(write(tmp_path, short), "missing", NORM)
    refused(write(tmp_path, {**tensors, "thinker.extra.weight": torch.zeros(2)}), "unknown", "thinker.extra.weight")
    refused(write(tmp_path, {**tensors, NORM: torch.zeros(21)}), NORM, "[21]", "[20]")
    refused(write(tmp_path, {**tensors, NORM: torch.zeros(20, dtype=torch.int32)}), NORM, "I32")
    few = dict(list(tensors.items())[:5])
    refused(write(tmp_path, few), "more", "missing")


@pytest.mark.parametrize(
    "name", ["thinker.model.layers.0.mlp.up_proj.SCB", "thinker.model.norm.weight.quant_state.nf4"]
)
def test_quantised_tensors(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path, {**original_tensors(), name: torch.zeros(2)}), "quantised", "bf16")


def test_quantised_config(tmp_path: Path) -> None:
    config = {**ORIGINAL, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    refused(write(tmp_path, original_tensors(), config), "bitsandbytes", "bf16")


def test_shards_and_index_disagree(tmp_path: Path) -> None:
    one = original_tensors()
    two = {name: one.pop(name) for name in list(one)[:3]}
    name = next(iter(two))
    files = dict.fromkeys(one, "part-0.safetensors") | dict.fromkeys(two, "part-1.safetensors")
    refused(write_sharded(tmp_path / "a", {**one, name: two[name]}, two), name, "both")
    refused(write_sharded(tmp_path / "b", one, two, index={**files, "ghost": "part-0.safetensors"}), "ghost")
    refused(write_sharded(tmp_path / "c", one, two, index={k: v for k, v in files.items() if k != name}), name)
    refused(write_sharded(tmp_path / "d", one, two, index={**files, name: "part-0.safetensors"}), name)
    refused(write_sharded(tmp_path / "e", one, two, index={**files, name: "../part-1.safetensors"}), "part-1")
    refused(write_sharded(tmp_path / "f", one, two, index={}), "weight_map")
    (write_sharded(tmp_path / "g", one, two) / "part-1.safetensors").unlink()
    refused(tmp_path / "g", "part-1.safetensors", "download")


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "safetensors", "download")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, original_tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors", "download")


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("audio_config", "encoder_layers", 10**9),
        ("text_config", "num_hidden_layers", 3),
        ("text_config", "vocab_size", 10**18),
        ("text_config", "intermediate_size", 10**30),
        ("audio_config", "downsample_hidden_size", 5),
    ],
)
def test_config_that_promises_too_much(tmp_path: Path, part: str, entry: str, value: int) -> None:
    config: dict[str, Any] = copy.deepcopy(ORIGINAL)
    config["thinker_config"][part][entry] = value
    refused(write(tmp_path, original_tensors(), config), "config.json", "download")
    assert SIZES[part][entry] != value


MEASURE = """
import json, sys, torch
from pathlib import Path
import quasr.weights.load as load
from quasr.model.config import read_config
def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
folder = Path(sys.argv[1])
torch.zeros(8, dtype=torch.bfloat16) @ torch.zeros(8, 8, dtype=torch.bfloat16)
before = status("VmRSS")
model = load.load_model(folder, read_config(folder), getattr(torch, sys.argv[2]), torch.device("cpu"))
print(json.dumps([status("VmHWM") - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("dtype", "megabytes"), [("bfloat16", 600), ("float32", 1200)])
def test_peak_memory(tmp_path: Path, dtype: str, megabytes: int) -> None:
    """A bf16 folder of 600 MB and its head again: the peak grows by the weights in the wanted dtype and 5 % at most."""
    write_large(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    grown, size = json.loads(done.stdout)
    assert size > megabytes * 10**6
    assert size * 0.95 < grown < size * 1.05
