"""The continuous-batching engine against the plain one, which is tested against recomputation."""

from __future__ import annotations

import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from quasr.audio.decode import load
from quasr.engine import fast_engine
from quasr.engine.base import ClipRequest, ClipResult, Ticket, token_budget
from quasr.engine.device import Placement
from quasr.engine.fast_audio import FastEncoder
from quasr.engine.fast_engine import FastEngine, FastOptions, even_parts
from quasr.engine.graphs import GraphedEncoder, GraphedPrefill
from quasr.engine.rows import Rows
from quasr.engine.staging import Staging
from quasr.engine.torch_engine import TorchEngine
from quasr.errors import ModelError, OptionError, ResourceError
from quasr.model.asr import Qwen3ASR
from quasr.model.config import AudioConfig, ModelConfig, TextConfig, read_config
from quasr.quant.apply import quantise
from quasr.quant.recipe import recipe_for
from quasr.quant.store import load_network
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.weights.hub import DEMO_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from quasr.engine.rows import Clip
    from quasr.kernels.state import CachePool, DecodeState

AUDIO = AudioConfig(layers=2, width=32, heads=2, ffn=64, output=32, mel_bins=16, stem_channels=8)
TEXT = TextConfig(vocab_size=61, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64)
CPU = Placement(torch.device("cpu"), torch.float32, ("a test",))
STOPS = frozenset({17, 41})
POSITION_BYTES = 2 * 2 * 2 * 8 * 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(seed: int = 0, compute_type: str = "fp32", spread: float = 1.0) -> Qwen3ASR:
    """With a small spread it repeats itself, with a large one it does not."""
    torch.manual_seed(seed)
    model = Qwen3ASR(ModelConfig(AUDIO, TEXT, "hf")).requires_grad_(False).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, spread)
    quantise(model, recipe_for(compute_type))
    return model


def request(seed: int, frames: int, budget: int, *, stop_loops: bool = False) -> ClipRequest:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(frames * 160).astype(np.float32)
    prefix = tuple(rng.integers(0, TEXT.vocab_size, 5 + seed % 4).tolist())
    return ClipRequest(samples, prefix, (3, 4), budget, stop_loops)


SIZES = [(50, 40), (433, 7), (100, 25), (901, 40), (51, 1), (267, 33), (80, 64), (50, 2), (120, 150)]
REQUESTS = [request(seed, frames, budget) for seed, (frames, budget) in enumerate(SIZES)]


def fast(model: Qwen3ASR, stops: frozenset[int] = STOPS, **options: int) -> FastEngine:
    return FastEngine(model, stops, CPU, options=FastOptions(**options))


def positions(count: int) -> int:
    return count * POSITION_BYTES


