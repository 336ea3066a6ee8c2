"""The fast encoder gives what the module gives, for ragged batches, and shares its memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quasr.engine.fast_audio import FastEncoder, refusal
from quasr.errors import OptionError
from quasr.kernels.dispatch import plain
from quasr.model.config import AudioConfig
from quasr.model.encoder import AudioEncoder
from quasr.quant.linear import Int8Linear
from quasr.quant.scheme import parse

AUDIO = AudioConfig(layers=2, width=32, heads=2, ffn=64, output=48, mel_bins=16, stem_channels=8)
SHORT = AudioConfig(layers=1, width=24, heads=3, ffn=48, output=20, mel_bins=20, stem_channels=6, window_frames=100)
RAGGED = [[3000], [95], [801, 30, 2500], [800, 1600], [100] * 9, [7, 1, 933]]
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(config: AudioConfig, *, int8: bool = False) -> AudioEncoder:
    """Random weights, biases and norms."""
    torch.manual_seed(config.layers)
    encoder = AudioEncoder(config).eval().requires_grad_(False)
    for weight in encoder.parameters():
        if weight.dim() == 1:
            weight.add_(0.2 * torch.randn_like(weight))
    for layer in encoder.layers if int8 else ():
        for name in LINEARS:
            path, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(path), leaf, Int8Linear.from_linear(layer.get_submodule(name), parse("int8")))
    return encoder


@pytest.mark.parametrize("frames", RAGGED, ids=str)
@pytest.mark.parametrize("config", [AUDIO, SHORT], ids=["windows of 8 s", "windows of 1 s"])
@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_it_gives_what_the_module_gives(config: AudioConfig, frames: list[int], int8: bool) -> None:
    encoder = build(config, int8=int8)
    mel = torch.randn(sum(frames), config.mel_bins)
    expected = encoder.encode(mel, frames)
    found = FastEncoder.from_model(encoder, plain("a test")).encode(mel, frames)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode(mel, frames), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rounded"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@torch.inference_mode()
def test_fp32_is_not_rounded_by_cudnn(dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuDNN may round the factors of fp32 convolutions to 10 bits. The process's own setting comes back."""
    encoder, seen = build(AUDIO).to(dtype), []
    convolve = torch.nn.functional.conv2d

    def watched(*inputs: object, **options: object) -> torch.Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return convolve(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    for network in (encoder, FastEncoder.from_model(encoder, plain("a test"))):
        network.stem(torch.randn(1, 16, 100))
        assert torch.backends.cudnn.allow_tf32
    assert seen == [rounded] * 6


@torch.inference_mode()
def test_fp16_keeps_a_wide_residual() -> None:
    """Two layers add 60,000 each; fp16 holds 65,504."""
    encoder = build(AUDIO)
    for layer in encoder.layers:
        layer.fc2.bias.copy_(torch.linspace(-6e4, 6e4, AUDIO.width))
    mel = torch.randn(950, AUDIO.mel_bins)
    expected = encoder.encode(mel, [950])
    found = FastEncoder.from_model(encoder.half(), plain("a test")).encode(mel, [950])
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_nothing_is_held_twice() -> None:
    encoder = build(AUDIO)
    fast = FastEncoder.from_model(encoder, plain("a test"))
    for layer, own in zip(fast.layers, encoder.layers, strict=True):
        attention = own.self_attn
        places = [one.weight.untyped_storage().data_ptr() for one in (attention.q_proj, attention.k_proj)]
        assert set(places) == {layer.qkv.matrix.weight.untyped_storage().data_ptr()}
        assert layer.fc1.matrix.weight.data_ptr() == own.fc1.weight.data_ptr()
    for module, (weight, _) in zip(
        (encoder.stem.conv2d1, encoder.stem.conv2d2, encoder.stem.conv2d3), fast._stem.convolutions, strict=True
    ):
        assert weight.data_ptr() == module.weight.data_ptr()
    assert fast._stem.convolutions[1][0].is_contiguous(memory_format=torch.channels_last)


def test_layers_without_a_kernel_are_refused() -> None:
    encoder = build(AUDIO)
    assert refusal(encoder) is None
    encoder.layers[1].fc1 = nn.Sequential(encoder.layers[1].fc1)
    with pytest.raises(OptionError, match="layer 1: it has no kernel for Sequential"):
        FastEncoder.from_model(encoder, plain("a test"))
    mixed = build(AUDIO)
    attention = mixed.layers[0].self_attn
    attention.k_proj = Int8Linear.from_linear(attention.k_proj, parse("int8"))
    assert "different schemes" in str(refusal(mixed))
