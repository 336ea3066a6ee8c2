"""Recipes for batches: which samples, how altered, and which tokens. Numbers only; the GPU does the rest."""

from __future__ import annotations

import bisect
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import IterableDataset

from corpus import RATE, Clip, spoken

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

    from quasr.model.config import AudioConfig

BUCKETS = (2, 4, 6, 8, 16, 24, 32)
"""Padded lengths in seconds: whole attention windows of 1, 2 or 8 s. Shapes are few because each is one CUDA graph."""

PROMPT_ROOM = 52
CONTEXT_ROOM = 24


def answer_room(seconds: int) -> int:
    """Most answer tokens of a clip of `seconds`; an example with more is left out."""
    return 9 * seconds + 20


LETTERS = "abcdefghijklmnopqrstuvwxyz' "
MAX_JOINED = 8
IGNORE = -100

ON_HOST = ("spoken_length", "letters_length", "counts")
"""CTC takes lengths from the host; from the device they would cost a wait."""

Tokens = list[int]


@dataclass(frozen=True, slots=True)
class Mix:
    """What a batch is made of: shares of examples by source, at the start and after the ramp."""

    start: dict[str, float]
    end: dict[str, float]
    ramp: float = 0.25
    join: float = 0.4
    longest: float = 30.0

    def weights(self, progress: float) -> dict[str, float]:
        way = min(1.0, progress / self.ramp)
        return {name: (1 - way) * self.start[name] + way * self.end[name] for name in self.end}


DEFAULT_MIX = Mix(
    start={
        "librispeech": 8,
        "speechocean762": 10,
        "ljspeech": 3,
        "fsdd": 3,
        "zh_words": 2,
        "en": 67,
        "zh": 3,
        "noise": 4,
    },
    end={
        "librispeech": 20,
        "speechocean762": 14,
        "ljspeech": 5,
        "fsdd": 4,
        "zh_words": 2,
        "en": 48,
        "zh": 3,
        "noise": 4,
    },
)


@dataclass(slots=True)
class Piece:
    """One clip's place in an example: source offset and length in samples, and the playing speed."""

    clip: int
    speed: float
    gap: int


@dataclass(slots=True)
class Example:
    pieces: list[Piece]
    samples: int
    language: str


class Vocabulary:
    """Token ids of everything that can be said, computed once: with and without the joining space."""

    def __init__(self, tokenizer: Tokenizer, clips: list[Clip]) -> None:
        self.id = tokenizer.token_to_id
        first = tokenizer.encode_batch([clip.text for clip in clips])
        later = tokenizer.encode_batch([" " + clip.text for clip in clips])
        plain = tokenizer.encode_batch([" " + spoken(clip.text) for clip in clips])
        self.first = [np.array(item.ids, np.int32) for item in first]
        self.later = [np.array(item.ids, np.int32) for item in later]
        self.spoken = [np.array(item.ids, np.int32) for item in plain]
        letter = {character: index + 1 for index, character in enumerate(LETTERS)}
        self.letters = [np.array([letter[c] for c in " " + spoken(clip.text)], np.int32) for clip in clips]
        self._encode = tokenizer.encode

    def frame(self, context: Tokens) -> tuple[Tokens, Tokens]:
        """The prompt before and after the audio, without a forced language."""
        turn = [self.id("<|im_end|>"), *self.text("\n"), self.id("<|im_start|>")]
        prefix = [self.id("<|im_start|>"), *self.text("system\n"), *context, *turn]
        prefix += [*self.text("user\n"), self.id("<|audio_start|>")]
        return prefix, [self.id("<|audio_end|>"), *turn, *self.text("assistant\n")]

    def text(self, text: str) -> Tokens:
        return self._encode(text, add_special_tokens=False).ids


@dataclass(slots=True)
class Batch:
    """Arrays of one batch, all ready to be moved. B examples, K pieces, L positions."""

    seconds: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: tensor if name in ON_HOST else tensor.to(device, non_blocking=True)
            for name, tensor in self.tensors.items()
        }
        return Batch(self.seconds, moved)

    def pin_memory(self) -> Batch:
        return Batch(self.seconds, {name: tensor.pin_memory() for name, tensor in self.tensors.items()})