def same(found: Sequence[ClipResult], expected: Sequence[ClipResult]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def drain(engine: FastEngine) -> dict[Ticket, ClipResult]:
    found: dict[Ticket, ClipResult] = {}
    for _ in range(1000):
        found.update(engine.step())
        if not engine._clips:
            return found
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("compute_type", ["fp32", "int8", "int4-g32"])
def test_tokens_are_the_plain_engine_s(compute_type: str) -> None:
    expected = TorchEngine(build(0, compute_type), STOPS, CPU).run(REQUESTS)
    assert {"stop", "length"} == {one.finish_reason for one in expected}
    engine = fast(build(0, compute_type))
    same(engine.run(REQUESTS), expected)
    same([engine.run([clip])[0] for clip in REQUESTS[:3]], expected[:3])


@pytest.mark.parametrize("options", [{"rows": 1}, {"rows": 3}, {"rows": 4, "cache_bytes": positions(300)}])
def test_fewer_rows_and_less_cache_than_clips_change_nothing(options: dict[str, int]) -> None:
    model = build()
    expected = TorchEngine(model, STOPS, CPU).run(REQUESTS)
    engine = fast(model, **options)
    same(engine.run(REQUESTS), expected)
    assert engine._cache is not None
    assert engine._cache.positions <= 300 or "cache_bytes" not in options
    assert engine._scheduler.running == engine._scheduler.waiting == 0


@pytest.mark.slow
def test_every_length_of_finish_is_met() -> None:
    """Stop ids taken from each free-running output end the rows at different places of a look."""
    model = build(3)
    free = fast(model, frozenset()).run(REQUESTS)
    assert [len(result.tokens) for result in free] == [clip.max_new_tokens for clip in REQUESTS]
    for stop in sorted({token for result in free for token in result.tokens[:20]})[:6]:
        for cut, result in zip(fast(model, frozenset({stop}), rows=4).run(REQUESTS), free, strict=True):
            ends = result.tokens.index(stop) if stop in result.tokens else len(result.tokens)
            assert cut.tokens == result.tokens[:ends]
            assert cut.finish_reason == ("stop" if stop in result.tokens else "length")


def test_clips_that_come_later_join_those_that_run() -> None:
    model = build()
    expected = TorchEngine(model, STOPS, CPU).run(REQUESTS)
    engine = fast(model, rows=3)
    found: dict[Ticket, ClipResult] = {}
    tickets = []
    for number, clip in enumerate(REQUESTS):
        tickets.append(engine.submit(clip, group=number % 2))
        found.update(engine.step())
    found.update(drain(engine))
    same([found[ticket] for ticket in tickets], expected)


def test_loops_end_where_the_plain_engine_ends_them() -> None:
    model = build(1, spread=0.3)
    long = [replace(clip, max_new_tokens=150, stop_loops=True) for clip in REQUESTS]
    expected = TorchEngine(model, (), CPU).run(long)
    assert "loop" in {one.finish_reason for one in expected}
    same(fast(model, frozenset(), rows=4).run(long), expected)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [([407] * 16, [4] * 4), ([407] * 5, [5]), ([3000, 10, 10], [1, 2]), ([407] * 6, [3, 3]), ([1], [1])],
    ids=str,
)
def test_prompts_are_computed_in_even_parts(sizes: list[int], parts: list[int]) -> None:
    assert [len(part) for part in even_parts(sizes, 2048, 2048)] == parts


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [([407] * 16, [2, 5, 4, 5]), ([407] * 5, [5]), ([3000, 10, 10], [1, 2]), ([3000], [1]), ([10, 3000], [1, 1])],
    ids=str,
)
def test_a_first_part_may_be_small(sizes: list[int], parts: list[int]) -> None:
    """Unless all go in one."""
    assert [len(part) for part in even_parts(sizes, 2048, 1024)] == parts


def test_no_part_is_too_large() -> None:
    rng = np.random.default_rng(0)
    for most, first in ((50, 50), (100, 100), (700, 700), (50, 0), (100, 50), (700, 350)):
        sizes = rng.integers(1, 101, 40).tolist()
        parts = list(even_parts(sizes, most, first))
        assert [index for part in parts for index in part] == list(range(40))
        assert all(len(part) == 1 or sum(sizes[index] for index in part) <= most for part in parts)


def test_drafts_never_change_the_tokens() -> None:
    """Right, cut off, wrong in the middle or at once, longer than the budget, with stop tokens, with senseless ids."""
    model = build()
    expected = fast(model).run(REQUESTS)
    rng = np.random.default_rng(0)
    for kind in range(8):
        drafted = []
        for clip, result in zip(REQUESTS, expected, strict=True):
            right, noise = result.tokens, tuple(rng.integers(0, 61, 20).tolist())
            middle = len(right) // 2
            wrong = (*right[:middle], 5, *right[middle:])
            draft = [
                right, right[:middle], wrong, noise, right + noise * 10, (*right[:middle], 17, *right[middle:]),
                (*right[:middle], 999, -3), (*right, 41),
            ][kind]  # fmt: skip
            drafted.append(replace(clip, draft=draft))
        same(fast(model, rows=4).run(drafted), expected)
        same([fast(model).run([drafted[5]])[0]], expected[5:6])


def test_a_right_draft_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    clip = replace(REQUESTS[8], max_new_tokens=60)
    engine = fast(model, frozenset())
    (result,) = engine.run([clip])
    steps: list[int] = []
    run = engine._steps.run
    monkeypatch.setattr(
        engine._steps, "run", lambda state, cache, count: (steps.append(count), run(state, cache, count))
    )
    assert engine.run([clip])[0].tokens == result.tokens
    plain, steps[:] = sum(steps), []
    assert engine.run([replace(clip, draft=result.tokens[:50])])[0].tokens == result.tokens
    assert plain == 59
    assert sum(steps) <= 20


