"""Memory from the config alone: what each scheme needs, and what to choose under a budget. No torch, no weights read.

    peak = context + weights + max(encode, cache + prefill, cache + generate)

Each term counts the tensors that are alive at its stage's fullest moment, with the plain kernels: others need less.
They were checked against torch's own allocations on a CPU. On CUDA only the sum was, for the 1.7B shape (docs/log.md);
workspaces and gaps in the allocator are not counted one by one but in `CUDA_CONTEXT`. The engine of GPUs takes a few
clips at a time into a cache that is there before.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from quasr.engine.base import token_budget
from quasr.errors import OptionError, ResourceError
from quasr.quant.recipe import DTYPE_NAMES, EMBEDDING, layers, recipe_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe
    from quasr.quant.scheme import Kind

CUDA_CONTEXT = 1_040_000_000
"""The CUDA context, kernels, graphs and what torch's allocator keeps in reserve, beside the tensors: measured on an
H200 with torch 2.11 (docs/log.md). It depends on GPU and driver."""

HOST_PROCESS = 350_000_000
"""Assumed: interpreter, torch and the audio libraries in main memory; 310 MB were measured on Linux without CUDA."""

PROMPT_TOKENS = 64
"""Template, language, and a short context."""

STEM_SLICE = 16
"""Chunks that the encoder's stem takes at once."""

HEAD_NUMBERS = 1 << 25
"""Weights that an int8 head dequantises at once."""

MEL_SLICE = 4096
"""Mel frames that are transformed at once on the device."""

POSITIONS_MULTIPLE = 64
"""The fast engine's cache comes in such pieces."""

PREFILL_SHARE, LEAST_PREFILL, MOST_PREFILL = 8, 2048, 8192
"""Positions that the fast engine encodes and prefills at once: an eighth of its cache, within bounds."""

DROP_AT = 4
"""Finished rows leave the cache once they are a quarter of the batch."""

PIECES = (30.0, 20.0, 15.0, 10.0, 5.0)
"""Seconds of a clip, the longest that fits first."""

LARGEST_BATCH = 8

FAST_KINDS = frozenset({"int8", "int4"})
"""Schemes that the fast engine's kernels read; 16-bit weights have none."""

AUTOMATIC = ("int8", "int4-g32", "int4-g64", "int4")
"""What may be chosen after the plain dtypes, by falling precision."""

