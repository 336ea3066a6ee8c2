"""The ONNX engine on a random network in fp32. The reference is the torch engine on the same checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from threading import Event, get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state
from quant_samples import CONFIG, checkpoint

from quasr.engine import onnx_decoder, onnx_engine
from quasr.engine.base import ClipRequest, Ticket
from quasr.engine.device import Placement
from quasr.engine.onnx_decoder import OnnxNetwork
from quasr.engine.onnx_engine import OnnxEngine
from quasr.engine.onnx_session import Runtime
from quasr.engine.torch_engine import TorchEngine
from quasr.errors import CheckpointError, ModelError, ResourceError
from quasr.export.folder import ExportOptions, export_folder
from quasr.text.loops import loop_length
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.engine.base import ClipResult

torch.set_num_threads(1)
ONE = Runtime("cpu", 1, ("one thread",))
AHEAD = replace(ONE, ahead=True)
WAIT = 20.0
"""Seconds after which a thread that should have come is taken for missing."""
CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "sixteen")


@pytest.fixture(scope="module")
def graphs(source: Path) -> Path:
    export_folder(source, source.with_name("onnx"), ExportOptions("fp32"))
    return source.with_name("onnx")


@pytest.fixture(scope="module")
def free(graphs: Path) -> list[ClipResult]:
    """What is said where nothing stops it but the budget."""
    return OnnxEngine(graphs, (), ONE).run(REQUESTS)


def request(frames: int, budget: int, seed: int) -> ClipRequest:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(frames * 160 + seed).astype(np.float32)
    prefix = tuple(rng.integers(0, CONFIG.text.vocab_size, 5 + seed).tolist())
    return ClipRequest(samples, prefix, (3, 4), budget)


SIZES = [(50, 40), (433, 7), (100, 25), (901, 40), (20, 1), (267, 33), (800, 12), (799, 3), (1650, 5), (10, 9)]
REQUESTS = [request(frames, budget, seed) for seed, (frames, budget) in enumerate(SIZES)]


def torch_results(source: Path, stops: set[int], requests: Sequence[ClipRequest]) -> list[ClipResult]:
    network = load_model(source, CONFIG, torch.float32, torch.device("cpu"))
    return TorchEngine(network, stops, CPU).run(requests)


def same(found: ClipResult, expected: ClipResult) -> bool:
    close = np.allclose(found.logprobs, expected.logprobs, atol=1e-4)
    return found.tokens == expected.tokens and found.finish_reason == expected.finish_reason and close


def test_more_clips_than_rows_give_what_torch_gives(source: Path, graphs: Path, free: list[ClipResult]) -> None:
    assert len(REQUESTS) > onnx_engine.MOST_ROWS
    stops = {result.tokens[len(result.tokens) // 2] for result in free[:4]}
    for requests, stop in ((REQUESTS, set()), (REQUESTS, stops)):
        found = OnnxEngine(graphs, stop, ONE).run(requests)
        assert all(map(same, found, torch_results(source, stop, requests)))


def test_alone_as_in_a_batch(graphs: Path, free: list[ClipResult]) -> None:
    engine = OnnxEngine(graphs, (), ONE)
    assert all(same(engine.run([clip])[0], result) for clip, result in zip(REQUESTS, free, strict=True))


def test_prompts_in_slices_give_the_same(graphs: Path, free: list[ClipResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_decoder, "PROMPT_SLICE", 17)
    assert all(map(same, OnnxEngine(graphs, (), ONE).run(REQUESTS), free))


@pytest.mark.parametrize("runtime", [ONE, AHEAD], ids=["in turn", "ahead"])
def test_clips_join_and_leave_while_others_run(graphs: Path, free: list[ClipResult], runtime: Runtime) -> None:
    engine, found = OnnxEngine(graphs, (), runtime), {}
    later = list(enumerate(REQUESTS))
    tickets = {engine.submit(clip, f"file {index % 3}"): index for index, clip in (later.pop(), later.pop(0))}
    while len(found) < len(REQUESTS):
        found.update(engine.step())
        if later:
            index, clip = later.pop()
            tickets[engine.submit(clip, f"file {index % 3}")] = index
    assert all(same(result, free[tickets[ticket]]) for ticket, result in found.items())
    assert engine.step() == []


def test_what_others_submitted_is_not_lost_in_a_run(graphs: Path, free: list[ClipResult]) -> None:
    engine = OnnxEngine(graphs, (), ONE)
    mine = engine.submit(REQUESTS[4], "mine")
    assert same(engine.run(REQUESTS[:1])[0], free[0])
    ((ticket, result),) = engine.step()
    assert (ticket, same(result, free[4])) == (mine, True)


@pytest.mark.parametrize("runtime", [ONE, AHEAD], ids=["in turn", "ahead"])
def test_cancelled_clips_leave_the_others_alone(graphs: Path, free: list[ClipResult], runtime: Runtime) -> None:
    engine = OnnxEngine(graphs, (), runtime)
    tickets = [engine.submit(clip, index % 2) for index, clip in enumerate(REQUESTS[:6])]
    early = [one for _ in range(4) for one in engine.step()]
    engine.cancel(1)
    engine.cancel(tickets[0])
    engine.cancel(Ticket("nobody", 99))
    late: list[Any] = []
    while len(late) < 2:
        late += engine.step()
    assert {ticket for ticket, _ in late} == {tickets[2], tickets[4]} - {ticket for ticket, _ in early}
    assert all(same(result, free[tickets.index(ticket)]) for ticket, result in late)
    assert engine.step() == []


def watched(engine: OnnxEngine, at: dict[int, Any]) -> list[tuple[int, bool]]:
    """Of clips as their encoding begins: length, and whether beside the caller. `at`: what happens then, by length."""
    encode, seen, caller = engine._encoding._encode, [], get_ident()
    assert encode is not None

    def look(samples: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append((len(samples), get_ident() != caller))
        at.get(len(samples), lambda: None)()
        return encode(samples)

    engine._encoding._encode = look
    return seen


@pytest.mark.parametrize("ahead", [True, False])
def test_the_next_clip_is_encoded_while_others_are_decoded(
    graphs: Path, free: list[ClipResult], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Each clip's prompt waits for the encoder to begin on the next one, which without `ahead` it never does."""
    begun = {len(clip.samples): Event() for clip in REQUESTS}
    engine, prefill, met = OnnxEngine(graphs, (), AHEAD if ahead else ONE), onnx_decoder.DecoderGraph.prefill, []
    seen = watched(engine, {length: event.set for length, event in begun.items()})
    following = iter([*list(begun.values())[1:], None])

    def wait(*arguments: Any) -> Any:
        if (event := next(following)) is not None:
            met.append(event.wait(WAIT) if ahead else event.is_set())
        return prefill(*arguments)

    monkeypatch.setattr(onnx_decoder.DecoderGraph, "prefill", wait)
    assert all(map(same, engine.run(REQUESTS), free))
    assert met == [ahead] * (len(REQUESTS) - 1)
    assert seen == [(length, ahead and index > 0) for index, length in enumerate(begun)], "each once"
    engine.close()


