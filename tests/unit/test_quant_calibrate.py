"""The driver: better than rounding to nearest, resumable to the same bits, and clear about what it cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from quant_samples import CONFIG, checkpoint, network
from taught_clips import taught_clips

from quasr.errors import OptionError, ResourceError
from quasr.quant.apply import quantise
from quasr.quant.calibrate import CalibrateOptions, Method, Observer, calibrate, forward, lay_out
from quasr.quant.linear import Int4Linear, Int8Linear
from quasr.quant.prompts import embed, position_weights
from quasr.quant.recipe import recipe_for
from quasr.quant.store import load_network, save_quantised

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR

RECIPE = recipe_for("int4-g32")
CLIPS = taught_clips(6)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def calibrated(method: Method, work: Path | None = None, recipe: str = "int4-g32") -> Qwen3ASR:
    model = network()
    calibrate(model, recipe_for(recipe), CLIPS, CalibrateOptions(method), work)
    return model


def hidden_error(model: Qwen3ASR) -> float:
    """Mean square error of the last layer's output over the clips."""
    original, total = network(), 0.0
    with torch.no_grad():
        for clip in CLIPS:
            gap = model.decoder.prefill(embed(model, clip), None) - original.decoder.prefill(
                embed(original, clip), None
            )
            total += float(gap.square().mean())
    return total / len(CLIPS)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_nearer_to_the_original_than_rounding_to_nearest(method: Method) -> None:
    nearest = network()
    quantise(nearest, RECIPE)
    assert hidden_error(calibrated(method)) < hidden_error(nearest)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_are_those_of_the_recipe(method: Method) -> None:
    model, nearest = calibrated(method), network()
    quantise(nearest, RECIPE)
    found, expected = model.state_dict(), nearest.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    for name, tensor in expected.items():
        if name.startswith("encoder."):
            assert torch.equal(found[name], tensor)


def test_layers_with_other_schemes_are_rounded_to_nearest() -> None:
    recipe = recipe_for("int4-g32", rules=["decoder.layers.0.*=int8", "decoder.layers.1.self_attn.v_proj=none"])
    model, nearest = network(), network()
    calibrate(model, recipe, CLIPS, CalibrateOptions("gptq"))
    quantise(nearest, recipe)
    first, expected = model.decoder.layers[0].state_dict(), nearest.decoder.layers[0].state_dict()
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    assert isinstance(model.get_submodule("decoder.layers.0.mlp.down_proj"), Int8Linear)
    assert isinstance(model.get_submodule("decoder.layers.1.self_attn.v_proj"), torch.nn.Linear)
    assert isinstance(model.get_submodule("decoder.layers.1.self_attn.q_proj"), Int4Linear)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_resumed_run_gives_the_same_bytes(method: Method, tmp_path: Path) -> None:
    work = tmp_path / "work"
    whole = calibrated(method)

    def stop(done: int, _: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(network(), RECIPE, CLIPS, CalibrateOptions(method), work, stop)
    assert [path.name for path in sorted(work.glob("layer*"))] == ["layer-000.safetensors"]
    kept = (work / "layer-000.safetensors").stat().st_mtime_ns
    resumed = calibrated(method, work)
    assert (work / "layer-000.safetensors").stat().st_mtime_ns == kept
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_work_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    calibrated("gptq", tmp_path / "work")
    with pytest.raises(OptionError, match="another calibration"):
        calibrated("awq", tmp_path / "work")
    with pytest.raises(OptionError, match="another calibration"):
        calibrate(network(), RECIPE, CLIPS[1:], CalibrateOptions("gptq"), tmp_path / "work")
    changed = network()
    with torch.no_grad():
        changed.decoder.norm.weight[0] += 1
    with pytest.raises(OptionError, match="another calibration"):
        calibrate(changed, RECIPE, CLIPS, CalibrateOptions("gptq"), tmp_path / "work")


def test_a_work_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write"):
        calibrated("gptq", tmp_path / "file" / "work")


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int]] = []
    calibrate(network(), RECIPE, CLIPS[:2], CalibrateOptions("awq"), None, lambda *done: seen.append(done))
    assert seen == [(1, CONFIG.text.layers), (2, CONFIG.text.layers)]


def test_a_recipe_without_int4_or_a_set_without_speech_is_refused() -> None:
    with pytest.raises(OptionError, match="int8 has none"):
        calibrated("gptq", recipe="int8")
    with pytest.raises(OptionError, match="no clip"):
        calibrate(network(), RECIPE, [], CalibrateOptions())


def test_hessian_is_the_weighted_mean_over_positions() -> None:
    model = network()
    layer = model.decoder.layers[0]
    with torch.no_grad():
        name = "self_attn.q_proj"
        found = Observer(layer, *lay_out(model, CLIPS, 3.0)).hessians([name])[name]  # type: ignore[arg-type]
        inputs = [embed(model, clip) for clip in CLIPS]
        seen = torch.cat([layer.input_layernorm(x)[0] for x in inputs])
    each = torch.cat([position_weights(clip, x.shape[1], 3.0) for clip, x in zip(CLIPS, inputs, strict=True)])
    torch.testing.assert_close(found, torch.einsum("n,ni,nj->ij", each, seen, seen) / each.sum(), rtol=1e-4, atol=1e-5)
    assert not layer.get_submodule(name)._forward_pre_hooks


def test_forward_is_the_layer_s_part_of_the_decoder() -> None:
    model = network()
    with torch.no_grad():
        x = embed(model, CLIPS[0])
        expected = model.decoder.prefill(x, None)
        for layer in model.decoder.layers:
            x = forward(layer, x)  # type: ignore[arg-type]
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_saved_as_any_other_and_loaded_bit_for_bit(method: Method, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    model = calibrated(method)
    save_quantised(model, RECIPE, source, tmp_path / "out", {"method": method})
    loaded, name = load_network(tmp_path / "out", CONFIG, recipe_for("auto"), torch.float32, torch.device("cpu"))
    assert name == "int4-g32"
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
