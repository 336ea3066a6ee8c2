"""The figures as a table for people, and as JSON with machine, versions and commit for whoever runs it again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasr.errors import OptionError

if TYPE_CHECKING:
    from quasr.bench.job import Bandwidth, Batch, Job, Start
    from quasr.bench.run import Row

PACKAGES = ("quasr", "torch", "triton", "transformers", "bitsandbytes", "accelerate", "onnxruntime", "numpy")

LEGEND = (
    "load: reading the weights; ready: from the start of the process until loaded; first: the first call, with one "
    "clip; cold: without compiled kernels on disk; all in seconds",
    "prefill: one clip, from samples to its first token; peers get their mel frames ready made",
    "ms/token: each further token; bandwidth: weights that it reads, over its time, as a share of what was measured",
    "xN: audio seconds a second with N clips at once",
    "peakN: most memory with N clips, on a GPU above the weights, on a CPU of the whole process",
)


@dataclass(frozen=True, slots=True)
class Report:
    """All of one run. `model`: the folder or shape; `arguments`: the command line."""

    model: str
    job: Job
    bandwidth: Bandwidth
    rows: tuple[Row, ...]
    arguments: tuple[str, ...]

    def columns(self) -> tuple[str, ...]:
        """The table's header."""
        speeds = [f"x{size}" for size in self.job.batches]
        peaks = [f"peak{size} MB" for size in self.job.batches]
        return (
            "system", "dtype", "load", "ready cold", "ready warm", "first cold", "first warm", "prefill ms", "ms/token",
            "bandwidth", *speeds, "weights MB", *peaks,
        )  # fmt: skip

    def cells(self, row: Row) -> tuple[str, ...]:
        """What stands under the columns; of a failure the name and the reason."""
        found, cold = row.measured, row.cold
        if found is None:
            return (row.system, f"failed: {row.error}")
        share = self.share(row)
        return (
            row.system,
            found.dtype if found.scheme == "none" else f"{found.scheme} in {found.dtype}",
            f"{found.start.load:.2f}",
            *_starts(cold, found.start),
            _milliseconds(found.prefill),
            _milliseconds(found.token),
            "-" if share is None else f"{share:.0%}",
            *(_rounded(self.speed(one)) for one in self._batches(row)),
            f"{found.weight_bytes / 1e6:.0f}",
            *(_rounded(self.peak(row, one), 1e6) for one in self._batches(row)),
        )

    def share(self, row: Row) -> float | None:
        """Of the measured bandwidth: bytes of weights that a token reads, over its time."""
        found = row.measured
        if found is None or not found.token or found.token < 0:
            return None
        return found.token_bytes / found.token / self.bandwidth.bytes_per_second

    def speed(self, batch: Batch | None) -> float | None:
        """Audio seconds a second."""
        return None if batch is None or not batch.seconds else batch.clips * self.job.seconds / batch.seconds

    def peak(self, row: Row, batch: Batch | None) -> int | None:
        """Bytes: on a GPU over the weights, on a CPU of the whole process."""
        found = row.measured
        if found is None or batch is None or batch.peak is None:
            return None
        return batch.peak - found.weight_bytes if found.device.startswith("cuda") else batch.peak

    def problems(self) -> list[str]:
        """A line for each system, and for each batch size, that failed."""
        whole = [f"{row.system} failed: {row.error}" for row in self.rows if row.error]
        return whole + [
            f"{row.system} failed with {one.clips} clips at once: {one.error}"
            for row in self.rows
            for one in (row.measured.batches if row.measured else ())
            if one.error
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "command": shlex.join(self.arguments),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(self.bandwidth.device),
            "versions": {name: found for name in PACKAGES if (found := installed(name))},
            "model": self.model,
            "clips": {"seconds": self.job.seconds, "tokens": self.job.tokens, "repeats": self.job.repeats},
            "bandwidth": asdict(self.bandwidth),
            "rows": [self._row(row) for row in self.rows],
        }

    def _batches(self, row: Row) -> list[Batch | None]:
        """In the order of the columns; None for what was not tried."""
        found = {one.clips: one for one in row.measured.batches} if row.measured else {}
        return [found.get(size) for size in self.job.batches]

    def _row(self, row: Row) -> dict[str, Any]:
        if row.measured is None:
            return {"system": row.system, "error": row.error}
        batches = [{**asdict(one), "audio_seconds_per_second": self.speed(one)} for one in row.measured.batches]
        cold = asdict(row.cold) if row.cold else None
        return {
            "system": row.system,
            **asdict(row.measured),
            "cold": cold,
            "bandwidth_share": self.share(row),
            "batches": batches,
        }


def _starts(cold: Start | None, warm: Start) -> tuple[str, ...]:
    """Seconds until it is ready, and of the first call: cold and warm."""
    pairs = ((cold and cold.ready, warm.ready), (cold and cold.first, warm.first))
    return tuple("-" if seconds is None else f"{seconds:.2f}" for pair in pairs for seconds in pair)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def _rounded(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.3g}" if value / unit < 100 else f"{value / unit:.0f}"


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    return {
        "device": device,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the source tree that this package runs from, with "+changes" where files differ; None outside of one."""
    here = Path(__file__).resolve().parent
    done = _git(here, "rev-parse", "HEAD")
    if done is None or _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return f"{done}+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else done


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, encoding="utf-8", check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(path: Path, report: Report) -> None:
    """Raises OptionError where that fails."""
    try:
        path.write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}): choose another place") from error
