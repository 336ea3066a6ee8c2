"""The cut plan: which stretches of a stream are decoded, from the voice activity of its windows alone.

Speech is a window that the detector believes in, or one far louder than the noise, for no detector hears everything.
Neighbouring speech is packed into pieces; what lies between pieces is silence and costs nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from quasr.audio.vad import WINDOW_SECONDS
from quasr.errors import OptionError

if TYPE_CHECKING:
    from quasr.audio.vad import Activity

LOUD_EXCESS = 20.0
"""dB above the noise floor from which a window is speech, whatever the detector says."""

QUIET_WINDOWS = 3
"""The official rule looks for the quietest 100 ms; this many windows are 96 ms."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Seconds, but for the two thresholds on the probability of speech.

    Speech begins at `on` and lasts until the probability stays under `off` for `min_silence`; less than `min_speech` of
    it is a click. A piece begins and ends `padding` outside its speech and is never longer than `longest`. A pause
    of `join` or more ends a piece. Speech without a pause is cut within `search` before the limit.
    """

    longest: float = 30.0
    on: float = 0.5
    off: float = 0.35
    min_speech: float = 0.096
    min_silence: float = 0.16
    padding: float = 0.3
    join: float = 2.0
    search: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.longest < float("inf"):
            raise OptionError(f"a planned piece lasts at least 1 s and not for ever: {self.longest} s will not do")


@dataclass(frozen=True, slots=True)
class Span:
    """Windows from `start` up to, not including, `end`."""

    start: int
    end: int


def plan(activity: Activity, options: PlanOptions) -> list[Span]:
    """The pieces of a whole stream, in order, apart from one another."""
    cutter = CutPlan(options)
    return [*cutter.feed(activity), *cutter.finish()]


class CutPlan:
    """The same for a stream: pieces come out as soon as they are decided. Memory is constant."""

    def __init__(self, options: PlanOptions) -> None:
        self._longest = int(options.longest / WINDOW_SECONDS)
        self._padding = _windows(options.padding)
        self._join = max(_windows(options.join), 2 * self._padding)
        self._search = min(_windows(options.search), self._longest // 4)
        self._judge = _Judge(options)
        self._levels: deque[float] = deque(maxlen=self._search + 1)
        self._undecided: deque[float] = deque()
        self._spans: list[Span] = []
        self._begin = 0
        self._free = 0
        self._seen = 0

    @property
    def keep(self) -> int:
        """The first window that a later piece may still need."""
        return self._begin if self._spans else max(self._free, self._seen - self._padding)

    def feed(self, activity: Activity) -> list[Span]:
        """The pieces that the next windows decide."""
        found: list[Span] = []
        loud = activity.excess >= LOUD_EXCESS
        scores = np.where(loud, 1.0, activity.probability)
        for score, level in zip(scores.tolist(), activity.level.tolist(), strict=True):
            self._undecided.append(level)
            for speech in self._judge.feed(score):
                found += self._step(speech)
        return found

    def finish(self) -> list[Span]:
        """The last piece, if there is one."""
        found = [piece for speech in self._judge.finish() for piece in self._step(speech)]
        return found + self._close() if self._spans else found

    def _step(self, speech: bool) -> list[Span]:
        self._levels.append(self._undecided.popleft())
        here, self._seen = self._seen, self._seen + 1
        if speech:
            self._extend(here)
            return self._cut() if self._seen - self._begin > self._longest else []
        return self._close() if self._spans and self._seen - self._spans[-1].end >= self._join else []

    def _extend(self, here: int) -> None:
        if not self._spans:
            self._begin = max(self._free, here - self._padding)
        if self._spans and self._spans[-1].end == here:
            self._spans[-1] = Span(self._spans[-1].start, here + 1)
        else:
            self._spans.append(Span(here, here + 1))

    def _close(self) -> list[Span]:
        end = min(self._spans[-1].end + self._padding, self._begin + self._longest, self._seen)
        piece = Span(self._begin, end)
        self._spans, self._free = [], end
        return [piece]

    def _cut(self) -> list[Span]:
        """Ends the piece in its longest pause: one of the second half if there is one, else the last."""
        pauses = [Span(before.end, after.start) for before, after in pairwise(self._spans)]
        if not pauses:
            return self._cut_speech()
        late = [pause for pause in pauses if pause.start - self._begin >= self._longest // 2] or pauses[-1:]
        pause = max(late, key=lambda one: (one.end - one.start, one.start))
        middle = (pause.start + pause.end) // 2
        piece = Span(self._begin, min(pause.start + self._padding, middle))
        self._spans = [span for span in self._spans if span.start >= pause.end]
        self._begin = self._free = max(pause.end - self._padding, middle)
        return [piece]

    def _cut_speech(self) -> list[Span]:
        """The official rule, to the window: the quietest in the quietest 96 ms before the limit."""
        limit = self._begin + self._longest
        left = limit - self._search
        level = np.array(self._levels)[left - self._seen : limit - self._seen]
        sums = np.convolve(level, np.ones(QUIET_WINDOWS), mode="valid")
        quietest = int(np.argmin(sums))
        cut = left + quietest + int(np.argmin(level[quietest : quietest + QUIET_WINDOWS]))
        piece = Span(self._begin, cut)
        self._spans = [Span(cut, self._seen)]
        self._begin = self._free = cut
        return [piece]


class _Judge:
    """From scores to speech or silence, with hysteresis, a few windows late."""

    def __init__(self, options: PlanOptions) -> None:
        self._thresholds = options.on, options.off
        self._min_speech = _windows(options.min_speech)
        self._min_silence = _windows(options.min_silence)
        self._speaking = False
        self._held = 0

    def feed(self, score: float) -> list[bool]:
        """What the windows up to this one turn out to be; none while that is open."""
        on, off = self._thresholds
        # While a pause is open only a confident window ends it; while speech goes on, or begins, the lower threshold
        # is enough.
        stays = bool(self._held) != self._speaking
        self._held += 1
        if score >= (off if stays else on):
            return self._heard()
        return self._missed()

    def _heard(self) -> list[bool]:
        if not self._speaking and self._held < self._min_speech:
            return []
        self._speaking = True
        return self._release(True)

    def _missed(self) -> list[bool]:
        if self._speaking and self._held < self._min_silence:
            return []
        self._speaking = False
        return self._release(False)

    def finish(self) -> list[bool]:
        """What is still open is silence: too short for speech, or a pause at the end."""
        return self._release(False)

    def _release(self, speech: bool) -> list[bool]:
        windows, self._held = [speech] * self._held, 0
        return windows


def _windows(seconds: float) -> int:
    return max(1, round(seconds / WINDOW_SECONDS))
