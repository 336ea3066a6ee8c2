"""The systems one after the other, each in processes of its own: one with cold kernel caches, one with warm ones."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quasr.bench.job import Bandwidth, Measurement
from quasr.errors import OptionError
from quasr.evaluation.process import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from quasr.bench.job import Job, Start

WORKER = "quasr.bench.worker"

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")
"""Environment variables that say where compiled kernels are kept; the last one is for quasr's own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system. `cold`: the start with empty kernel caches, where it was asked for. A failure has `error` alone."""

    system: str
    error: str | None = None
    cold: Start | None = None
    measured: Measurement | None = None


def bandwidth(job: Job) -> Bandwidth:
    """Of the job's device. Raises OptionError with the reason where that cannot be measured."""
    found = ask(WORKER, replace(job, task="bandwidth").to_json())
    if found.text is None:
        raise OptionError(f"the memory bandwidth cannot be measured: {found.error}")
    return Bandwidth(**json.loads(found.text))


def bench(job: Job, systems: Sequence[str], told: Callable[[str], None], *, cold: bool = True) -> Iterator[Row]:
    """A row for each system, in order and as it is done; one that fails says why and does not stop the others.

    `job.system` is replaced by each. `told` gets the name of a system when it starts. Without `cold` there is one
    process for each, with the caches that are there.
    """
    for system in systems:
        told(system)
        yield (_row if cold else _warm_row)(replace(job, system=system))


def _warm_row(job: Job) -> Row:
    warm = _measure(replace(job, task="all"), {})
    return Row(job.system, error=warm) if isinstance(warm, str) else Row(job.system, measured=warm)


def _row(job: Job) -> Row:
    with tempfile.TemporaryDirectory(prefix="quasr-kernels-") as folder:
        environment = dict.fromkeys(CACHES, folder)
        cold = _measure(replace(job, task="first"), environment)
        if isinstance(cold, str):
            return Row(job.system, error=cold)
        warm = _measure(replace(job, task="all"), environment)
    if isinstance(warm, str):
        return Row(job.system, error=warm, cold=cold.start)
    return Row(job.system, cold=cold.start, measured=warm)


def _measure(job: Job, environment: dict[str, str]) -> Measurement | str:
    """The measurement, or in one line why there is none."""
    found = ask(WORKER, replace(job, spawned=time.time()).to_json(), environment)
    return found.error if found.text is None else Measurement.from_json(found.text)