def test_drafts_with_loops_end_in_the_loop() -> None:
    model = build(1, spread=0.3)
    long = [replace(clip, max_new_tokens=150, stop_loops=True) for clip in REQUESTS]
    free = fast(model, frozenset()).run([replace(clip, stop_loops=False) for clip in long])
    expected = fast(model, frozenset()).run(long)
    drafted = [replace(clip, draft=result.tokens) for clip, result in zip(long, free, strict=True)]
    same(fast(model, frozenset()).run(drafted), expected)


def test_one_clip_or_a_group_can_be_cancelled_at_any_time() -> None:
    model = build()
    expected = TorchEngine(model, STOPS, CPU).run(REQUESTS)
    for steps in (0, 1, 3):
        engine = fast(model, rows=3)
        kept = [engine.submit(clip, "kept") for clip in REQUESTS[:4]]
        gone = [engine.submit(clip, "gone") for clip in REQUESTS[4:]]
        found: dict[Ticket, ClipResult] = {}
        for _ in range(steps):
            found.update(engine.step())
        engine.cancel(kept[1])
        engine.cancel("gone")
        still = {kept[index] for index in (0, 2, 3)} - set(found)
        assert engine._scheduler.running + engine._scheduler.waiting == len(still)
        left = drain(engine)
        assert not set(left) & set(gone)
        found.update(left)
        for index in (0, 2, 3):
            same([found[kept[index]]], [expected[index]])
        assert engine._scheduler.running == 0
        same(engine.run(REQUESTS), expected)
        assert engine._scheduler.waiting == 0


