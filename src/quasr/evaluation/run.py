"""Runs every clip of a manifest and sums up: overall and for each subset."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from quasr.errors import AudioError
from quasr.evaluation.score import Edits, Score, loops, require_packages, score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from quasr.evaluation.manifest import Clip
    from quasr.pipeline.transcriber import Transcriber
    from quasr.types import TranscribeOptions, Transcript


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one clip. `score` is None without a reference, and where the audio failed (`error`)."""

    clip: Clip
    hypothesis: str = ""
    language: str = ""
    finish_reason: str = ""
    score: Score | None = None
    loop: bool = False
    seconds: float = 0.0
    wall: float = 0.0
    error: str | None = None

    @property
    def empty(self) -> bool:
        """The audio was read, and the model found no speech in it."""
        return self.error is None and not self.hypothesis

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.clip.name,
            "subset": self.clip.subset,
            "reference": self.clip.reference,
            "hypothesis": self.hypothesis,
            "language": self.language,
            "finish_reason": self.finish_reason,
            "wer": self.score.words.rate if self.score and self.score.words else None,
            "cer": self.score.characters.rate if self.score else None,
            "loop": self.loop,
            "seconds": round(self.seconds, 3),
            "wall": round(self.wall, 4),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """Sums over clips. `words` leaves out languages without spaces; `real_time_factor` is wall over audio seconds."""

    clips: int
    scored: int
    words: Edits
    characters: Edits
    empty: int
    repeated: int
    cut: int
    failed: int
    seconds: float
    wall: float

    @property
    def edits(self) -> Edits:
        """Edits over words, or over characters where no clip has words."""
        return self.words if self.words.units else self.characters

    @property
    def real_time_factor(self) -> float:
        return self.wall / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the rates."""
        rates = {"wer": self.words.rate, "cer": self.characters.rate, "real_time_factor": self.real_time_factor}
        return {**asdict(self), **rates}


def evaluate(
    transcriber: Transcriber,
    clips: Sequence[Clip],
    options: TranscribeOptions,
    progress: Callable[[float], None] | None = None,
) -> list[Outcome]:
    """Transcribes and scores all clips, in their order. They run longest first, so that batches are of like lengths.

    Second tries keep to the weights that are measured: 16-bit ones would lend them their texts and add their memory.
    Raises MissingDependencyError, before any work, where a scoring package is missing.
    """
    require_packages()
    options = replace(options, precise_retry=False)
    order = sorted(range(len(clips)), key=lambda index: clips[index].size, reverse=True)
    results = transcriber.transcribe_batch([clips[index].path for index in order], options, progress=progress)
    outcomes = {index: outcome(clips[index], result) for index, result in zip(order, results, strict=True)}
    return [outcomes[index] for index in range(len(clips))]


def outcome(clip: Clip, result: Transcript | AudioError) -> Outcome:
    """Scores one result."""
    if isinstance(result, AudioError):
        return Outcome(clip, error=str(result))
    return Outcome(
        clip=clip,
        hypothesis=result.text,
        language=result.language,
        finish_reason=result.finish_reason,
        score=None if clip.reference is None else score(clip.reference, result.text, clip.language),
        loop=loops(result.text, clip.reference, clip.language),
        seconds=result.duration,
        wall=result.timings.total,
    )


def summarise(outcomes: Iterable[Outcome]) -> Summary:
    """Edits are summed before they are divided: a long clip weighs more than a short one."""
    rows = list(outcomes)
    scores = [row.score for row in rows if row.score]
    return Summary(
        clips=len(rows),
        scored=len(scores),
        words=sum((one.words for one in scores if one.words), Edits()),
        characters=sum((one.characters for one in scores), Edits()),
        empty=sum(row.empty for row in rows),
        repeated=sum(row.loop for row in rows),
        cut=sum(row.finish_reason == "length" for row in rows),
        failed=sum(row.error is not None for row in rows),
        seconds=sum(row.seconds for row in rows),
        wall=sum(row.wall for row in rows),
    )


def by_subset(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, Summary]]:
    """A summary for each subset, in alphabetic order."""
    for subset in sorted({row.clip.subset for row in outcomes}):
        yield subset, summarise(row for row in outcomes if row.clip.subset == subset)
