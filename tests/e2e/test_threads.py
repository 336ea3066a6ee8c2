"""One transcriber, several threads and several half-read generators: the same text as one call after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import quasr
from quasr.audio.decode import load
from quasr.engine import factory
from quasr.weights.hub import DEMO_FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

RATE = 16_000


@pytest.fixture(scope="module", params=["onnx", "torch", "fast"])
def transcriber(request: pytest.FixtureRequest) -> Iterator[quasr.Transcriber]:
    """The demo model in each engine; `fast` is that of GPUs, with plain kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fast":
            patch.setattr(factory, "_why_not_fast", lambda *_: None)
        engine = "onnx" if request.param == "onnx" else "torch"
        with quasr.load("demo", engine=engine, device="cpu", threads=1) as loaded:
            assert loaded.info.name == request.param
            yield loaded


@pytest.fixture(scope="module")
def clips() -> list[tuple[NDArray[np.float32], int]]:
    samples = load(DEMO_FOLDER.parent / "sample.flac")
    return [(samples[round(start * RATE) :], RATE) for start in (0.0, 1.9, 3.1, 4.0)]


OPTIONS = quasr.TranscribeOptions(piece_seconds=2.0, batch_size=2)


def written(result: quasr.Transcript | quasr.QuasrError) -> list[tuple[str, float]]:
    assert isinstance(result, quasr.Transcript)
    return [(segment.text, segment.start) for segment in result.segments]


@pytest.mark.slow
def test_threads_and_generators(transcriber: quasr.Transcriber, clips: list[tuple[NDArray[np.float32], int]]) -> None:
    expected = [written(one) for one in transcriber.transcribe_batch(clips, OPTIONS)]
    assert [bool(one) for one in expected] == [True] * 4
    assert len(expected[0]) > 2
    start = threading.Barrier(6)

    def work(number: int) -> list[list[tuple[str, float]]]:
        start.wait()
        if number % 3 == 0:
            return [written(one) for one in transcriber.transcribe_batch(clips, OPTIONS)]
        if number % 3 == 1:
            return [written(transcriber.transcribe(clip, OPTIONS)) for clip in clips]
        return [[(one.text, one.start) for one in transcriber.stream_segments(clip, OPTIONS)] for clip in clips]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [expected] * 6
    found: list[list[tuple[str, float]]] = [[] for _ in clips]
    open_ones = dict(enumerate(transcriber.stream_segments(clip, OPTIONS) for clip in clips))
    while open_ones:
        for index, segments in list(open_ones.items()):
            segment = next(segments, None)
            if segment is None:
                del open_ones[index]
            else:
                found[index].append((segment.text, segment.start))
    assert found == expected
