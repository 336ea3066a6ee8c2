"""The stages of one clip: arithmetic on an engine made by hand, and the bundled graphs once."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from quasr.bench import reading
from quasr.bench.stages import main, measure
from quasr.engine.base import ClipRequest, EngineStats
from quasr.pipeline.onnx import DEMO_GRAPHS


class Counting:
    """Each call takes 20 ms for the encoder, 10 for the prompt, and 3 a token, by its own count."""

    def __init__(self) -> None:
        self.stats, self.calls = EngineStats(encode_seconds=5.0), 0

    def run(self, requests: list[ClipRequest]) -> list[Any]:
        self.calls += 1
        tokens = requests[0].max_new_tokens
        self.stats.encode_seconds += 0.020
        self.stats.prefill_seconds += 0.010
        self.stats.generate_seconds += 0.003 * (tokens - 1)
        return [SimpleNamespace(tokens=[7] * tokens)]


def test_stages_are_what_one_call_adds() -> None:
    engine = Counting()
    found = measure(cast("Any", engine), ClipRequest(np.zeros(16_000, np.float32), (1,), (2,), 5), 3)
    assert (engine.calls, len(found)) == (4, 3)
    for one in found:
        assert [one.encoder, one.prefill, one.token] == pytest.approx([20, 10, 3])


@pytest.mark.slow
def test_the_bundled_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DEMO_GRAPHS), "--seconds", "1", "--tokens", "3", "--repeats", "1", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    least, median = found["least"], found["median"]
    assert found["engine"] == "onnx"
    assert all(0 < least[name] <= median[name] for name in ("encoder", "prefill", "token", "seconds"))
    assert least["seconds"] * 1000 + 1 >= least["encoder"] + least["prefill"] + least["token"]
    assert found["weights_mb"] == 21
    assert 0 < found["read_gbs_median"] <= found["read_gbs"]
    size = (DEMO_GRAPHS / "decoder.onnx.data").stat().st_size / 1e6
    assert found["times_limit"] == pytest.approx(least["token"] * found["read_gbs"] / size, rel=0.01)


def test_reading_takes_as_long_as_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.5, 1.0, 1.25, *(number for n in range(2, 6) for number in (n * 10.0, n * 10.0 + 1))])
    monkeypatch.setattr(reading.time, "perf_counter", lambda: next(ticks))
    assert reading.measure_reading(2, 1000).speed == 1000 / 0.25


def test_without_a_compiler_numpy_reads_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no such compiler")
    found = reading.measure_reading(2, 1 << 20)
    assert found.speed > 0
    assert found.method.startswith("1 MiB by 2 threads, each in order, for want of C (CC is 'no such compiler'")
