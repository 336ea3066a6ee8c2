from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from quant_samples import CONFIG, CPU, checkpoint, network, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quasr.errors import CheckpointError, OptionError, ResourceError
from quasr.model.config import read_config
from quasr.quant import apply
from quasr.quant.apply import load_quantising, quantise, quantise_layer
from quasr.quant.embedding import Int8Embedding
from quasr.quant.linear import Int4Linear, Int8Linear
from quasr.quant.recipe import Recipe, recipe_for
from quasr.quant.scheme import INT8
from quasr.weights import load

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)

RECIPES = [
    recipe_for("int8"),
    recipe_for("int8-g32"),
    recipe_for("int4"),
    recipe_for("int4-g64", rules=["decoder.layers.0.*=int8", "*.o_proj=none"]),
    recipe_for("llm-int8", 5.0),
    recipe_for("nf4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "sixteen")


def logits(model: Qwen3ASR) -> Tensor:
    """Of a prompt with some audio in it."""
    mel = torch.randn(16, 230, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        rows, _ = model.embed_prompts(model.encode([mel]), [torch.arange(20, 25)], [torch.arange(9)])
        return model.decoder.logits(model.decoder.prefill(rows, None))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_while_loading_is_loaded_then_quantised(folder: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    config = read_config(folder)
    straight = load_quantising(folder, config, recipe, dtype, CPU)
    truth = load.load_model(folder, config, dtype, CPU)
    quantise(truth, recipe)
    assert straight.state_dict().keys() == truth.state_dict().keys()
    assert all(torch.equal(value, truth.state_dict()[name]) for name, value in straight.state_dict().items())
    assert sum(value.nbytes for value in straight.state_dict().values()) == recipe.weight_bytes(config, dtype.itemsize)
    assert not any(weight.requires_grad for weight in straight.parameters())
    assert not any(module.training for module in straight.modules())


@pytest.mark.parametrize(
    ("recipe", "most"), [(recipe_for("int8"), 0.03), (recipe_for("llm-int8"), 0.04), (recipe_for("int4"), 0.25)]
)
def test_the_whole_network_stays_near(folder: Path, recipe: Recipe, most: float) -> None:
    config = read_config(folder)
    truth = logits(load.load_model(folder, config, torch.float32, CPU))
    found = logits(load_quantising(folder, config, recipe, torch.float32, CPU))
    assert relative_error(found, truth) < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_whole_network_runs_in_16_bits(folder: Path, dtype: torch.dtype) -> None:
    """The same codes and scales in fp32 differ by no more than the unquantised network does."""
    config = read_config(folder)

    def rounding(model: Qwen3ASR) -> float:
        found = logits(model)
        assert found.dtype == dtype
        return relative_error(found, logits(model.float()))

    plain = rounding(load.load_model(folder, config, dtype, CPU))
    assert rounding(load_quantising(folder, config, recipe_for("int4"), dtype, CPU)) < 2 * plain


def test_who_becomes_what(folder: Path) -> None:
    model = load_quantising(
        folder, read_config(folder), recipe_for("int4", rules=["*.o_proj=none"]), torch.float32, CPU
    )
    assert isinstance(model.decoder.embed_tokens, Int8Embedding)
    assert isinstance(model.get_submodule("encoder.layers.1.fc2"), Int8Linear)
    assert isinstance(model.get_submodule("decoder.layers.1.mlp.gate_proj"), Int4Linear)
    for name in ("decoder.layers.1.self_attn.o_proj", "encoder.stem.conv_out", "encoder.linear_1", "encoder.linear_2"):
        assert type(model.get_submodule(name)) is nn.Linear


def test_one_weight_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 16-bit weights that will be quantised, no two are alive at once."""
    recipe, config = recipe_for("int8"), read_config(folder)
    schemes, alive, most = recipe.assign(config), dict[str, int](), 0
    read = load._read

    def watched(shard: object, name: str, *rest: object) -> Tensor:
        nonlocal most
        tensor: Tensor = read(shard, name, *rest)  # type: ignore[arg-type]
        path = name.replace("model.audio_tower", "encoder").replace("model.language_model", "decoder")
        if path.removesuffix(".weight") in schemes:
            alive[name] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, name)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(load, "_read", watched)
    gc.disable()
    try:
        load_quantising(folder, config, recipe, torch.bfloat16, CPU)
    finally:
        gc.enable()
    assert most == 1
    assert not alive


def test_a_recipe_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(OptionError, match="below 8 bits"):
        load_quantising(folder, read_config(folder), recipe_for("int8", rules=["*=int4"]), torch.float32, CPU)
    with pytest.raises(OptionError, match="Conv2d cannot be quantised"):
        quantise_layer(network().get_submodule("encoder.stem.conv2d1"), INT8)


def test_out_of_memory_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(apply, "quantise_layer", exhausted)
    with pytest.raises(ResourceError, match=r"^out of memory on cpu while quantising: [^\n]+$"):
        load_quantising(folder, CONFIG, recipe_for("int8"), torch.float32, CPU)


def test_plain_loading_refuses_integers_where_floats_belong(tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "m")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.language_model.norm.weight"] = torch.ones(128, dtype=torch.int8)
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(CheckpointError, match="is I8 where a float type is expected"):
        load_quantising(bad, CONFIG, recipe_for("int8"), torch.float32, CPU)