def test_prompts_are_computed_ahead_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many clips as rows wait with their first token. Nothing is computed while all rows have work."""
    model = build()
    engine, computed, decoded = fast(model, frozenset(), rows=4), [], []
    start, run = engine._start, engine._steps.run

    def note_start(clips: Sequence[Clip], samples: Iterator[torch.Tensor]) -> None:
        computed.append((len(engine._rows.clips), len(clips)))
        start(clips, samples)

    def note_run(state: DecodeState, cache: CachePool, count: int) -> None:
        decoded.append((state.rows, len(engine._rows.clips)))
        run(state, cache, count)

    monkeypatch.setattr(engine, "_start", note_start)
    monkeypatch.setattr(engine._steps, "run", note_run)
    clips = [replace(REQUESTS[0], max_new_tokens=budget) for budget in (60, 50, 41, 33, 30, 28, 21, 17, 9)]
    results = engine.run(clips)
    assert computed == [(0, 6), (3, 3)]
    assert {rows for rows, held in decoded if held > 4} == {4}
    same(results, [fast(model, frozenset()).run([clip])[0] for clip in clips])


@pytest.mark.parametrize("ending", ["cancelled", "budget", "stop"])
def test_a_clip_that_waits_for_a_row_can_be_cancelled_or_end(ending: str) -> None:
    model = build(3)
    first = fast(model, frozenset()).run(REQUESTS[:1])[0].tokens[0]
    stops = frozenset({first} if ending == "stop" else ())
    budgets = ((6, 50), (2, 40), (0, 1 if ending == "budget" else 10))
    clips = [replace(REQUESTS[index], max_new_tokens=budget) for index, budget in budgets]
    expected = TorchEngine(model, stops, CPU).run(clips)
    engine = fast(model, stops, rows=2)
    tickets = [engine.submit(clip) for clip in clips]
    found = dict(engine.step())
    if ending == "cancelled":
        assert [clip.ticket for clip in engine._rows.clips] == tickets
        engine.cancel(tickets.pop())
    else:
        assert list(found) == tickets[2:]
    assert [clip.ticket for clip in engine._rows.clips] == tickets[:2]
    found.update(drain(engine))
    same([found[ticket] for ticket in tickets], expected[: len(tickets)])


def test_a_late_clip_passes_those_of_a_job_that_wait_for_a_row() -> None:
    """It gets the second row that becomes free: the first one makes room for it among those that wait."""
    model = build()
    engine = fast(model, frozenset(), rows=4)
    job = [engine.submit(replace(REQUESTS[0], max_new_tokens=20 + 16 * n), "job") for n in range(10)]
    found = dict(engine.step())
    late = engine.submit(replace(REQUESTS[2], max_new_tokens=9), "late")
    while late not in found:
        found.update(engine.step())
    assert sum(ticket in found for ticket in job) == 2
    found.update(drain(engine))
    alone = [fast(model, frozenset()).run([replace(REQUESTS[0], max_new_tokens=20 + 16 * n)])[0] for n in range(10)]
    same([found[ticket] for ticket in job], alone)


def test_run_leaves_other_clips_results_for_step() -> None:
    model = build()
    engine = fast(model)
    ticket = engine.submit(REQUESTS[4])
    same(engine.run(REQUESTS[3:4]), TorchEngine(model, STOPS, CPU).run(REQUESTS[3:4]))
    same([drain(engine)[ticket]], TorchEngine(model, STOPS, CPU).run(REQUESTS[4:5]))


def test_the_cache_grows_with_the_work_and_no_further() -> None:
    engine = fast(build())
    engine.run(REQUESTS[4:5])
    first = engine._cache
    assert first is not None
    assert first.positions == 64
    engine.run(REQUESTS[4:5])
    assert engine._cache is first
    engine.run(REQUESTS)
    needed = sum(clip.max_new_tokens + fast_engine.prompt_length(AUDIO, clip) for clip in REQUESTS)
    assert engine._cache.positions == -(-needed // 64) * 64


def test_a_clip_that_can_never_fit_is_refused_and_the_others_run() -> None:
    engine = fast(build(), cache_bytes=positions(100))
    with pytest.raises(ResourceError, match="cache positions"):
        engine.run(REQUESTS[:4])
    assert len(engine.run(REQUESTS[:1])) == 1


@pytest.mark.slow
def test_long_budgets_have_room() -> None:
    model = build()
    clip = replace(REQUESTS[0], max_new_tokens=530)
    same(fast(model, frozenset()).run([clip, REQUESTS[1]]), TorchEngine(model, (), CPU).run([clip, REQUESTS[1]]))


@pytest.mark.parametrize("where", ["norm", "layer"])
def test_nan_is_an_error_and_the_engine_lives_on(where: str) -> None:
    model = build()
    engine = fast(model)
    weight = model.decoder.norm.weight if where == "norm" else model.encoder.linear_2.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN in fp32"):
        engine.run(REQUESTS[:3])
    weight.copy_(kept)
    same(engine.run(REQUESTS[:2]), TorchEngine(model, STOPS, CPU).run(REQUESTS[:2]))


def test_out_of_memory_gives_advice_and_the_engine_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    engine = fast(model)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FastEncoder, "run", fail)
        with pytest.raises(ResourceError, match="9 clips of up to 9 s: use a smaller batch"):
            engine.run(REQUESTS)
    assert engine.step() == []
    same(engine.run(REQUESTS[:1]), TorchEngine(model, STOPS, CPU).run(REQUESTS[:1]))


def test_info_stats_and_close() -> None:
    model = build()
    engine = fast(model)
    assert engine.run([]) == []
    assert engine.info.weight_bytes == sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    assert (engine.info.name, engine.info.device, engine.info.dtype) == ("fast", "cpu", "fp32")
    assert "no CUDA graphs" in engine.info.reasons[-1]
    results = engine.run(REQUESTS[:2])
    assert engine.stats.tokens == sum(len(result.tokens) for result in results)
    assert min(engine.stats.encode_seconds, engine.stats.prefill_seconds, engine.stats.generate_seconds) > 0
    for _ in range(2):
        engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.run(REQUESTS[:1])


def test_graphs_are_dropped_on_the_engine_s_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the device then waits for the current one, which need not be the first."""
    current: list[torch.device] = []
    dropped_on: list[list[torch.device]] = []

    @contextmanager
    def note(device: torch.device) -> Iterator[None]:
        current.append(device)
        try:
            yield
        finally:
            current.pop()

    def fail(*_: object) -> None:
        raise RuntimeError

    engine = fast(build())
    monkeypatch.setattr(fast_engine, "_current", note)
    monkeypatch.setattr(engine._steps, "forget", lambda: dropped_on.append(list(current)))
    with monkeypatch.context() as patch:
        patch.setattr(FastEncoder, "run", fail)
        with pytest.raises(RuntimeError):
            engine.run(REQUESTS[:1])
    after_an_error = dropped_on[-1]
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "drop", lambda _: dropped_on.append(list(current)))
        engine.cancel(engine.submit(REQUESTS[0]))
    after_a_cancel = dropped_on[-1]
    engine.close()
    assert after_an_error == after_a_cancel == dropped_on[-1] == [CPU.device]
    assert current == []


