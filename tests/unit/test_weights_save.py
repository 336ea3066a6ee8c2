from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from weights_samples import HF, ORIGINAL, original_tensors, random_network

from quasr.errors import ResourceError
from quasr.model.config import read_config
from quasr.weights import save
from quasr.weights.load import load_model
from quasr.weights.save import save_model

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_original_names_and_values(tmp_path: Path) -> None:
    save_model(random_network(), tmp_path / "m", ORIGINAL, "original", torch.float32)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    truth = original_tensors()
    assert stored.keys() == truth.keys()
    assert all(torch.equal(stored[name], truth[name]) for name in truth)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == ORIGINAL


@pytest.mark.parametrize("tied", [True, False])
def test_shards_load_again(tmp_path: Path, tied: bool) -> None:
    network = random_network(tied=tied)
    config = {**HF, "tie_word_embeddings": tied}
    save_model(network, tmp_path / "m", config, "hf", torch.float32, max_shard_bytes=8_000)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in network.parameters())
    again = load_model(tmp_path / "m", read_config(tmp_path / "m"), torch.float32, CPU)
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_dtype(tmp_path: Path) -> None:
    save_model(random_network(), tmp_path / "m", ORIGINAL, "original", torch.bfloat16)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in original_tensors().items())


def test_replaces_weights_and_keeps_the_tokenizer(tmp_path: Path) -> None:
    network = random_network()
    save_model(network, tmp_path / "m", ORIGINAL, "original", torch.float32, max_shard_bytes=8_000)
    (tmp_path / "m" / "vocab.json").write_text("{}")
    save_model(network, tmp_path / "m", HF, "hf", torch.float32)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"model.safetensors", "config.json", "vocab.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_failure_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network()
    save_model(network, tmp_path / "m", ORIGINAL, "original", torch.float32)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save_model(network, tmp_path / "m", HF, "hf", torch.float32)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
