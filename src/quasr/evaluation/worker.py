"""One precision measured in a process of its own: `python -m quasr.evaluation.worker`, started by `compare`.

Reads a job as JSON from standard input and writes the measurement as JSON to the file that the job names.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quasr.errors import QuasrError
from quasr.evaluation.process import end_at_interrupt
from quasr.types import TranscribeOptions

if TYPE_CHECKING:
    from quasr.evaluation.manifest import Clip
    from quasr.evaluation.run import Outcome
    from quasr.pipeline.transcriber import Transcriber


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure. `hub`: hub, revision and offline as HubOptions has them; paths are absolute."""

    model: str
    precision: str
    device: str
    clips: tuple[Clip, ...]
    options: TranscribeOptions
    hub: dict[str, Any]
    threads: int | None = None

    def to_json(self) -> str:
        """For `from_json`."""
        clips = [{**asdict(clip), "path": str(clip.path)} for clip in self.clips]
        return json.dumps({**asdict(self), "clips": clips})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        from quasr.evaluation.manifest import Clip

        raw = json.loads(text)
        clips = tuple(Clip(**{**clip, "path": Path(clip["path"])}) for clip in raw["clips"])
        return cls(**{**raw, "clips": clips, "options": TranscribeOptions(**raw["options"])})


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds, bytes, and what came of each clip. `peak_gpu` None on a CPU, `peak_host` None on Windows.

    `outcomes` holds the clips' fields in the order of the job: see `Outcome`.
    """

    device: str
    dtype: str
    scheme: str
    load_seconds: float
    weight_bytes: int
    peak_host: int | None
    peak_gpu: int | None
    prefill_seconds: float
    generate_seconds: float
    tokens: int
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> str:
        """For `from_json`, which gets the clips from the job."""
        bare = [asdict(replace(one, clip=None)) for one in self.outcomes]  # type: ignore[arg-type]
        return json.dumps({**{name: getattr(self, name) for name in self.__slots__}, "outcomes": bare})

    @classmethod
    def from_json(cls, text: str, job: Job) -> Measurement:
        """What `to_json` wrote, of the same job."""
        raw = json.loads(text)
        pairs = zip(job.clips, raw["outcomes"], strict=True)
        return cls(**{**raw, "outcomes": tuple(_outcome(clip, one) for clip, one in pairs)})


def _outcome(clip: Clip, raw: dict[str, Any]) -> Outcome:
    from quasr.evaluation.run import Outcome
    from quasr.evaluation.score import Edits, Score

    score = raw["score"]
    if score is not None:
        score = Score(Edits(**score["words"]) if score["words"] else None, Edits(**score["characters"]))
    return Outcome(**{**raw, "clip": clip, "score": score})


def measure(job: Job) -> Measurement:
    """Loads, transcribes and scores. Raises what `load` and `transcribe` raise."""
    from quasr.evaluation.run import evaluate
    from quasr.pipeline.transcriber import load
    from quasr.weights.hub import HubOptions

    _set_threads(job.threads)
    started = time.perf_counter()
    hub = HubOptions(**job.hub)
    # One engine for all, so that precisions differ by nothing else.
    with load(job.model, engine="torch", device=job.device, compute_type=job.precision, hub=hub) as transcriber:
        loaded = time.perf_counter() - started
        outcomes = evaluate(transcriber, job.clips, job.options)
        return _measurement(transcriber, loaded, tuple(outcomes))


def _measurement(transcriber: Transcriber, loaded: float, outcomes: tuple[Outcome, ...]) -> Measurement:
    from quasr.engine.device import peak_memory

    info, stats = transcriber.info, transcriber.stats
    host, gpu = peak_memory(info.device)
    return Measurement(
        device=info.device,
        dtype=info.dtype,
        scheme=info.scheme,
        load_seconds=loaded,
        weight_bytes=info.weight_bytes,
        peak_host=host,
        peak_gpu=gpu,
        prefill_seconds=stats.encode_seconds + stats.prefill_seconds,
        generate_seconds=stats.generate_seconds,
        tokens=stats.tokens,
        outcomes=outcomes,
    )


def _set_threads(count: int | None) -> None:
    """Imports torch in any case, so that its import is no part of the load time."""
    from importlib import import_module

    from quasr.engine.device import choose

    choose("cpu")
    if count is not None:
        import_module("torch").set_num_threads(count)


def main() -> int:
    """Exit code 0 with a measurement in the file, or the error's own with its line on standard error."""
    answer, job = Path(sys.argv[1]), Job.from_json(sys.stdin.read())
    try:
        answer.write_text(measure(job).to_json(), encoding="utf-8")
    except QuasrError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    end_at_interrupt()
    sys.exit(main())