class Sampler(IterableDataset[Batch]):
    """An endless stream of batches of `budget` padded seconds each."""

    def __init__(
        self,
        clips: list[Clip],
        vocabulary: Vocabulary,
        audio: AudioConfig,
        budget: float,
        seed: int,
        progress: torch.Tensor,
        mix: Mix = DEFAULT_MIX,
    ) -> None:
        self.clips, self.vocabulary, self.audio = clips, vocabulary, audio
        self.budget, self.seed, self.progress, self.mix = budget, seed, progress, mix
        self.pools: dict[str, list[int]] = defaultdict(list)
        self.speakers: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            if clip.dev or clip.length > 30 * RATE or clip.length < RATE // 5:
                continue
            self.pools[self._pool(clip)].append(index)
            self.speakers[clip.speaker].append(index)

    @staticmethod
    def _pool(clip: Clip) -> str:
        return {"English": "en", "Chinese": "zh"}[clip.language] if clip.source == "synthetic" else clip.source

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        waiting: dict[int, list[Example]] = defaultdict(list)
        while True:
            example = self.draw(rng)
            if not self._fits(example):
                continue
            seconds = BUCKETS[bisect.bisect_left(BUCKETS, example.samples / RATE)]
            waiting[seconds].append(example)
            if len(waiting[seconds]) >= self.budget // seconds:
                yield self.build(waiting.pop(seconds), seconds, rng)

    def filler(self, seconds: int) -> Batch:
        """A batch of a bucket's shape, of whatever clip is short enough: what a graph is captured with."""
        rng = random.Random(0)
        index = next(i for i in self.pools["speechocean762"] if self.clips[i].length < 2 * RATE)
        example = Example([Piece(index, 1.0, 0)], self.clips[index].length, self.clips[index].language)
        return self.build([example] * int(self.budget // seconds), seconds, rng)

    def _fits(self, example: Example) -> bool:
        tokens = sum(len(self.vocabulary.later[piece.clip]) for piece in example.pieces)
        return tokens + 8 <= answer_room(max(BUCKETS[0], example.samples // RATE))

    def draw(self, rng: random.Random) -> Example:
        """One clip, or several joined with short pauses, at random speeds."""
        weights = {name: weight for name, weight in self.mix.weights(float(self.progress)).items() if self.pools[name]}
        pool = rng.choices(list(weights), list(weights.values()))[0]
        index = rng.choice(self.pools[pool])
        language = self.clips[index].language
        pieces, end = [], rng.randint(0, RATE) if rng.random() < 0.5 else rng.randint(0, RATE // 8)
        many = pool == "fsdd" or rng.random() < self.mix.join * min(1.0, float(self.progress) / 0.12)
        target = rng.uniform(1, 6) if pool == "fsdd" else rng.uniform(4, self.mix.longest)
        speed = rng.uniform(0.88, 1.15)
        start = end
        while True:
            length = int(self.clips[index].length / speed)
            if pieces and end + length > self.mix.longest * RATE:
                break
            pieces.append(Piece(index, speed, start))
            end = start + length
            if not many or language == "None" or len(pieces) == MAX_JOINED or end > target * RATE:
                break
            start = end + int(rng.uniform(0.02, 0.6) * RATE)
            index = self._next(index, pool, rng)
        samples = min(max(end + rng.randint(0, RATE // 2), RATE // 2), BUCKETS[-1] * RATE)
        return Example(pieces, samples, language)

    def _next(self, index: int, pool: str, rng: random.Random) -> int:
        """The neighbouring clip, another of the same speaker, or any of the pool."""
        if pool != "fsdd" and rng.random() < 0.5 and index + 1 < len(self.clips):
            after = self.clips[index + 1]
            if after.speaker == self.clips[index].speaker and not after.dev:
                return index + 1
        if pool == "fsdd" or rng.random() < 0.7:
            return rng.choice(self.speakers[self.clips[index].speaker])
        return rng.choice(self.pools[pool])

    def build(self, examples: list[Example], seconds: int, rng: random.Random) -> Batch:
        batch = Batch(seconds, self._audio(examples, rng))
        batch.tensors.update(self._tokens(examples, seconds, rng))
        batch.tensors.update(self._ctc(examples, seconds))
        return batch

    def _audio(self, examples: list[Example], rng: random.Random) -> dict[str, torch.Tensor]:
        pieces = max(len(example.pieces) for example in examples)
        shape = (len(examples), pieces)
        begin = np.full(shape, 2**40, np.int64)
        start, length = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        speed = np.ones(shape, np.float64)
        for row, example in enumerate(examples):
            for column, piece in enumerate(example.pieces):
                clip = self.clips[piece.clip]
                begin[row, column], speed[row, column] = piece.gap, piece.speed
                start[row, column], length[row, column] = clip.start, clip.length
        noise = [self.clips[rng.choice(self.pools["noise"])] for _ in examples]
        return {
            "begin": torch.from_numpy(begin),
            "start": torch.from_numpy(start),
            "length": torch.from_numpy(length),
            "speed": torch.from_numpy(speed),
            "samples": torch.tensor([example.samples for example in examples]),
            "silent": torch.tensor([e.language == "None" and rng.random() < 0.25 for e in examples]),
            "noise_start": torch.tensor([clip.start for clip in noise]),
            "noise_length": torch.tensor([clip.length for clip in noise]),
        }

    def _tokens(self, examples: list[Example], seconds: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """Prompt, audio places and answer for each row, all of the bucket's fixed widths.

        `audio_row` counts a row's audio tokens, -1 for text; `asked` holds the positions that predict `labels`.
        """
        rows, places, asked, labels = [], [], [], []
        for example in examples:
            count = self.audio.token_count(example.samples // 160)
            prefix, suffix, answer = self.dialogue(example, rng)
            head = len(prefix) + count + len(suffix)
            rows.append([*prefix, *[0] * count, *suffix, *answer])
            places.append([-1] * len(prefix) + list(range(count)) + [-1] * (len(suffix) + len(answer)))
            asked.append(list(range(head - 1, head + len(answer) - 1)))
            labels.append(answer)
        room = answer_room(seconds)
        width = PROMPT_ROOM + seconds * self.audio.chunk_tokens + room
        return {
            "ids": _pad(rows, width, 0),
            "audio_row": _pad(places, width, -1),
            "asked": _pad(asked, room, 0),
            "labels": _pad(labels, room, IGNORE),
        }

    def dialogue(self, example: Example, rng: random.Random) -> tuple[Tokens, Tokens, Tokens]:
        """Prefix up to the audio, suffix after it, and the answer with the stop token."""
        words = self.vocabulary
        context = words.text(self._context(example, rng))[:CONTEXT_ROOM] if rng.random() < 0.12 else []
        forced = example.language != "None" and rng.random() < 0.25
        head = [*words.text(f"language {example.language}"), words.id("<asr_text>")]
        prefix, suffix = words.frame(context)
        answer = [*self._said(example), words.id("<|im_end|>")]
        return (prefix, suffix + head, answer) if forced else (prefix, suffix, head + answer)

    def _said(self, example: Example) -> Tokens:
        if example.language == "None":
            return []
        glued = example.language == "Chinese"
        parts = [
            self.vocabulary.first[piece.clip] if glued or not number else self.vocabulary.later[piece.clip]
            for number, piece in enumerate(example.pieces)
        ]
        return [int(token) for part in parts for token in part]

    def _context(self, example: Example, rng: random.Random) -> str:
        """A few words, some of them said: the model learns to look and not to repeat."""
        said = " ".join(self.clips[piece.clip].text for piece in example.pieces).split()
        other = self.clips[rng.choice(self.pools["en"] or self.pools["librispeech"])].text.split()
        words = rng.sample(said, min(len(said), rng.randint(0, 4))) + rng.sample(other, min(len(other), 4))
        rng.shuffle(words)
        return " ".join(words)

    def _ctc(self, examples: list[Example], seconds: int) -> dict[str, torch.Tensor]:
        """Targets of both auxiliary losses, (batch, longest), and their lengths; only English rows have some."""
        english = [[p.clip for p in e.pieces] if e.language == "English" else [] for e in examples]
        spoken_rows = [[int(t) for c in clips for t in self.vocabulary.spoken[c]] for clips in english]
        letter_rows = [[int(t) for c in clips for t in self.vocabulary.letters[c]] for clips in english]
        return {
            "spoken": _pad(spoken_rows, max(1, *map(len, spoken_rows)), 0),
            "spoken_length": torch.tensor([len(row) for row in spoken_rows]),
            "letters": _pad(letter_rows, max(1, *map(len, letter_rows)), 0),
            "letters_length": torch.tensor([len(row) for row in letter_rows]),
            "counts": torch.tensor([self.audio.token_count(example.samples // 160) for example in examples]),
        }


def _pad(rows: list[Tokens], width: int, value: int) -> torch.Tensor:
    out = np.full((len(rows), width), value, np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)
