"""What graphs repeat: the padded encoder and prefill give what the plain ones give. Graphs themselves need a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from quasr.engine.fast import FastDecoder
from quasr.engine.fast_audio import FastEncoder
from quasr.engine.graphs import PROMPT_TOKENS, WINDOW_ROWS, GraphedEncoder, GraphedPrefill, Graphs
from quasr.engine.steps import Steps
from quasr.kernels.dispatch import plain
from quasr.model.config import AudioConfig, TextConfig
from quasr.model.decoder import Decoder
from quasr.model.encoder import AudioEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from quasr.kernels.state import CachePool

AUDIO = AudioConfig(layers=2, width=32, heads=2, ffn=64, output=48, mel_bins=16, stem_channels=8)
TEXT = TextConfig(vocab_size=61, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Recorder:
    """Stands for `Graphs`: runs the function, and notes the shapes of its inputs."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            self.shapes.append(inputs[0].shape)
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
    found = GraphedPrefill(decoder, recorder).prefill(x, lengths, offsets, caches[0])
    torch.testing.assert_close(found, decoder.prefill(x, lengths, offsets, caches[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caches[0].values, caches[1].values, rtol=1e-4, atol=1e-5)
    assert {shape[0] for shape in recorder.shapes} <= set(PROMPT_TOKENS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_gives_what_the_function_gives() -> None:
    runs = []

    def function(x: torch.Tensor) -> torch.Tensor:
        runs.append(x.shape)
        return (x @ x.T).relu()

    graphs = Graphs(function)
    for size in (4, 4, 4, 6, 4):
        x = torch.randn(size, 8, device="cuda")
        torch.testing.assert_close(graphs(x), (x @ x.T).relu())
    assert [shape[0] for shape in runs] == [4, 4, 6]


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