def test_what_was_encoded_for_nobody_is_forgotten(graphs: Path, free: list[ClipResult]) -> None:
    engine = OnnxEngine(graphs, (), AHEAD)
    seen = watched(engine, {})
    tickets = [engine.submit(clip) for clip in REQUESTS[:2]]
    assert engine.step() == []
    engine.cancel(tickets[1])
    tickets += [engine.submit(clip) for clip in REQUESTS[2:4]]
    found: dict[Ticket, ClipResult] = {}
    while len(found) < 3:
        found.update(engine.step())
    assert all(same(found[tickets[index]], free[index]) for index in (0, 2, 3))
    beside = [False, True, False, True]
    assert seen == [(len(clip.samples), other) for clip, other in zip(REQUESTS[:4], beside, strict=True)]


def test_an_error_of_the_encoder_s_thread_is_the_caller_s(graphs: Path, free: list[ClipResult]) -> None:
    engine, fails = OnnxEngine(graphs, (), AHEAD), [True]

    def fail() -> None:
        if fails:
            raise MemoryError("no room")

    watched(engine, {len(REQUESTS[1].samples): fail})
    with pytest.raises(ResourceError, match="out of memory on cpu"):
        engine.run(REQUESTS[:3])
    fails.clear()
    assert all(map(same, engine.run(REQUESTS[:3]), free))


