"""What graphs repeat: the padded encoder and prefill give what the plain ones give. Graphs themselves need a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
import torch.nn.functional as F

from quasr.engine import fast_engine, streams
from quasr.engine.fast import FastDecoder
from quasr.engine.fast_audio import FastEncoder
from quasr.engine.graphs import (
    FEW_TOKENS,
    MOST_GRAPHS,
    PACKED_PROMPTS,
    PACKED_TOKENS,
    WINDOW_ROWS,
    GraphedEncoder,
    GraphedPrefill,
    GraphMemory,
    Graphs,
)
from quasr.engine.steps import Steps
from quasr.kernels import reference
from quasr.kernels.dispatch import choose, plain
from quasr.model.config import AudioConfig, TextConfig
from quasr.model.decoder import Decoder
from quasr.model.encoder import AudioEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quasr.kernels.matrix import Heads
    from quasr.kernels.state import CachePool, Places, Prompts

AUDIO = AudioConfig(layers=2, width=32, heads=2, ffn=64, output=48, mel_bins=16, stem_channels=8)
TEXT = TextConfig(vocab_size=61, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64)
GPU_TEXT = TextConfig(vocab_size=61, hidden=256, layers=3, heads=4, kv_heads=2, head_dim=64, ffn=512)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Recorder:
    """Stands for `Graphs`: runs the function, and notes the shapes of its inputs."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.all_shapes: list[tuple[torch.Size, ...]] = []

    def __call__(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            self.shapes.append(inputs[0].shape)
            self.all_shapes.append(tuple(one.shape for one in inputs))
            return function(*inputs)

        return run


FULL = AUDIO.window_chunks * AUDIO.chunk_tokens


@pytest.mark.parametrize("frames", [[3000], [95], [801, 30, 2500], [800, 1600], [100] * 9, [5] * 9])
@torch.inference_mode()
def test_padded_encoding_is_encoding(frames: list[int]) -> None:
    torch.manual_seed(len(frames))
    encoder, recorder = AudioEncoder(AUDIO).eval(), Recorder()
    mel = torch.randn(sum(frames), AUDIO.mel_bins)
    fast = FastEncoder.from_model(encoder, plain("a test"))
    found = GraphedEncoder(fast, recorder).encode(mel, frames)
    torch.testing.assert_close(found, encoder.encode(mel, frames), rtol=1e-4, atol=1e-5)
    assert {shape[0] for shape in recorder.shapes} <= {fast.slice, *(FULL * rows for rows in WINDOW_ROWS)}


@torch.inference_mode()
def test_more_windows_than_any_graph_has_run_plainly() -> None:
    torch.manual_seed(1)
    encoder, recorder = AudioEncoder(AUDIO).eval(), Recorder()
    frames = [AUDIO.window_frames] * (WINDOW_ROWS[-1] + 1)
    mel = torch.randn(sum(frames), AUDIO.mel_bins)
    fast = FastEncoder.from_model(encoder, plain("a test"))
    found = GraphedEncoder(fast, recorder).encode(mel, frames)
    torch.testing.assert_close(found, encoder.encode(mel, frames), rtol=1e-4, atol=1e-5)
    assert {shape[0] for shape in recorder.shapes} == {fast.slice}


@pytest.mark.parametrize("lengths", [[128], [5, 40, 90], [700, 1], [900, 200]])
@torch.inference_mode()
def test_padded_prefill_is_prefill(lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    decoder, recorder = FastDecoder.from_model(Decoder(TEXT).eval(), plain("a test")), Recorder()
    x, offsets = torch.randn(sum(lengths), TEXT.hidden), [3 + sum(lengths[:i]) + 7 * i for i in range(len(lengths))]
    caches = [decoder.allocate_cache(sum(lengths) + 40) for _ in range(2)]
    for cache in caches:
        cache.keys.fill_(7)
    found = GraphedPrefill(decoder, recorder).prefill(x.clone(), lengths, offsets, caches[0])
    torch.testing.assert_close(found, decoder.prefill(x, lengths, offsets, caches[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[0].values, caches[1].values, rtol=1e-4, atol=1e-5)
    assert {shape[0] for shape in recorder.shapes} <= set(FEW_TOKENS)


def attend_by_device(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prompts: Prompts, heads: Heads
) -> torch.Tensor:
    """The reference for prompts that only the device knows. Tokens behind the last one get NaN."""
    assert prompts.lengths == ()
    *lengths, rest = prompts.starts.diff(append=torch.tensor([len(q)])).tolist()
    real = [length for length in lengths if length]
    known = replace(prompts, lengths=tuple(real), offsets=tuple(prompts.begins.tolist()[: len(real)]))
    mixed = reference.attend_prompts(q[: len(q) - rest], keys, values, known, heads)
    return F.pad(mixed, (0, 0, 0, rest), value=torch.nan)


WHOLE = [[128], [1, 17, 64, 65], [700, 330, 1], [407] * 4, [300] * 17]


@pytest.mark.parametrize("lengths", WHOLE, ids=str)
@torch.inference_mode()
def test_whole_prompts_in_a_graph_are_prefill(lengths: list[int]) -> None:
    """Hidden states, and what is in the cache: nothing of idle tokens, and all else untouched."""
    torch.manual_seed(len(lengths))
    model, recorder = Decoder(TEXT).eval(), Recorder()
    decoder = FastDecoder.from_model(model, plain("a test"))
    whole = FastDecoder.from_model(model, replace(plain("a test"), attend_prompts=attend_by_device))
    x, offsets = torch.randn(sum(lengths), TEXT.hidden), [3 + sum(lengths[:i]) + 7 * i for i in range(len(lengths))]
    caches = [decoder.allocate_cache(offsets[-1] + lengths[-1] + 5) for _ in range(2)]
    for cache in caches:
        cache.keys.fill_(7)
    prefill = GraphedPrefill(whole, recorder)
    # With what lies behind the last prompt, which nobody may see.
    given = torch.randn(prefill.rows_for(lengths), TEXT.hidden)
    given[: len(x)] = x
    found = prefill.prefill(given, lengths, offsets, caches[0])
    torch.testing.assert_close(found, decoder.prefill(x, lengths, offsets, caches[1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[0].values, caches[1].values, rtol=1e-5, atol=1e-5)
    assert [shape[0] for shape in recorder.shapes] == [next(size for size in PACKED_TOKENS if size >= sum(lengths))]


@torch.inference_mode()
def test_parts_of_similar_lengths_share_a_shape() -> None:
    recorder = Recorder()
    kernels = replace(plain("a test"), attend_prompts=attend_by_device)
    decoder = FastDecoder.from_model(Decoder(TEXT).eval(), kernels)
    cache = decoder.allocate_cache(1800)
    prefill = GraphedPrefill(decoder, recorder)
    for lengths in ([407] * 4, [300, 500, 750], [1600, 1]):
        offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        assert len(prefill.prefill(torch.randn(sum(lengths), TEXT.hidden), lengths, offsets, cache)) == len(lengths)
    assert len(set(recorder.all_shapes)) == 1


@torch.inference_mode()
def test_what_a_graph_of_prompts_holds_reads_nothing_on_the_host() -> None:
    """On tensors without numbers, of which every read raises; the two kernels of attention have stand-ins."""
    meta = torch.device("meta")
    given: list[object] = []

    def rotate(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: Places, heads: Heads) -> torch.Tensor:
        given.append((places.offsets.shape, places.lengths.shape, places.idle.dtype))
        return x[:, : heads.query_width]

    def attend(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prompts: Prompts, heads: Heads
    ) -> torch.Tensor:
        given.append((prompts.starts.shape, prompts.begins.shape))
        return q

    kernels = replace(plain("a test"), rotate_write=rotate, attend_prompts=attend)
    decoder = FastDecoder.from_model(Decoder(TEXT).eval().to(meta), kernels)
    prefill = GraphedPrefill(decoder, Recorder())
    lengths = [500, 600]
    found = prefill.prefill(
        torch.empty(1100, TEXT.hidden, device=meta), lengths, [0, 500], decoder.allocate_cache(1100)
    )
    assert found.shape == (2, TEXT.hidden)
    layer = [((1280,), (1280,), torch.bool), ((5,), (4,))]
    assert given == layer * TEXT.layers


@pytest.mark.parametrize(
    "lengths", [[PACKED_TOKENS[-1] + 1], [1] * (PACKED_PROMPTS[-1] + 1)], ids=["tokens", "prompts"]
)
@torch.inference_mode()
def test_more_than_any_graph_has_is_prefilled_plainly(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, recorder, asked = replace(plain("a test"), attend_prompts=attend_by_device), Recorder(), []
    decoder = FastDecoder.from_model(Decoder(TEXT).eval(), kernels)
    monkeypatch.setattr(decoder, "prefill", lambda *given: asked.append(given))
    given = torch.zeros(sum(lengths), TEXT.hidden), lengths, [0] * len(lengths), decoder.allocate_cache(1)
    GraphedPrefill(decoder, recorder).prefill(*given)
    assert asked == [given]
    assert recorder.shapes == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_graphs_of_prompts_give_what_prefill_gives(dtype: torch.dtype) -> None:
    """Two shapes in one memory, by turns; each is captured when it comes again. Results are read before the next."""
    device = torch.device("cuda")
    decoder = FastDecoder.from_model(Decoder(GPU_TEXT).to(device, dtype).eval(), choose(device, dtype))
    caches = [decoder.allocate_cache(5000) for _ in range(2)]
    prefill = GraphedPrefill(decoder, partial(Graphs, memory=GraphMemory()))
    for turn in range(4):
        for lengths in ([407 - turn] * 4, [33 + turn, 900, 1], [700 + turn] * 6):
            x = torch.randn(sum(lengths), GPU_TEXT.hidden, device=device)
            offsets = [5 + sum(lengths[:i]) for i in range(len(lengths))]
            found = prefill.prefill(x, lengths, offsets, caches[0])
            expected = decoder.prefill(x, lengths, offsets, caches[1])
            assert (found - expected).norm() / expected.norm() < 0.02
            for got, other in zip((caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values), strict=True):
                assert (got - other).float().norm() / other.float().norm() < 0.02
    assert len(cast("Graphs", prefill._run)._captured) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_that_share_memory_hold_their_inputs_once() -> None:
    memory = GraphMemory()
    first, second = Graphs(torch.sin, memory), Graphs(lambda x: x.cos().square(), memory)
    for size in (1 << 20, 1 << 19, 1 << 18):
        x = torch.rand(size, device="cuda")
        for _ in range(3):
            torch.testing.assert_close(first(x), x.sin())
            torch.testing.assert_close(second(x), x.cos().square())
    inputs = {static[0].untyped_storage().data_ptr() for _, static, _ in first._captured.values()}
    assert len(inputs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shapes_beyond_the_most_run_plainly() -> None:
    runs = []

    def function(x: torch.Tensor) -> torch.Tensor:
        runs.append(len(x))
        return x + 1

    graphs = Graphs(function, GraphMemory())
    for size in range(1, MOST_GRAPHS + 3):
        for _ in range(4):
            assert float(graphs(torch.full((size,), 2.0, device="cuda"))[-1]) == 3
    assert [runs.count(size) for size in range(1, MOST_GRAPHS + 3)] == [2] * MOST_GRAPHS + [4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_gives_what_the_function_gives() -> None:
    runs = []

    def function(x: torch.Tensor) -> torch.Tensor:
        runs.append(x.shape)
        return (x @ x.T).relu()

    graphs = Graphs(function, GraphMemory())
    for size in (4, 4, 4, 6, 4):
        x = torch.randn(size, 8, device="cuda")
        torch.testing.assert_close(graphs(x), (x @ x.T).relu())
    assert [shape[0] for shape in runs] == [4, 4, 6]


def test_an_engine_works_and_captures_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own device, made once: another would have a workspace of its own."""
    used: list[str] = []

    @contextmanager
    def note(stream: str) -> Iterator[None]:
        used.append(stream)
        yield

    made = iter("abc")
    monkeypatch.setattr(streams, "work_stream", lru_cache(lambda device: f"{next(made)} of {device}"))
    monkeypatch.setattr(fast_engine, "work_stream", streams.work_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: note(stream))
    monkeypatch.setattr(torch.cuda, "stream", note)
    with fast_engine._current(torch.device("cuda", 1)):
        assert streams.capture(lambda: 3, None)[1] == 3
    assert used == ["a of 1", "a of 1"]


def test_graphs_are_dropped_when_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued graph whose memory has gone reads where nothing is."""
    steps = Steps(cast("FastDecoder", None), graphs=True)
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: held.append(len(steps._graphs)))
    steps.forget()
    assert held == []
    steps._graphs[1] = cast("torch.cuda.CUDAGraph", None)
    steps.forget()
    assert held == [1]
    assert not steps._graphs


def test_prompt_graphs_are_dropped_when_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: without graphs there is nothing to wait for."""
    prefill, held = GraphedPrefill(cast("FastDecoder", None), Recorder()), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: held.append(prefill._run is not None))
    prefill._cache = cast("CachePool", SimpleNamespace(keys=SimpleNamespace(is_cuda=True)))
    prefill._run = torch.relu
    for _ in range(2):
        prefill.forget()
    assert held == [True]
    assert prefill._run is None
