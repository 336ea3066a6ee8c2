"""The memory plan against published shapes, hand-counted terms, and what torch really allocates."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from quant_samples import CONFIG, network
from torch.profiler import ProfilerActivity, profile

from quasr.engine import fast_engine, mel_torch, torch_engine
from quasr.engine import plan as planning
from quasr.engine.base import ClipRequest, token_budget
from quasr.engine.device import Placement
from quasr.engine.fast import FastDecoder
from quasr.engine.fast_engine import FastEngine
from quasr.engine.graphs import PACKED_TOKENS, GraphedPrefill
from quasr.engine.plan import (
    CUDA_CONTEXT,
    Candidate,
    Plan,
    Target,
    Wish,
    Work,
    cache_bytes,
    candidates,
    estimate,
    parse_duration,
    parse_memory,
    plan,
    written,
)
from quasr.engine.torch_engine import TorchEngine
from quasr.errors import OptionError, ResourceError
from quasr.kernels import reference
from quasr.kernels.dispatch import plain
from quasr.model import encoder
from quasr.model.asr import Qwen3ASR
from quasr.model.config import ModelConfig, parse_config
from quasr.quant import embedding
from quasr.quant.apply import quantise
from quasr.quant.recipe import recipe_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from quasr.kernels.matrix import Heads
    from quasr.kernels.state import Prompts


def shape(audio: tuple[int, ...], text: tuple[int, ...]) -> ModelConfig:
    """audio: layers, width, heads, ffn, channels; text: vocabulary, hidden, layers, heads, KV heads, head size, ffn."""
    names = ("encoder_layers", "d_model", "encoder_attention_heads", "encoder_ffn_dim", "downsample_hidden_size")
    sizes = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size",
    )  # fmt: skip
    raw: dict[str, Any] = {
        "model_type": "qwen3_asr",
        "audio_config": {**dict(zip(names, audio, strict=True)), "output_dim": text[1]},
        "text_config": dict(zip(sizes, text, strict=True)),
    }
    return parse_config(raw)


LARGE = shape((24, 1024, 16, 4096, 480), (151_936, 2048, 28, 16, 8, 128, 6144))
"""Qwen3-ASR-1.7B."""

CUDA = Target("cuda", "bf16")


def chosen(config: ModelConfig, budget: str, **wish: Any) -> Plan:
    return plan(config, candidates("cuda", "auto"), Wish(parse_memory(budget), **wish))


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("4GiB", 2**32), ("800MB", 800 * 10**6), ("1.5 gb", 15 * 10**8), ("512MiB", 2**29)],
)
def test_memory_is_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "4", "GB", "4TB", "4G", "-4GB", "0GB", "4GB!", "1e3MB", "4  GB", "nanGB"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="no amount of memory"):
        parse_memory(text)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    with pytest.raises(OptionError, match="no length of audio"):
        parse_duration(f"{text} or so")


@pytest.mark.parametrize("size", [1, 999_999_999, 10**9 + 1, 2_049_000_001])
def test_written_budgets_are_enough_and_can_be_read(size: int) -> None:
    assert size <= parse_memory(written(size)) <= size * 1.01 + 1e6


def test_constants_are_those_of_the_network() -> None:
    assert planning.STEM_SLICE == encoder.STEM_SLICE
    assert planning.HEAD_NUMBERS == embedding.HEAD_NUMBERS
    assert planning.DROP_AT == torch_engine.DROP_AT


def test_constants_are_those_of_the_fast_engine() -> None:
    assert planning.MEL_SLICE == mel_torch.SLICE_FRAMES
    assert planning.POSITIONS_MULTIPLE == fast_engine.POSITIONS_MULTIPLE
    for name in ("PREFILL_SHARE", "LEAST_PREFILL", "MOST_PREFILL"):
        assert getattr(planning, name) == getattr(fast_engine, name)


def test_no_torch() -> None:
    code = "import sys, quasr.engine.plan, quasr.pipeline.planning; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


SLOW = pytest.mark.slow
"""For what imports bitsandbytes."""


@pytest.mark.parametrize(
    "compute_type",
    [
        "fp32",
        "bf16",
        "int8",
        "int8-g64",
        "int4",
        "int4-g32",
        *(pytest.param(n, marks=SLOW) for n in ("llm-int8", "nf4")),
    ],
)
def test_weights_are_exact(compute_type: str) -> None:
    (candidate,) = candidates("cpu", "auto", compute_type)
    model = network(torch.bfloat16 if compute_type == "bf16" else torch.float32)
    quantise(model, candidate.recipe)
    engine = TorchEngine(model, (), Placement(torch.device("cpu"), model.decoder.norm.weight.dtype))
    assert estimate(CONFIG, candidate, Work(5, 1)).weights == engine.info.weight_bytes


def test_a_position_of_the_cache_takes_114_688_bytes_in_both_sizes() -> None:
    # 2 x 28 layers x 8 heads x 128 x 2 bytes, and 13 tokens a second of audio.
    work = Work(30, 4, prompt=20)
    positions = 20 + 390 + token_budget(30)
    assert cache_bytes(LARGE, CUDA, work) == 4 * positions * 114_688


def test_the_large_model_under_budgets() -> None:
    taken = chosen(LARGE, "4GiB", seconds=1800).chosen
    assert taken.candidate.name == "int8"
    assert (taken.work.seconds, taken.work.batch) == (30, 8)
    assert 2.0e9 < taken.weights <= 2.1e9
    assert taken.peak == CUDA_CONTEXT + taken.weights + taken.cache + taken.activations
    small = chosen(LARGE, "2.69GB").chosen
    assert small.candidate.name == "int4-g32"
    assert chosen(LARGE, "8GB").chosen.candidate.name == "bf16"
    assert "bf16 would need more" in chosen(LARGE, "4GiB").why()


def test_int4_of_the_large_model_is_1_40_gb() -> None:
    (candidate,) = candidates("cuda", "auto", "int4")
    assert estimate(LARGE, candidate, Work(30, 1)).weights <= 1.4e9


@pytest.mark.slow
def test_what_is_chosen_cannot_grow() -> None:
    for budget in ("2.64GB", "3.2GB", "4GB", "5GB"):
        found = chosen(LARGE, budget)
        taken, limit = found.chosen, parse_memory(budget)
        assert taken.peak <= limit
        if taken.work.batch < 8:
            assert estimate(LARGE, taken.candidate, replace(taken.work, batch=taken.work.batch + 1)).peak > limit


@pytest.mark.slow
def test_nothing_fits_names_a_budget_that_does() -> None:
    with pytest.raises(ResourceError, match=r"nothing fits into 1\.00GB: the least is") as caught:
        _ = chosen(LARGE, "1GB").chosen
    least = str(caught.value).split("the least is ")[1].split(",")[0]
    assert chosen(LARGE, least).chosen.candidate.name == "int4"


def test_short_audio_and_a_wanted_batch() -> None:
    works = list(Wish(1, seconds=3).works())
    assert works == [Work(3, 1)]
    assert [work.seconds for work in Wish(1, seconds=12, batch=1).works()] == [12, 10, 5]
    assert {work.batch for work in Wish(1, batch=5).works()} == {5}
    assert next(Wish(1, seconds=70).works()) == Work(30, 3)
    assert next(Wish(1, largest_batch=2).works()) == Work(30, 2)


def test_groups_that_do_not_divide_are_a_row_with_the_reason() -> None:
    odd = shape((1, 48, 2, 96, 8), (300, 48, 1, 3, 1, 16, 96))
    rows = {row.candidate.name: row for row in chosen(odd, "4GB").rows}
    assert "do not divide" in rows["int4"].problem
    assert rows["int8"].fits
    with pytest.raises(ResourceError, match="int8"):
        _ = chosen(odd, "1MB").chosen
    with pytest.raises(OptionError, match="do not divide"):
        _ = plan(odd, candidates("cpu", "auto", "int4"), Wish(10**9)).chosen


def test_candidates_of_a_cpu_and_of_names() -> None:
    assert [one.name for one in candidates("cpu", "auto")][:3] == ["fp32", "bf16", "int8"]
    assert [one.name for one in candidates("cuda", "fp16")][:2] == ["fp16", "int8"]
    assert [one.name for one in candidates("cpu", "auto", "nf4")] == ["nf4"]
    with pytest.raises(OptionError, match="did you mean int8"):
        candidates("cpu", "auto", "int9")


def test_scores_count_where_no_fused_attention_shares_keys() -> None:
    work = Work(30, 2, prompt=10)
    assert planning.score_bytes(LARGE, Target("cuda", "fp32"), work) == 2 * 4 * 2 * 16 * 400**2
    assert planning.score_bytes(LARGE, CUDA, work) == 0


def test_packed_prompts_score_one_after_the_other() -> None:
    """Four prompts are prefilled together; `reference.attend_prompts` has the scores of one at a time."""
    target, work, recipe = Target("cuda", "fp32"), Work(30, 8), recipe_for("fp32")
    found = estimate(LARGE, Candidate("fp32", recipe, target), work)
    beside = planning.packed_prefill_bytes(LARGE, target, replace(work, batch=4), recipe)
    assert found.prefill - beside == 2 * 4 * 16 * work.prompt_length(LARGE) ** 2


def allocated(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator has given out at one time during `work`, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max())


STEM_HEAVY = shape((2, 128, 2, 256, 96), (500, 128, 2, 2, 1, 64, 256))
HEAD_HEAVY = shape((1, 128, 2, 256, 8), (40_000, 256, 6, 4, 4, 64, 512))
LAYER_HEAVY = shape((1, 128, 2, 256, 8), (500, 512, 2, 8, 4, 64, 2048))


@pytest.mark.slow
@pytest.mark.parametrize("config", [STEM_HEAVY, HEAD_HEAVY, LAYER_HEAVY], ids=["stem", "head", "layer"])
@pytest.mark.parametrize("compute_type", ["fp32", "int8", "nf4"])
def test_peak_is_within_a_tenth_of_what_torch_allocates(config: ModelConfig, compute_type: str) -> None:
    """A batch of which a quarter ends at once, so that the cache is copied; weights and mel frames lie outside."""
    torch.manual_seed(0)
    model = Qwen3ASR(config).requires_grad_(False).eval()
    recipe = recipe_for(compute_type)
    quantise(model, recipe)
    engine = TorchEngine(model, (), Placement(torch.device("cpu"), torch.float32))
    work = Work(5, 4, prompt=15)
    found = estimate(config, Candidate(compute_type, recipe, Target("cpu", "fp32")), work)
    samples = np.zeros(work.frames * 160, np.float32)
    requests = [ClipRequest(samples, tuple(range(9)), tuple(range(6)), budget) for budget in (1, 3, 3, token_budget(5))]
    measured = engine.info.weight_bytes + allocated(lambda: engine.run(requests))
    assert found.tensors == pytest.approx(measured, rel=0.1)


INNER_HEAVY = shape((1, 128, 2, 256, 8), (50, 128, 3, 2, 1, 64, 512))
QUERY_HEAVY = shape((1, 128, 2, 256, 8), (50, 128, 3, 8, 4, 64, 128))
WEIGHT_HEAVY = shape((1, 128, 2, 256, 8), (50, 512, 3, 2, 1, 64, 512))


@pytest.mark.parametrize(
    ("config", "compute_type"),
    [(INNER_HEAVY, "fp32"), (QUERY_HEAVY, "fp32"), (INNER_HEAVY, "int8"), (WEIGHT_HEAVY, "int8")],
    ids=["inner width", "queries", "inner width beside weights", "weights"],
)
@torch.inference_mode()
def test_packed_prefill_holds_what_is_planned(config: ModelConfig, compute_type: str) -> None:
    """Nothing that a layer has used lives on through its fullest stage, or into the next layer."""
    torch.manual_seed(0)
    model, recipe = Qwen3ASR(config).requires_grad_(False).eval(), recipe_for(compute_type)
    quantise(model, recipe)
    decoder = FastDecoder.from_model(model.decoder, plain("a test"))
    work = Work(5, 4, prompt=15)
    length = work.prompt_length(config)
    cache = decoder.allocate_cache(4 * length)
    offsets = [length * row for row in range(4)]

    def prefill() -> None:
        decoder.prefill(torch.ones(4 * length, config.text.hidden), [length] * 4, offsets, cache)

    planned = planning.packed_prefill_bytes(config, Target("cuda", "fp32"), work, recipe)
    assert planned == pytest.approx(allocated(prefill), rel=0.05)


def attend_by_device(q: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, heads: Heads) -> Tensor:
    """The reference for prompts that only the device knows."""
    lengths, offsets = tuple(prompts.starts.diff().tolist()), tuple(prompts.begins.tolist())
    return reference.attend_prompts(q, keys, values, replace(prompts, lengths=lengths, offsets=offsets), heads)


@pytest.mark.parametrize(
    ("config", "compute_type"),
    [(INNER_HEAVY, "fp32"), (QUERY_HEAVY, "fp32"), (WEIGHT_HEAVY, "int8")],
    ids=["inner width", "queries", "weights"],
)
@torch.inference_mode()
def test_prefill_in_a_graph_holds_no_more(config: ModelConfig, compute_type: str) -> None:
    """Four prompts that fill a graph: the same fullest stage, and one residual, for nothing is padded or copied."""
    torch.manual_seed(0)
    model, recipe = Qwen3ASR(config).requires_grad_(False).eval(), recipe_for(compute_type)
    quantise(model, recipe)
    decoder = FastDecoder.from_model(model.decoder, replace(plain("a test"), attend_prompts=attend_by_device))
    work = Work(5, 4, prompt=PACKED_TOKENS[2] // 4 - config.audio.token_count(500))
    length = work.prompt_length(config)
    assert 4 * length in PACKED_TOKENS
    cache, prefill = decoder.allocate_cache(4 * length), GraphedPrefill(decoder, lambda function: function)
    offsets = [length * row for row in range(4)]
    held = allocated(lambda: prefill.prefill(torch.ones(4 * length, config.text.hidden), [length] * 4, offsets, cache))
    planned = planning.packed_prefill_bytes(config, Target("cuda", "fp32"), work, recipe)
    assert planned - 4 * length * config.text.hidden * 4 == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("work", [Work(30, 1), Work(30, 4), Work(5, 8)], ids=["less than a slice", "more", "short"])
@torch.inference_mode()
def test_mel_frames_need_what_is_planned(work: Work) -> None:
    lengths = [work.frames * 160] * work.batch
    bins = STEM_HEAVY.audio.mel_bins
    mel_torch.packed_log_mel(torch.zeros(mel_torch.joined_size([160])), [160], bins)
    held = allocated(lambda: mel_torch.packed_log_mel(torch.zeros(mel_torch.joined_size(lengths)), lengths, bins))
    assert planning.mel_bytes(STEM_HEAVY, work) == pytest.approx(held, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("config", [STEM_HEAVY, HEAD_HEAVY, LAYER_HEAVY], ids=["stem", "head", "layer"])
@pytest.mark.parametrize("compute_type", ["fp32", "int8"])
def test_the_fast_engine_s_peak_is_within_a_tenth(
    config: ModelConfig, compute_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, whose attention writes no scores; a few clips at a time."""
    torch.manual_seed(0)
    for module in (planning, fast_engine):
        monkeypatch.setattr(module, "LEAST_PREFILL", 200)
    # Else this stage would be the fullest of all.
    monkeypatch.setattr(planning, "MEL_SLICE", 256)
    monkeypatch.setattr(mel_torch, "SLICE_FRAMES", 256)
    monkeypatch.setattr(planning, "score_bytes", lambda *_: 0)
    model = Qwen3ASR(config).requires_grad_(False).eval()
    recipe = recipe_for(compute_type)
    quantise(model, recipe)
    engine = FastEngine(model, (), Placement(torch.device("cpu"), torch.float32))
    work = Work(5, 4, prompt=15)
    found = estimate(config, Candidate(compute_type, recipe, Target("cuda", "fp32")), work)
    samples = np.zeros(work.frames * 160, np.float32)
    requests = [ClipRequest(samples, tuple(range(9)), tuple(range(6)), token_budget(5)) for _ in range(4)]
    measured = engine.info.weight_bytes + allocated(lambda: engine.run(requests))
    assert found.tensors == pytest.approx(measured, rel=0.1)