def test_samples_are_gone_when_they_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan counts them beside the mel frames alone."""
    engine, sent, alive = fast(build()), [], []
    send_part, run = Staging.send, FastEncoder.run

    def send(*given: Any) -> Iterator[torch.Tensor]:
        for samples in send_part(*given):
            sent.append(weakref.ref(samples))
            out = [samples]
            del samples
            yield out.pop()

    def look(*given: Any) -> torch.Tensor:
        alive.append(sent[-1]() is not None)
        return run(*given)

    monkeypatch.setattr(Staging, "send", send)
    monkeypatch.setattr(FastEncoder, "run", look)
    engine.run(REQUESTS[:2])
    assert alive
    assert not any(alive)


def test_results_in_the_memory_of_graphs_are_used_before_the_next() -> None:
    """As if encoder and prompts came from graphs of one memory: each call spoils what the one before it gave."""
    given: list[torch.Tensor] = []

    def launch(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            found = function(*(one.clone() for one in inputs)).clone()
            for one in given:
                one.fill_(torch.nan)
            given[:] = [found]
            return found

        return run

    expected = fast(build()).run(REQUESTS)
    model = build()
    engine = fast(model)
    encoder = FastEncoder.from_model(model.encoder, engine._decoder.kernels)
    engine._audio = replace(engine._audio, encode=GraphedEncoder(encoder, launch).encode)
    engine._prefill = GraphedPrefill(engine._decoder, launch)
    same(engine.run(REQUESTS), expected)
    assert given


@pytest.mark.parametrize("rows", [0, 257])
def test_rows_beyond_the_graphs_are_refused(rows: int) -> None:
    with pytest.raises(OptionError, match="1 to 256 rows"):
        fast(build(), rows=rows)


SPEECH = Path(__file__).resolve().parents[2] / "../shared/speech/public"


@pytest.mark.slow
@pytest.mark.skipif(not SPEECH.is_dir(), reason="the public speech clips are not here")
@pytest.mark.parametrize("compute_type", ["fp32", "int8", "int4"])
def test_the_demo_model_s_texts_are_the_plain_engine_s(compute_type: str) -> None:
    lines = map(json.loads, (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
    chosen = [line["path"] for line in lines if 1.5 < line["seconds"] < 4][::40][:5]
    config, tokenizer = read_config(DEMO_FOLDER), Tokenizer.from_folder(DEMO_FOLDER)
    prompt, stops = build_prompt(tokenizer), (*config.eos_token_ids, tokenizer.special.im_end)
    clips = [load(SPEECH / path) for path in chosen]
    requests = [ClipRequest(x, prompt.prefix, prompt.suffix, token_budget(len(x) / 16_000), True) for x in clips]
    recipe = recipe_for("auto" if compute_type == "fp32" else compute_type)
    network, scheme = load_network(DEMO_FOLDER, config, recipe, CPU.dtype, CPU.device)
    expected = TorchEngine(network, stops, CPU, scheme).run(requests)
    assert sum(len(one.tokens) for one in expected) > 5 * len(requests) > 0
    engine = FastEngine(network, stops, CPU, scheme, FastOptions(rows=2))
    same(engine.run(requests), expected)
    drafted = [replace(one, draft=result.tokens) for one, result in zip(requests, expected, strict=True)]
    same(engine.run(drafted), expected)
