"""The encoder's Triton kernels against their reference in fp32: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from fast_samples import DEVICE

from quasr.engine.fast_audio import FastEncoder
from quasr.kernels import dispatch, reference, reference_audio, triton_audio
from quasr.kernels.matrix import LayerNorm, Matrix
from quasr.model.config import AudioConfig
from quasr.model.encoder import AudioEncoder
from quasr.quant.linear import quantise_int8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytest.importorskip("triton")
torch.set_num_threads(1)

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of ||out - reference|| / ||reference||."""
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
"""The interpreter has no products in bf16."""


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that is not written yet holds NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert got.isfinite().all()
    assert (got.double() - expected.double()).norm() / expected.double().norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 100, 24), (3, 7, 9, 130)], ids=str)
def test_first_convolution(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    count, bins, frames, channels = shape
    chunks = random(count, frames, bins).transpose(1, 2)
    weight, bias = random(channels, 1, 3, 3, dtype=dtype), random(channels, dtype=dtype)
    got = dispatch.triton(DEVICE, dtype).convolve_mel(chunks, weight, bias)
    expected = reference_audio.convolve_mel(chunks.to(dtype).float(), weight.float(), bias.float())
    close(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (17, 1100), (2, 3, 30)], ids=str)
def test_gelu_of_a_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = 3 * random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    expected = reference_audio.add_gelu(x.float(), bias.float())
    close(dispatch.triton(DEVICE, dtype).add_gelu(x, bias), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 13, 24), (1, 5, 3, 200)], ids=str)
def test_features_of_columns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    expected = reference_audio.stem_features(x.float(), bias.float())
    close(dispatch.triton(DEVICE, dtype).stem_features(x, bias), expected, dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_a_sum(dtype: torch.dtype, wide: bool) -> None:
    """The residual is in fp32 or in the weights' dtype."""
    residual = torch.float32 if wide else dtype
    x, y = 3 + 2 * random(7, 80, dtype=residual), random(7, 80, dtype=dtype)
    norm = LayerNorm(random(80, dtype=dtype), random(80, dtype=dtype), 1e-5)
    exact = LayerNorm(norm.weight.float(), norm.bias.float(), 1e-5)
    table, expected = dispatch.triton(DEVICE, dtype), x.float().clone()
    close(table.add_norm(x, None, norm), reference_audio.add_norm(expected, None, exact), dtype)
    close(table.add_norm(x, y, norm), reference_audio.add_norm(expected, y.float(), exact), dtype)
    close(x, expected, residual)


WINDOWS = {"one": [0, 20], "ragged": [0, 13, 14, 14, 40], "inside": [3, 30, 31], "long": [0, 150, 160]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("shape", [(2, 16), (3, 20)], ids=str)
def test_attention_inside_windows(shape: tuple[int, int], case: str, dtype: torch.dtype) -> None:
    """Heads of 16 and 20 numbers; an empty window; tokens that no window owns; one longer than a program holds."""
    attention_inside_windows(shape, case, dtype)


@pytest.mark.parametrize("case", WINDOWS)
def test_attention_inside_windows_by_smaller_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs with little shared memory."""
    monkeypatch.setattr(triton_audio, "wide_fits", lambda x: False)
    attention_inside_windows((2, 16), case, torch.float32)


def attention_inside_windows(shape: tuple[int, int], case: str, dtype: torch.dtype) -> None:
    heads, size = shape
    starts = torch.tensor(WINDOWS[case], dtype=torch.int32, device=DEVICE)
    longest = max(b - a for a, b in zip(WINDOWS[case], WINDOWS[case][1:], strict=False))
    owned = slice(WINDOWS[case][0], WINDOWS[case][-1])
    qkv = random(owned.stop + 3, 3 * heads * size, dtype=dtype)
    got = dispatch.triton(DEVICE, dtype).attend_windows(qkv, starts, heads, longest)
    expected = reference_audio.attend_windows(qkv.float(), starts, heads, longest)
    close(got[owned], expected[owned], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_codes(dtype: torch.dtype) -> None:
    codes, scale = quantise_int8(random(34, 80, dtype=dtype))
    weight = dispatch.triton(DEVICE, dtype).dequantise(Matrix(codes, scale))
    close(weight, reference.dequantise(Matrix(codes, scale)).float(), dtype)


@torch.inference_mode()
def test_the_whole_encoder() -> None:
    """In slices of the stem, with clips that do not fill their windows."""
    torch.manual_seed(0)
    config = AudioConfig(2, 32, 2, 64, 48, mel_bins=8, stem_channels=8, chunk_frames=20, window_frames=40)
    encoder = AudioEncoder(config).eval().requires_grad_(False).to(DEVICE)
    frames = [90, 7, 40]
    mel = random(sum(frames), 8)
    expected = encoder.encode(mel, frames)
    fast = FastEncoder.from_model(encoder, dispatch.triton(DEVICE, torch.float32), 3)
    close(fast.encode(mel, frames), expected, torch.float32)