BY_NAME = ("llm-int8", "nf4")
"""Planned for as well, but chosen only when asked for: they need bitsandbytes."""

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MEMORY_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_memory(text: str) -> int:
    """Bytes of "4GB", "800MB" (decimal), "4GiB" or "800MiB" (binary). Raises OptionError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([MG]i?B)", text, re.IGNORECASE)
    size = round(float(found[1]) * MEMORY_UNITS[found[2].upper()]) if found else 0
    if not size:
        raise OptionError(f"{text[:40]!r} is no amount of memory: write 4GB, 800MB, 4GiB or 800MiB")
    return size


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "30m" or "1.5h". Raises OptionError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smh]?)", text)
    seconds = float(found[1]) * TIME_UNITS[found[2]] if found else 0.0
    if not seconds:
        raise OptionError(f"{text[:40]!r} is no length of audio: write 90s, 30m or 1.5h")
    return seconds


@dataclass(frozen=True, slots=True)
class Target:
    """Where the network runs (cpu or cuda) and what it computes in: bf16, fp16 or fp32."""

    device: Literal["cpu", "cuda"]
    dtype: str

    @property
    def item(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def residual(self) -> int:
        """Bytes of a number between layers: fp16 keeps it in fp32."""
        return 4 if self.dtype == "fp16" else self.item

    @property
    def accumulator(self) -> int:
        """Bytes beside each number of a product: a CPU sums 16-bit products in an fp32 copy."""
        return 4 if self.device == "cpu" and self.item == 2 else 0

    @property
    def context(self) -> int:
        """Bytes that are there before the weights."""
        return CUDA_CONTEXT if self.device == "cuda" else HOST_PROCESS


@dataclass(frozen=True, slots=True)
class Work:
    """What runs at once: `batch` clips of at most `seconds`, each behind `prompt` tokens of text."""

    seconds: float
    batch: int
    prompt: int = PROMPT_TOKENS

    @property
    def frames(self) -> int:
        """Mel frames of a clip."""
        return math.ceil(self.seconds * 100)

    def prompt_length(self, config: ModelConfig) -> int:
        """Positions before the first new token."""
        return self.prompt + config.audio.token_count(self.frames)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to hold the weights; `automatic`: may be chosen without being asked for."""

    name: str
    recipe: Recipe
    target: Target
    automatic: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, by stage. `encode`, `prefill` and `generate` are beside the weights, the last two beside the cache too."""

    candidate: Candidate
    work: Work
    weights: int
    cache: int
    encode: int
    prefill: int
    generate: int

    @property
    def activations(self) -> int:
        """The fullest stage, beside weights and cache."""
        return max(self.encode - self.cache, self.prefill, self.generate)

    @property
    def tensors(self) -> int:
        """Most bytes of tensors at one time."""
        return self.weights + self.cache + self.activations

    @property
    def peak(self) -> int:
        """Most bytes at one time, with the context."""
        return self.candidate.target.context + self.tensors


def estimate(config: ModelConfig, candidate: Candidate, work: Work) -> Estimate:
    """Raises OptionError where the candidate's groups do not divide the network's sizes."""
    target, recipe = candidate.target, candidate.recipe
    if runs_fast(config, target, recipe):
        return _fast_estimate(config, candidate, work)
    return Estimate(
        candidate,
        work,
        weights=_weight_bytes(config, recipe, target.item),
        cache=cache_bytes(config, target, work),
        encode=max(stem_bytes(config, target, work), encoder_bytes(config, target, work, recipe)),
        prefill=prefill_bytes(config, target, work, recipe),
        generate=generate_bytes(config, target, work, recipe),
    )


def runs_fast(config: ModelConfig, target: Target, recipe: Recipe) -> bool:
    """Whether the fast engine takes it: on a GPU, and with weights that its kernels read."""
    kinds = {scheme.kind for name, scheme in recipe.assign(config).items() if name.startswith("decoder.")}
    return target.device == "cuda" and kinds <= FAST_KINDS


def _fast_estimate(config: ModelConfig, candidate: Candidate, work: Work) -> Estimate:
    target, recipe = candidate.target, candidate.recipe
    positions = work.batch * (work.prompt_length(config) + token_budget(work.seconds))
    kept = math.ceil(positions / POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE * position_bytes(config, target)
    most = min(max(positions // PREFILL_SHARE, LEAST_PREFILL), MOST_PREFILL)
    part = replace(work, batch=min(work.batch, max(1, most // work.prompt_length(config))))
    encode = (
        mel_bytes(config, part),
        packed_stem_bytes(config, target, part),
        encoder_bytes(config, target, part, recipe),
    )
    return Estimate(
        candidate,
        work,
        weights=_weight_bytes(config, recipe, target.item),
        cache=kept,
        encode=kept + max(encode),
        # Attention goes from prompt to prompt there.
        prefill=packed_prefill_bytes(config, target, part, recipe)
        + score_bytes(config, target, replace(part, batch=1)),
        generate=step_bytes(config, target, work, recipe),
    )


def position_bytes(config: ModelConfig, target: Target) -> int:
    """Keys and values of one position in all layers."""
    return 2 * config.text.layers * config.text.kv_heads * config.text.head_dim * target.item


def mel_bytes(config: ModelConfig, work: Work) -> int:
    """The samples; a slice's windows and their spectrum in fp64; the frames."""
    windows = min(MEL_SLICE, work.batch * work.frames) * (400 + 2 * 201) * 8
    return work.batch * work.frames * (160 + config.audio.mel_bins) * 4 + windows


def packed_prefill_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """The residual twice in fp32, and the fuller of attention, MLP and head, over packed prompts.

    Attention is fullest while the queries are turned: q, k and v as one, and three more of the queries' size. The MLP
    holds its input, gate and up as one, silu of the one and the product; before the latter two the fused weight.
    """
    text, item = config.text, target.item
    rows = work.batch * work.prompt_length(config)
    queries, pairs = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention = rows * (4 * queries + 2 * pairs) * item
    weight = fused_bytes(config, target, recipe)
    mlp = rows * (text.hidden + 2 * text.ffn) * item + max(rows * 2 * text.ffn * item, weight)
    expanded = rows * text.hidden * item + 2 * weight
    head = plain_head_bytes(config, target, work, recipe)
    return 2 * rows * text.hidden * 4 + max(attention, mlp, expanded, head)


