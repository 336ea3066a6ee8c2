from __future__ import annotations

import errno
import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quant_samples import CONFIG, CPU, RAW, checkpoint, network
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quasr.errors import CheckpointError, OptionError, ResourceError
from quasr.model.config import read_config
from quasr.quant import store
from quasr.quant.apply import load_quantising
from quasr.quant.bitsandbytes import LLMInt8Linear
from quasr.quant.recipe import NO_RECIPE, Recipe, recipe_for
from quasr.quant.store import check_unquantised, load_network, read_saved, save_quantised
from quasr.weights.layout import checkpoint_name

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)

RECIPES = [
    recipe_for("int8"),
    recipe_for("int4-g32", rules=["decoder.layers.0.*=int8-g64"]),
    recipe_for("llm-int8", 4.5),
    recipe_for("nf4"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "sixteen")


def save(source: Path, output: Path, recipe: Recipe = RECIPES[0], dtype: torch.dtype = torch.bfloat16) -> Qwen3ASR:
    model = load_quantising(source, CONFIG, recipe, dtype, CPU)
    save_quantised(model, recipe, source, output, {"method": "rtn"})
    return model


def load(folder: Path, recipe: Recipe = NO_RECIPE, dtype: torch.dtype = torch.bfloat16) -> tuple[Qwen3ASR, str]:
    return load_network(folder, read_config(folder), recipe, dtype, CPU)


def same(one: Qwen3ASR, two: Qwen3ASR) -> bool:
    """Bit for bit, types included."""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_saved_is_loaded(source: Path, tmp_path: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    model = save(source, tmp_path / "q", recipe, dtype)
    again, name = load(tmp_path / "q", dtype=dtype)
    assert name == recipe.name
    assert same(again, model)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    thresholds = [
        {layer.threshold for layer in m.modules() if isinstance(layer, LLMInt8Linear)} for m in (again, model)
    ]
    assert thresholds[0] == thresholds[1]
    assert not any(value.is_meta for value in again.state_dict().values())


def test_saved_twice_is_the_same_bytes(source: Path, tmp_path: Path) -> None:
    save(source, tmp_path / "one")
    again, _ = load(tmp_path / "one")
    save_quantised(again, RECIPES[0], source, tmp_path / "two", {"method": "rtn"})
    for name in ("model.safetensors", "quasr_quantization.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_wider_floats_change_no_value(source: Path, tmp_path: Path) -> None:
    model = save(source, tmp_path / "q", recipe_for("nf4"))
    wide, _ = load(tmp_path / "q", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(wide.state_dict()[name].double(), value.double())


def test_what_the_folder_holds(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_text("free")
    model = save(source, tmp_path / "q")
    assert {path.name for path in (tmp_path / "q").iterdir()} == {
        "LICENSE", "config.json", "model.safetensors", "quasr_quantization.json", "tokenizer.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "q" / "config.json").read_text()) == RAW
    stored = load_file(tmp_path / "q" / "model.safetensors")
    layer = "thinker.model.layers.1.mlp.down_proj"
    assert torch.equal(stored[f"{layer}.weight"], model.get_submodule("decoder.layers.1.mlp.down_proj").weight)
    assert stored[f"{layer}.scale"].shape == (128, 1)
    assert stored["thinker.audio_tower.proj1.weight"].dtype == torch.bfloat16
    raw = json.loads((tmp_path / "q" / "quasr_quantization.json").read_text())
    assert (raw["version"], raw["dtype"], raw["metadata"]) == (1, "bfloat16", {"method": "rtn"})
    weights = (source / "model.safetensors").read_bytes()
    assert raw["source"]["files"]["model.safetensors"] == {
        "size": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    saved = read_saved(tmp_path / "q")
    assert saved is not None
    assert saved.recipe == RECIPES[0]
    assert (tmp_path / "q" / "model.safetensors").stat().st_mode == (tmp_path / "q" / "config.json").stat().st_mode


def test_files_of_a_changed_vocabulary_take_the_place_of_the_source_s(source: Path, tmp_path: Path) -> None:
    model = load_quantising(source, CONFIG, RECIPES[0], torch.bfloat16, CPU)
    embedding = model.decoder.embed_tokens
    embedding.weight, embedding.scale = embedding.weight[:200].clone(), embedding.scale[:200].clone()
    config = {**RAW, "text_config": {**RAW["text_config"], "vocab_size": 200}}
    files = {"config.json": json.dumps(config), "tokenizer.json": "{}", "kept.txt": "0\n1\n"}
    save_quantised(model, RECIPES[0], source, tmp_path / "q", {"method": "rtn"}, files)
    assert (tmp_path / "q" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "q" / "kept.txt").read_text() == "0\n1\n"
    again, _ = load(tmp_path / "q")
    assert again.decoder.logits(torch.zeros(1, 128, dtype=torch.bfloat16)).shape == (1, 200)


def test_an_empty_folder_may_be_filled_and_a_full_one_not(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(source, tmp_path / "empty")
    with pytest.raises(OptionError, match="already exists"):
        save(source, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="already exists"):
        save(source, tmp_path / "file")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_nothing_is_left_of_a_folder_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    def write_half(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(store, "save_file", write_half)
    with pytest.raises(ResourceError, match=message) as caught:
        save(source, tmp_path / "q")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write the checkpoint"):
        save(source, tmp_path / "file" / "q")


def test_quantised_folders_keep_their_recipe(source: Path, tmp_path: Path) -> None:
    model = save(source, tmp_path / "q")
    assert same(load(tmp_path / "q", recipe_for("int8"))[0], model)
    with pytest.raises(OptionError, match="already quantised as int8: leave the compute type at auto"):
        load(tmp_path / "q", recipe_for("int4"))
    with pytest.raises(OptionError, match="already quantised as int8: give the 16-bit original"):
        check_unquantised(tmp_path / "q")
    check_unquantised(source)


def test_unquantised_folders_do_as_asked(source: Path) -> None:
    plain, name = load(source)
    assert name == "none"
    assert plain.state_dict().keys() == network().state_dict().keys()
    assert load(source, recipe_for("int8"))[1] == "int8"


def rewrite(folder: Path, **entries: Any) -> None:
    path = folder / "quasr_quantization.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 2}, "newer quasr .format 2, this one reads up to 1.: upgrade quasr"),
        ({"version": "one"}, "tells no version"),
        ({"recipe": {"name": "int8", "rules": [["*", "int9"]]}}, "is damaged"),
        ({"recipe": {"name": "int8", "rules": 3}}, "is damaged"),
        ({"recipe": {"name": "int8", "rules": [[["*"], {"a": 1}]]}}, "is damaged"),
        ({"recipe": None}, "is damaged"),
        ({"recipe": {"name": "int4", "rules": [["encoder.layers.*", "int4"]]}}, "does not fit config.json"),
        ({"recipe": {"name": "none", "rules": []}}, "does not fit its config.json: unknown"),
        ({"recipe": recipe_for("int4").to_json()}, "is .128, 128. where .128, 64. is expected"),
        ({"source": 5}, "is damaged"),
    ],
)
def test_damaged_folders(source: Path, tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    save(source, tmp_path / "q")
    rewrite(tmp_path / "q", **entries)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "q")
    assert "\n" not in str(caught.value)


def test_weights_of_another_type(source: Path, tmp_path: Path) -> None:
    save(source, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    name = "thinker.model.layers.0.mlp.up_proj.weight"
    save_file({**stored, name: stored[name].float()}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is F32 where int8 is expected"):
        load(tmp_path / "q")


def saved_by_transformers(source: Path, folder: Path, layout: str = "hf") -> dict[str, torch.nn.Module]:
    """As its `save_pretrained` writes after LLM.int8: every linear but the head, through bitsandbytes' own layer."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_network(source, CONFIG, NO_RECIPE, torch.float16, CPU)[0]
    tensors, layers = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            theirs = bnb.nn.Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=5.0
            )
            theirs.load_state_dict(layer.state_dict())
            layers[name] = theirs.to("cpu")
            tensors |= {f"{name}.{key}": value for key, value in layers[name].state_dict().items()}
    tensors = model.state_dict() | tensors
    folder.mkdir()
    save_file({checkpoint_name(key, layout): value for key, value in tensors.items()}, folder / "model.safetensors")  # type: ignore[arg-type]
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_8bit": True, "llm_int8_threshold": 5.0}
    (folder / "config.json").write_text(json.dumps({**RAW, "quantization_config": entry}))
    return layers


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_folder_saved_by_transformers(source: Path, tmp_path: Path, layout: str) -> None:
    layers = saved_by_transformers(source, tmp_path / "q", layout)
    model, name = load(tmp_path / "q", dtype=torch.float16)
    assert name == "llm-int8:5.0"
    ours = {key: layer for key, layer in model.named_modules() if isinstance(layer, LLMInt8Linear)}
    assert ours.keys() == layers.keys()
    assert "encoder.stem.conv_out" in ours
    for key, layer in ours.items():
        x = torch.randn(5, layer.weight.shape[1]).half() * 3
        with torch.inference_mode():
            assert torch.equal(layer(x), layers[key].eval()(x))
    load(tmp_path / "q", recipe_for("llm-int8", 5.0))
    with pytest.raises(OptionError, match="already quantised as llm-int8"):
        load(tmp_path / "q", recipe_for("llm-int8", 4.0))
    with pytest.raises(OptionError, match="already quantised"):
        check_unquantised(tmp_path / "q")


def test_folders_of_other_kinds_say_what_to_do(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "q")

    def refused(entry: dict[str, Any]) -> str:
        (tmp_path / "q" / "config.json").write_text(json.dumps({**RAW, "quantization_config": entry}))
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "q")
        return str(caught.value)

    assert "give the 16-bit original with compute type nf4" in refused(
        {"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    assert "quantised with gptq" in refused({"quant_method": "gptq"})
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert "llm_int8_threshold makes no sense" in refused({**entry, "llm_int8_threshold": -1})
    assert "llm_int8_threshold makes no sense" in refused({**entry, "llm_int8_threshold": None})


def test_the_old_layouts_of_bitsandbytes(source: Path, tmp_path: Path) -> None:
    saved_by_transformers(source, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    stored["model.language_model.layers.0.mlp.up_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    save_file(stored, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj was saved by an old bitsandbytes"):
        load(tmp_path / "q")
