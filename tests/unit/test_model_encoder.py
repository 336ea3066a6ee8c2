from __future__ import annotations

import math

import pytest
import torch
from weights_samples import random_network

from quasr.model import encoder as encoder_module
from quasr.model.encoder import AudioEncoder, layer_norm, plan_windows, residual_dtype, sinusoids, window_mask

torch.set_num_threads(1)


@pytest.fixture
def encoder() -> AudioEncoder:
    """Two layers, 16 mel bins; chunks of 100 frames, windows of 800."""
    return random_network().encoder.eval()


def mel(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(16, frames, generator=torch.Generator().manual_seed(seed))


def test_sinusoids_by_hand() -> None:
    """Width 4 has timescales 1 and 1e4: sin t, sin t/1e4, cos t, cos t/1e4."""
    row = sinusoids(3, 4)[2]
    expected = [math.sin(2), math.sin(2e-4), math.cos(2), math.cos(2e-4)]
    assert torch.equal(row, torch.tensor(expected)), "rounded once, so the same everywhere"


def test_windows_of_a_ragged_batch(encoder: AudioEncoder) -> None:
    """801 frames: 8 chunks fill a row; the ninth stands in the next, beside the other clip's only window."""
    plan = plan_windows(encoder.config, [801, 30], torch.device("cpu"))
    assert plan.slots.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert plan.tokens.tolist() == [*range(104), 104, 117, 118, 119, 120]
    assert plan.owners is not None
    assert plan.owners.tolist() == [[0] * 104, [1] + [-1] * 12 + [2] * 4 + [-1] * (104 - 17)]
    assert (plan.rows, plan.row_chunks) == (2, 8)


def test_rows_are_as_wide_as_needed_and_no_window_is_cut(encoder: AudioEncoder) -> None:
    plan = plan_windows(encoder.config, [150, 30, 100], torch.device("cpu"))
    assert (plan.slots.tolist(), plan.rows, plan.row_chunks) == ([0, 1, 2, 3], 2, 2)
    gaps = plan_windows(encoder.config, [150, 250, 30], torch.device("cpu"))
    assert (gaps.slots.tolist(), gaps.rows, gaps.row_chunks) == ([0, 1, 3, 4, 5, 2], 2, 3)


def test_full_windows_need_no_mask(encoder: AudioEncoder) -> None:
    assert window_mask(plan_windows(encoder.config, [1600, 800], torch.device("cpu")).owners) is None
    mask = window_mask(plan_windows(encoder.config, [100, 150], torch.device("cpu")).owners)
    assert mask is not None
    assert mask.shape == (2, 1, 26, 26)
    assert mask[1, 0].sum(1).tolist() == [20] * 20 + [6] * 6


def test_windows_do_not_see_each_other(encoder: AudioEncoder) -> None:
    clip = mel(1700)
    other = clip.clone()
    other[:, 850:860] += 1
    with torch.inference_mode():
        one, two = encoder([clip]), encoder([other])
    assert one.shape == (221, 20)
    changed = (one != two).any(1)
    assert not changed[:104].any()
    assert changed[104:208].all()
    assert not changed[208:].any()


def test_clips_do_not_see_each_other(encoder: AudioEncoder) -> None:
    clips = [mel(30, 1), mel(801, 2), mel(100, 3)]
    with torch.inference_mode():
        alone = torch.cat([encoder([clip]) for clip in clips])
        torch.testing.assert_close(encoder(clips), alone, rtol=0, atol=1e-4)


def test_stem_slices_change_nothing(encoder: AudioEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [mel(350, 1), mel(120, 2)]
    with torch.inference_mode():
        whole = encoder(clips)
        monkeypatch.setattr(encoder_module, "STEM_SLICE", 2)
        torch.testing.assert_close(encoder(clips), whole, rtol=0, atol=1e-4)


def test_fp16_keeps_a_wide_residual() -> None:
    assert residual_dtype(torch.float16) == torch.float32
    assert residual_dtype(torch.bfloat16) == torch.bfloat16
    norm = torch.nn.LayerNorm(4).half()
    beyond = torch.tensor([[70_000.0, -70_000.0, 70_000.0, -70_000.0]])
    assert layer_norm(norm, beyond).tolist() == [[1.0, -1.0, 1.0, -1.0]]
    assert layer_norm(norm, beyond).dtype == torch.float16