def step_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """One token for every row: the larger of an expanded weight and the head."""
    return max(2 * fused_bytes(config, target, recipe), plain_head_bytes(config, target, work, recipe))


def fused_bytes(config: ModelConfig, target: Target, recipe: Recipe) -> int:
    """Gate and up as one expanded weight; nothing where it is not quantised."""
    quantised = _sizes(config, recipe, "decoder.layers.0.mlp.gate_proj")
    return 2 * config.text.ffn * config.text.hidden * target.item if quantised else 0


def plain_head_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """Logits in the network's dtype, in fp32 and their exponentials; an int8 head also expands a slice, twice."""
    logits = work.batch * config.text.vocab_size * (target.item + 8)
    numbers = min(HEAD_NUMBERS, config.text.vocab_size * config.text.hidden)
    expanded = 2 * numbers * target.item if _sizes(config, recipe, EMBEDDING) and config.text.tied_head else 0
    return max(logits, work.batch * config.text.vocab_size * target.item + expanded)


def cache_bytes(config: ModelConfig, target: Target, work: Work) -> int:
    """Keys and values of every layer for prompt, audio and the whole budget of new tokens: it is allocated at once."""
    text = config.text
    positions = work.prompt_length(config) + token_budget(work.seconds)
    return 2 * text.layers * work.batch * text.kv_heads * positions * text.head_dim * target.item


def stem_bytes(config: ModelConfig, target: Target, work: Work) -> int:
    """The mel frames and their chunks in fp32; one slice through the first two convolutions; the tokens so far.

    The first convolution's output is there twice: before and after its GELU, or in the second one's own layout.
    """
    return _stem_bytes(config, target, work, copies=2.25)


def packed_stem_bytes(config: ModelConfig, target: Target, work: Work) -> int:
    """The same with channels last, where the second convolution finds the first one's output only once."""
    return _stem_bytes(config, target, work, copies=2)


