"""The network against transformers: random checkpoints of three shapes, both layouts, fp32, ragged batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from checkpoints import AUDIO_TOKEN, ODD, TINY, WIDE, Shape, random_model, write_hf, write_original
from transformers import Qwen3ASRFeatureExtractor

from quasr.model.config import read_config
from quasr.model.decoder import KVCache
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import Qwen3ASRForConditionalGeneration

    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)

SECONDS = (0.02, 0.3, 1.0, 7.99, 8.01, 29.3, 61.7)
STEPS = 12
PREFIXES = [(3, 11, 5, 9), (3, 21), (3, 40, 41, 42, 43, 44, 45, 46), (3, 9), (12,), (3, 30, 31), (3, 5, 8, 13)]
SUFFIXES = [(4, 6), (4, 6, 50, 51), (4,), (4, 6), (4, 6, 17), (4, 6), (4, 6, 8)]


@dataclass(frozen=True)
class Truth:
    """What transformers computes for one clip alone: (tokens, hidden), (steps, vocab), steps ids."""

    encoded: Tensor
    logits: Tensor
    tokens: list[int]


@dataclass(frozen=True)
class Case:
    folders: dict[str, Path]
    truths: list[Truth]


def noise(seconds: float, seed: int) -> np.ndarray:
    """Noise whose loudness swings about four times a second, as speech does."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    swing = 0.55 + 0.45 * np.sin(2 * np.pi * (4 * time + rng.random()) + np.sin(2 * np.pi * 0.7 * time))
    return (0.2 * swing * rng.standard_normal(len(time))).astype(np.float32)


def extract(samples: np.ndarray) -> dict[str, Tensor]:
    """Padded log-mel (1, 128, frames) and its mask, from transformers."""
    extractor = Qwen3ASRFeatureExtractor()
    got = extractor(samples, sampling_rate=16_000, padding="longest", return_attention_mask=True)
    return {"input_features": got["input_features"], "input_features_mask": got["attention_mask"]}


FEATURES = [extract(noise(seconds, seed)) for seed, seconds in enumerate(SECONDS)]
MELS = [f["input_features"][0][:, : int(f["input_features_mask"].sum())] for f in FEATURES]


@torch.inference_mode()
def ask_transformers(model: Qwen3ASRForConditionalGeneration, clip: int) -> Truth:
    """Prefill and greedy steps of one clip, with transformers' own cache."""
    encoded = model.get_audio_features(**FEATURES[clip]).pooler_output
    ids = [*PREFIXES[clip], *[AUDIO_TOKEN] * len(encoded), *SUFFIXES[clip]]
    out = model(input_ids=torch.tensor([ids]), **FEATURES[clip], use_cache=True, logits_to_keep=1)
    logits = [out.logits[0, -1]]
    while len(logits) < STEPS:
        token = logits[-1].argmax().view(1, 1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return Truth(encoded, torch.stack(logits), [int(row.argmax()) for row in logits])


@torch.inference_mode()
def ask_quasr(model: Qwen3ASR, clips: list[int]) -> list[Truth]:
    """The same for a ragged batch."""
    weight = model.decoder.embed_tokens.weight
    encoded = model.encode([MELS[clip] for clip in clips])
    prefixes = [torch.tensor(PREFIXES[clip]) for clip in clips]
    embeddings, lengths = model.embed_prompts(encoded, prefixes, [torch.tensor(SUFFIXES[clip]) for clip in clips])
    cache = KVCache.allocate(model.config.text, len(clips), max(lengths) + STEPS, weight.dtype, weight.device)
    logits = [model.prefill(embeddings, lengths, cache)]
    for done in range(STEPS - 1):
        filled = torch.tensor(lengths) + done
        logits.append(model.step(logits[-1].argmax(-1), filled, int(filled.max()), cache))
    rows = torch.stack(logits, dim=1)
    return [Truth(a, row, row.argmax(-1).tolist()) for a, row in zip(encoded, rows, strict=True)]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen3ASR:
    return load_model(folder, read_config(folder), dtype, torch.device("cpu"))


def make_case(shape: Shape, root: Path) -> Case:
    model = random_model(shape)
    folders = {"hf": root / "hf", "original": root / "original"}
    write_hf(model, folders["hf"])
    write_original(model, folders["original"])
    return Case(folders, [ask_transformers(model, clip) for clip in range(len(SECONDS))])


@pytest.fixture(scope="module", params=[TINY, ODD, pytest.param(WIDE, marks=pytest.mark.slow)], ids=lambda s: s.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_ragged_batch_equals_transformers(case: Case, layout: str) -> None:
    model = load(case.folders[layout])
    got = ask_quasr(model, list(range(len(SECONDS))))
    for mine, truth in zip(got, case.truths, strict=True):
        torch.testing.assert_close(mine.encoded, truth.encoded, rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.logits, truth.logits, rtol=0, atol=1e-4)
        assert mine.tokens == truth.tokens


def test_reference_is_not_degenerate(case: Case) -> None:
    """Else agreement would prove little: tokens differ within a clip and between clips, and logits spread."""
    assert len({tuple(truth.tokens) for truth in case.truths}) == len(SECONDS)
    assert min(len(set(truth.tokens)) for truth in case.truths) > 2
    assert min(float(truth.logits.std()) for truth in case.truths) > 1


def test_clip_alone_equals_clip_in_batch(case: Case) -> None:
    model = load(case.folders["hf"])
    batch = ask_quasr(model, [2, 0, 4, 3, 1])
    for clip, together in zip([2, 0, 4, 3, 1], batch, strict=True):
        (alone,) = ask_quasr(model, [clip])
        assert alone.tokens == together.tokens
        torch.testing.assert_close(alone.logits, together.logits, rtol=0, atol=1e-4)


def test_bf16_stays_near_fp32(case: Case) -> None:
    """bf16 keeps 8 bits: after some layers a relative error of several percent of the logits' spread is expected."""
    got = ask_quasr(load(case.folders["original"], torch.bfloat16), [0, 2, 4])
    for mine, truth in zip(got, [case.truths[0], case.truths[2], case.truths[4]], strict=True):
        assert mine.logits.dtype == torch.bfloat16
        error = (mine.logits[0].float() - truth.logits[0]).std() / truth.logits[0].std()
        assert float(error) < 0.1