def test_an_error_elsewhere_ends_what_was_begun(
    graphs: Path, free: list[ClipResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxEngine(graphs, (), AHEAD)
    seen = watched(engine, {})
    with monkeypatch.context() as patch:
        patch.setattr(onnx_decoder.DecoderGraph, "prefill", lambda *_: 1 / 0)
        for clip in REQUESTS[:2]:
            engine.submit(clip)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert all(map(same, engine.run(REQUESTS[2:5]), free[2:5]))
    assert [beside for _, beside in seen[-3:]] == [False, True, True]


def test_a_loop_ends_its_row_where_it_is_found(graphs: Path) -> None:
    long = [replace(clip, max_new_tokens=150) for clip in REQUESTS[:6]]
    stopped = [replace(clip, stop_loops=True) for clip in long]
    for whole, result in zip(*(OnnxEngine(graphs, (), ONE).run(clips) for clips in (long, stopped)), strict=True):
        loops = [end for end in range(1, 151) if loop_length(whole.tokens[:end])]
        assert result.tokens == whole.tokens[: loops[0] if loops else 150]
        assert result.finish_reason == ("loop" if loops else "length")


def test_info_stats_and_close(graphs: Path) -> None:
    engine = OnnxEngine(graphs, (), ONE, ("a test",))
    assert engine.run([]) == []
    info, stats = engine.info, engine.stats
    assert (info.name, info.device, info.dtype, info.scheme) == ("onnx", "cpu", "fp32", "none")
    assert info.reasons == (
        "a test",
        "one thread",
        "the decoder is ONNX Runtime's: the folder's weights are fp32",
    )
    assert info.weight_bytes == sum(path.stat().st_size for path in graphs.glob("*.data"))
    results = engine.run(REQUESTS[:2])
    assert stats.tokens == sum(len(result.tokens) for result in results)
    assert min(stats.encode_seconds, stats.prefill_seconds, stats.generate_seconds) > 0
    engine.close()
    for call in (lambda: engine.run([]), lambda: engine.submit(REQUESTS[0])):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_budget_ends_where_the_graphs_do(source: Path, tmp_path: Path) -> None:
    short = limited(source, tmp_path, positions=40)
    clip = replace(REQUESTS[0], max_new_tokens=400)
    (result,) = OnnxEngine(short, (), ONE).run([clip])
    prompt = len(clip.prefix) + 7 + len(clip.suffix)
    assert (len(result.tokens), result.finish_reason) == (40 - prompt, "length")


def test_a_clip_beyond_the_graphs_is_one_line(source: Path, tmp_path: Path) -> None:
    engine = OnnxEngine(limited(source, tmp_path, positions=40), (), ONE)
    with pytest.raises(ResourceError, match="a clip of 9 s makes 128 positions and these ONNX graphs have 40"):
        engine.run([REQUESTS[3]])
    assert engine.run([replace(REQUESTS[4], max_new_tokens=1)])[0].finish_reason == "length"


def limited(source: Path, folder: Path, positions: int) -> Path:
    """The graphs of a config that knows so many positions."""
    copy = shutil.copytree(source, folder / "limited")
    raw = json.loads((copy / "config.json").read_text())
    raw.get("thinker_config", raw)["text_config"]["max_position_embeddings"] = positions
    (copy / "config.json").write_text(json.dumps(raw))
    export_folder(copy, folder / "short", ExportOptions("fp32"))
    return folder / "short"


@pytest.mark.parametrize("broken", ["stem.onnx", "encoder.onnx.data", "decoder.onnx"])
def test_a_damaged_folder_is_one_line(graphs: Path, tmp_path: Path, broken: str) -> None:
    copy = shutil.copytree(graphs, tmp_path / "copy")
    (copy / broken).write_bytes((copy / broken).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{broken} is missing or has not"):
        OnnxEngine(copy, (), ONE)


def test_a_graph_with_other_bytes_is_one_line(graphs: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(graphs, tmp_path / "copy")
    size = (copy / "stem.onnx").stat().st_size
    (copy / "stem.onnx").write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match=r"stem\.onnx cannot be loaded .*: export the model again"):
        OnnxEngine(copy, (), ONE)


class Failing:
    """A session whose runs fail."""

    def __init__(self, session: Any, error: Exception) -> None:
        self.io_binding = session.io_binding
        self._error = error

    def run_with_iobinding(self, binding: Any) -> None:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        onnxruntime_pybind11_state.RuntimeException("Failed to allocate memory for requested buffer of size 1"),
        onnxruntime_pybind11_state.Fail("std::bad_alloc"),
    ],
)
def test_memory_that_runs_out_gives_advice_and_the_engine_lives(
    graphs: Path, free: list[ClipResult], error: Exception
) -> None:
    engine = OnnxEngine(graphs, (), ONE)
    network = engine._network
    assert isinstance(network, OnnxNetwork)
    engine._network = replace(network, session=Failing(network.session, error))
    with pytest.raises(ResourceError, match="out of memory on cpu with 2 clips of up to 4 s"):
        engine.run(REQUESTS[:2])
    engine._network = network
    assert same(engine.run(REQUESTS[:1])[0], free[0])


def test_nan_is_an_error_and_not_a_transcript(graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxEngine(graphs, (), ONE)
    nothing = onnx_decoder.likeliest(np.full((1, CONFIG.text.vocab_size), np.nan, np.float32))
    monkeypatch.setattr(onnx_decoder.DecoderGraph, "prefill", lambda *_: nothing)
    with pytest.raises(ModelError, match="NaN"):
        engine.run(REQUESTS[:1])
