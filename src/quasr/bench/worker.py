"""One system measured in a process of its own: `python -m quasr.bench.worker`, started by `quasr bench`.

Reads a job as JSON from standard input and writes what it found as JSON to the file that it is given.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from quasr.bench.bandwidth import measure_bandwidth
from quasr.bench.job import Batch, Job, Measurement, Start
from quasr.bench.subjects import PEER, require_packages
from quasr.bench.systems import QuasrSystem
from quasr.engine.device import choose, peak_memory
from quasr.errors import QuasrError
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from quasr.bench.systems import System

LONGEST = 20.0
"""Seconds of repeated calls after which no more are made, if there are fewer than the job allows."""

LOUDNESS = 0.1


def measure(job: Job) -> Measurement:
    """Loads the system and times it. Raises whatever that raises."""
    # Imports come before the clock.
    make = _maker(job)
    started = time.perf_counter()
    system = make()
    loaded = time.perf_counter()
    ready = time.time() - job.spawned
    system.prepare(clips(job, 1), job.tokens)()
    start = Start(ready, loaded - started, time.perf_counter() - loaded)
    info = system.info
    found = Measurement(
        start, info.name, info.device, info.dtype, info.scheme, info.weight_bytes, system.token_bytes, info.reasons
    )
    return found if job.task == "first" else _timed(found, system, job)


def _maker(job: Job) -> Callable[[], System]:
    """With all imported that it needs."""
    if not job.system.startswith(PEER):
        return lambda: QuasrSystem(job)
    peer = replace(job, system=job.system.removeprefix(PEER))
    require_packages(peer.system)
    from quasr.bench.peers import TransformersSystem

    return lambda: TransformersSystem(peer)


def _timed(found: Measurement, system: System, job: Job) -> Measurement:
    """Two calls that differ in their tokens alone tell the time of a token, and what comes before the second."""
    one, all_ = (median_seconds(system.prepare(clips(job, 1), tokens), job.repeats) for tokens in (1, job.tokens))
    token = (all_ - one) / (job.tokens - 1)
    return replace(found, prefill=one, token=token, batches=tuple(_batches(system, job)))


def _batches(system: System, job: Job) -> Iterator[Batch]:
    """A batch that fails says why, and larger ones are not tried."""
    for size in job.batches:
        try:
            yield _batch(system, job, size)
        except Exception as error:  # a peer may fail with anything, and what was measured before it counts
            yield Batch(size, error=one_line(error))
            return


def _batch(system: System, job: Job, size: int) -> Batch:
    device = system.info.device
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(system.prepare(clips(job, size), job.tokens), job.repeats)
    host, gpu = peak_memory(device)
    return Batch(size, seconds, host if gpu is None else gpu)


def median_seconds(call: Callable[[], None], repeats: int) -> float:
    """The median of at most `repeats` calls, after one that is not counted."""
    call()
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < LONGEST:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def clips(job: Job, count: int) -> Sequence[NDArray[np.float32]]:
    """Noise, the same in every process; each clip is that of another moment. Views, so that many cost nothing."""
    length = round(job.seconds * SAMPLE_RATE)
    noise = np.random.default_rng(0).standard_normal(length + count, dtype=np.float32) * np.float32(LOUDNESS)
    return [noise[start : start + length] for start in range(count)]


def one_line(error: Exception) -> str:
    """Ours as they are, others with their class; never more than a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QuasrError) else f"{type(error).__name__}: {text[:250]}"


def _answer(job: Job) -> str:
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.task == "bandwidth":
        return json.dumps(asdict(measure_bandwidth(choose(job.device).device)))
    return measure(job).to_json()


def main() -> int:
    """Exit code 0 with an answer in the file, or not 0 and the reason as the last line on standard error."""
    answer, job = Path(sys.argv[1]), Job.from_json(sys.stdin.read())
    try:
        answer.write_text(_answer(job), encoding="utf-8")
    except Exception as error:  # whatever a peer raises becomes the reason of its row
        if not isinstance(error, QuasrError):
            traceback.print_exc()
        sys.stderr.write(f"{one_line(error)}\n")
        return error.exit_code if isinstance(error, QuasrError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
