from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from quant_samples import CONFIG, CPU, checkpoint, network, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from weights_samples import write_large

from quasr.errors import CheckpointError, OptionError, ResourceError
from quasr.model.config import read_config
from quasr.quant import apply
from quasr.quant.apply import load_quantising, quantise, quantise_layer
from quasr.quant.embedding import Int8Embedding
from quasr.quant.linear import Int4Linear, Int8Linear
from quasr.quant.recipe import Recipe, recipe_for
from quasr.quant.scheme import INT8
from quasr.weights import load, staging

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

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
    ("buffers", "recipe"), [((2, 50 * 256 + 8), RECIPES[3]), ((2, 200), RECIPES[0])], ids=["rows", "parts of rows"]
)
def test_blocks_of_rows_give_the_same_bits(
    folder: Path, buffers: tuple[int, int], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of bf16 has 256 or 512 bytes here."""
    config = read_config(folder)
    truth = load_quantising(folder, config, recipe, torch.bfloat16, CPU).state_dict()
    monkeypatch.setitem(staging.BUFFERS, "cpu", buffers)
    found = load_quantising(folder, config, recipe, torch.bfloat16, CPU).state_dict()
    assert all(torch.equal(value, truth[name]) for name, value in found.items())


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


MEASURE = """
import json, sys, torch
from pathlib import Path
from quasr.model.config import read_config
from quasr.quant.apply import load_quantising
from quasr.quant.recipe import recipe_for
def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
folder = Path(sys.argv[1])
torch.zeros(8, dtype=torch.bfloat16) @ torch.zeros(8, 8, dtype=torch.bfloat16)
# Arguments: a recipe, of which the encoder is left out, because its layers are too narrow for groups.
recipe = recipe_for(sys.argv[2], rules=["encoder.layers.*=int8", "decoder.layers.*.o_proj=int8"])
before = status("VmRSS")
model = load_quantising(folder, read_config(folder), recipe, torch.bfloat16, torch.device("cpu"))
print(json.dumps([status("VmHWM") - before, sum(value.nbytes for value in model.state_dict().values())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("name", "megabytes"), [("int8", 300), ("int4", 200)])
def test_extra_memory_is_a_few_blocks(tmp_path: Path, name: str, megabytes: int) -> None:
    """Of a folder whose embedding alone is 307 MB in 16 bits: less than 50 MB beside the finished layers."""
    command = [sys.executable, "-c", MEASURE, str(write_large(tmp_path)), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    grown, size = json.loads(done.stdout)
    assert size > megabytes * 10**6
    assert size * 0.95 < grown < size + 50 * 10**6


def test_a_recipe_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(OptionError, match="below 8 bits"):
        load_quantising(folder, read_config(folder), recipe_for("int8", rules=["*=int4"]), torch.float32, CPU)
    with pytest.raises(OptionError, match="Conv2d cannot be quantised"):
        quantise_layer(network().get_submodule("encoder.stem.conv2d1"), INT8)


def test_out_of_memory_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(apply, "_read_layer", exhausted)
    with pytest.raises(ResourceError, match=r"^out of memory on cpu while quantising: [^\n]+$"):
        load_quantising(folder, CONFIG, recipe_for("int8"), torch.float32, CPU)


def test_plain_loading_refuses_integers_where_floats_belong(tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "m")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.language_model.norm.weight"] = torch.ones(128, dtype=torch.int8)
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(CheckpointError, match="is I8 where a float type is expected"):
        load_quantising(bad, CONFIG, recipe_for("int8"), torch.float32, CPU)