def _stem_bytes(config: ModelConfig, target: Target, work: Work, copies: float) -> int:
    audio = config.audio
    chunks = work.batch * math.ceil(work.frames / audio.chunk_frames)
    part = min(STEM_SLICE, chunks)
    chunk = audio.mel_bins * audio.chunk_frames
    first = audio.stem_channels * -(-audio.mel_bins // 2) * -(-audio.chunk_frames // 2)
    tokens = chunks * audio.chunk_tokens * audio.width * target.item
    return (2 * chunks + part) * chunk * 4 + int(part * copies * first) * target.item + tokens


def encoder_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """One layer over all windows: what went in, the residual twice, and the wider of attention and MLP.

    Attention holds its norm, q, k, v, the mixed values and the output; the MLP its inner width before and after GELU.
    A weight is expanded while only one of the two is there.
    """
    audio, item = config.audio, target.item
    chunks = math.ceil(work.frames / audio.chunk_frames)
    window = min(audio.window_chunks, chunks) * audio.chunk_tokens
    rows = work.batch * math.ceil(audio.token_count(work.frames) / window) * window
    kept = work.batch * chunks * audio.chunk_tokens * audio.width * item + rows * audio.width * item
    attention = audio.width * (target.residual + 6 * item + target.accumulator)
    mlp = 2 * audio.width * target.residual + max(
        2 * audio.ffn * item, (audio.width + audio.ffn) * item + audio.ffn * target.accumulator
    )
    layer = rows * max(attention, mlp)
    expanded = layer - rows * audio.ffn * item + sum(dequantised_bytes(config, target, recipe, "encoder."))
    return kept + max(layer, expanded) + mixed_bytes(config, rows, recipe, "encoder.")


def prefill_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """The prompt's embeddings and one layer over all of its positions, as wide as attention or MLP needs.

    Attention is fullest while it turns the queries: them, k, v, and four more of the queries' size. The MLP holds its
    inner width three times: gate, up and their product. A weight is expanded while one of them is there, and
    used for the second.
    """
    text, item = config.text, target.item
    length = work.prompt_length(config)
    rows = work.batch * length
    queries, pairs = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention = target.residual * text.hidden + (text.hidden + 5 * queries + 2 * pairs) * item
    inner = text.ffn * max(3 * item, 2 * item + target.accumulator)
    mlp = 2 * target.residual * text.hidden + text.hidden * item + inner
    angles = 2 * length * text.head_dim * 4
    layer = rows * max(attention, mlp)
    inner = rows * text.ffn * item
    codes, weight = dequantised_bytes(config, target, recipe, "decoder.")
    expanded = layer - inner + max(weight, codes + weight - inner)
    others = angles + mixed_bytes(config, rows, recipe, "decoder.") + score_bytes(config, target, work)
    widest = max(max(layer, expanded) + others, head_bytes(config, target, work, recipe))
    return _embeddings(config, target, work) + widest


def generate_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """The embeddings, still held, and the larger of a second cache and a step's products.

    The second cache is the copy of the rows that go on, once a quarter of the batch has finished.
    """
    kept = work.batch - math.ceil(work.batch / DROP_AT)
    copied = cache_bytes(config, target, work) * kept // work.batch
    step = max(sum(dequantised_bytes(config, target, recipe, "decoder.")), head_bytes(config, target, work, recipe))
    return _embeddings(config, target, work) + max(copied, step)


def head_bytes(config: ModelConfig, target: Target, work: Work, recipe: Recipe) -> int:
    """Logits in the network's dtype, in fp32 and their exponentials; an int8 head also dequantises a slice, twice."""
    logits = work.batch * config.text.vocab_size * (2 * target.item if target.item == 4 else target.item + 8)
    numbers = min(HEAD_NUMBERS, config.text.vocab_size * config.text.hidden)
    return logits + (2 * numbers * target.item if _sizes(config, recipe, EMBEDDING) and config.text.tied_head else 0)


def dequantised_bytes(config: ModelConfig, target: Target, recipe: Recipe, half: str) -> tuple[int, int]:
    """The largest weight that is expanded for its product: its codes as floats (int8 and int4), and the weight."""
    sizes = [(rows * columns, kind) for rows, columns, kind in _sizes(config, recipe, half) if kind != "llm-int8"]
    numbers, kind = max(sizes, default=(0, "none"))
    return (0 if kind == "nf4" else numbers * target.item), numbers * target.item


def mixed_bytes(config: ModelConfig, rows: int, recipe: Recipe, half: str) -> int:
    """LLM.int8's own activations: int8 inputs, and int32 sums beside their fp32 form."""
    sizes = (out * 8 + columns for out, columns, kind in _sizes(config, recipe, half) if kind == "llm-int8")
    return rows * max(sizes, default=0)


def score_bytes(config: ModelConfig, target: Target, work: Work) -> int:
    """The scores and their softmax: only in fp32 on CUDA, where no fused attention shares keys among queries."""
    if (target.device, target.dtype) != ("cuda", "fp32"):
        return 0
    return 2 * 4 * work.batch * config.text.heads * work.prompt_length(config) ** 2


def _embeddings(config: ModelConfig, target: Target, work: Work) -> int:
    return work.batch * work.prompt_length(config) * config.text.hidden * target.item


# Cached, because a plan asks them again for every clip length and batch that it tries.
@cache
def _weight_bytes(config: ModelConfig, recipe: Recipe, item: int) -> int:
    return recipe.weight_bytes(config, item)


@cache
def _sizes(config: ModelConfig, recipe: Recipe, part: str) -> frozenset[tuple[int, int, Kind]]:
    """(rows, columns, kind) of the quantised linears whose names begin with `part`, or of the embedding."""
    schemes = recipe.assign(config)
    return frozenset(
        (layer.rows, layer.columns, schemes[layer.name].kind)
        for layer in layers(config)
        if layer.name in schemes and layer.name.startswith(part) and (layer.kind == "linear" or part == EMBEDDING)
    )


def candidates(
    device: Literal["cpu", "cuda"], dtype: str, compute_type: str = "auto", threshold: float | None = None
) -> list[Candidate]:
    """The ways to hold a 16-bit checkpoint's weights, highest precision first; one where `compute_type` is named.

    dtype "auto": fp32 on a CPU, with bf16 as its second choice, and bf16 on CUDA. Raises OptionError.
    """
    natural = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}[device]
    plain = natural if dtype == "auto" else (dtype,)
    if compute_type != "auto":
        computed = compute_type if compute_type in DTYPE_NAMES else plain[0]
        recipe = recipe_for(compute_type, threshold)
        return [Candidate(compute_type, recipe, Target(device, computed))]
    found = [Candidate(name, recipe_for(name), Target(device, name)) for name in plain]
    quantised = ((name, name in AUTOMATIC) for name in (*AUTOMATIC, *BY_NAME))
    return found + [Candidate(name, recipe_for(name), Target(device, plain[0]), ok) for name, ok in quantised]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the plan must keep to. `budget` in bytes; `seconds` of audio in all, None for any; `batch` None: up to 8."""

    budget: int
    seconds: float | None = None
    batch: int | None = None
    largest_batch: int = LARGEST_BATCH

    def works(self) -> Iterator[Work]:
        """All that may be tried: the longest clip first, and of each the biggest batch."""
        for piece in dict.fromkeys(min(piece, self.seconds or piece) for piece in PIECES):
            most = self.largest_batch if self.seconds is None else math.ceil(self.seconds / piece)
            for batch in [self.batch] if self.batch else range(min(most, self.largest_batch), 0, -1):
                yield Work(piece, batch)


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate. `best` is the longest clip and biggest batch that fit, or else the least that it can do.

    `problem` says why the candidate cannot be at all.
    """

    candidate: Candidate
    best: Estimate | None = None
    fits: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Every candidate, and the one that is taken."""

    wish: Wish
    rows: tuple[Row, ...]

    @property
    def chosen(self) -> Estimate:
        """Raises ResourceError where nothing fits, with the smallest budget that would do, and OptionError where no
        candidate can be.
        """
        if all(row.problem for row in self.rows):
            raise OptionError(self.rows[0].problem)
        for row in self.rows:
            if row.fits and row.candidate.automatic and row.best:
                return row.best
        raise ResourceError(self._excuse())

    def why(self) -> str:
        """One sentence about the choice."""
        taken = self.chosen
        higher = [row.candidate.name for row in self.rows[: [row.best for row in self.rows].index(taken)]]
        reason = f"{', '.join(higher)} would need more" if higher else "nothing more precise was to choose from"
        work = taken.work
        return (
            f"{taken.candidate.name}, clips of up to {work.seconds:g} s, batches of {work.batch}: "
            f"{written(taken.peak)} of {written(self.wish.budget)} ({reason})"
        )

    def _excuse(self) -> str:
        least = [row.best for row in self.rows if row.best and row.candidate.automatic]
        best = min(least, key=lambda one: one.peak)
        return (
            f"nothing fits into {written(self.wish.budget)}: the least is {written(best.peak)}, with "
            f"{best.candidate.name}, clips of {best.work.seconds:g} s and batches of {best.work.batch}"
        )


def plan(config: ModelConfig, choices: Sequence[Candidate], wish: Wish) -> Plan:
    """Highest precision that fits, then the longest clip, then the biggest batch."""
    return Plan(wish, tuple(_row(config, candidate, wish) for candidate in choices))


def _row(config: ModelConfig, candidate: Candidate, wish: Wish) -> Row:
    try:
        _sizes(config, candidate.recipe, EMBEDDING)
    except OptionError as error:
        return Row(candidate, problem=str(error))
    tried = (estimate(config, candidate, work) for work in wish.works())
    least: Estimate | None = None
    for found in tried:
        if found.peak <= wish.budget:
            return Row(candidate, found, fits=True)
        least = found if least is None or found.peak < least.peak else least
    return Row(candidate, least)


def written(size: int) -> str:
    """Bytes as `parse_memory` reads them, rounded up, so that what is named is enough."""
    return f"{math.ceil(size / 1e6)}MB" if size < 1e9 else f"{math.ceil(size / 1e7) / 100:.2f}GB"
