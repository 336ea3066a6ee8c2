"""Which layer gets which scheme: patterns over module names, the first that matches counts. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from quasr.errors import OptionError
from quasr.quant.scheme import DEFAULT_THRESHOLD, GROUPS, INT8, NONE, Scheme, llm_int8, parse, suggest
from quasr.quant.scheme import NAMES as SCHEME_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quasr.model.config import AudioConfig, ModelConfig, TextConfig

DTYPE_NAMES = ("auto", "bf16", "fp16", "fp32")
"""Compute types that quantise nothing."""

COMPUTE_TYPES = (*DTYPE_NAMES, *SCHEME_NAMES[1:])

ENCODER_BITS = 8
"""Fewer break the audio encoder without a sign: empty text, loops."""

EMBEDDING = "decoder.embed_tokens"
HEAD = "decoder.lm_head"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that can be quantised: a (rows, columns) weight, and `bias` numbers that stay as they are."""

    name: str
    kind: Literal["linear", "embedding"]
    rows: int
    columns: int
    bias: int = 0


def layers(config: ModelConfig) -> Iterator[Layer]:
    """All layers that can be quantised, in the order of the network.

    The stem, `conv_out`, the projector and the norms are not among them: they are small, and the audio passes there.
    """
    for index in range(config.audio.layers):
        yield from _encoder_layer(f"encoder.layers.{index}", config.audio)
    yield Layer(EMBEDDING, "embedding", config.text.vocab_size, config.text.hidden)
    for index in range(config.text.layers):
        yield from _decoder_layer(f"decoder.layers.{index}", config.text)
    if not config.text.tied_head:
        yield Layer(HEAD, "linear", config.text.vocab_size, config.text.hidden)


def _encoder_layer(name: str, config: AudioConfig) -> Iterator[Layer]:
    width, ffn = config.width, config.ffn
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield Layer(f"{name}.self_attn.{part}", "linear", width, width, width)
    yield Layer(f"{name}.fc1", "linear", ffn, width, ffn)
    yield Layer(f"{name}.fc2", "linear", width, ffn, width)


def _decoder_layer(name: str, config: TextConfig) -> Iterator[Layer]:
    queries, pairs = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {"q_proj": (queries, config.hidden), "k_proj": (pairs, config.hidden), "v_proj": (pairs, config.hidden)}
    for part, (rows, columns) in sizes.items():
        yield Layer(f"{name}.self_attn.{part}", "linear", rows, columns)
    yield Layer(f"{name}.self_attn.o_proj", "linear", config.hidden, queries)
    yield Layer(f"{name}.mlp.gate_proj", "linear", config.ffn, config.hidden)
    yield Layer(f"{name}.mlp.up_proj", "linear", config.ffn, config.hidden)
    yield Layer(f"{name}.mlp.down_proj", "linear", config.hidden, config.ffn)


def other_parameters(config: ModelConfig) -> int:
    """Numbers outside the layers' weights: stem, projector, norms and biases, which keep their 16 bits."""
    audio, text = config.audio, config.text
    channels = audio.stem_channels
    stem = 10 * channels + 2 * (9 * channels * channels + channels) + audio.width * audio.stem_features
    projector = (audio.width + audio.output) * (audio.width + 1)
    audio_norms = 2 * audio.width * (2 * audio.layers + 1)
    text_norms = text.layers * 2 * (text.hidden + text.head_dim) + text.hidden
    return stem + projector + audio_norms + text_norms + sum(layer.bias for layer in layers(config))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a recipe's table: what a pattern has taken."""

    pattern: str
    scheme: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """`rules` are (pattern, scheme): shell patterns over module names such as `decoder.layers.*.mlp.down_proj`."""

    name: str
    rules: tuple[tuple[str, Scheme], ...] = ()

    def assign(self, config: ModelConfig) -> dict[str, Scheme]:
        """The scheme of every layer that is quantised.

        Raises OptionError for a rule that takes no layer, or gives a layer what it cannot have.
        """
        taken = self._takings(config)
        for (pattern, scheme), found in zip(self.rules, taken, strict=False):
            if not any(fnmatchcase(layer.name, pattern) for layer in layers(config)):
                raise OptionError(f"the rule {pattern}={scheme} fits no layer that can be quantised: {_examples()}")
            for layer in found:
                _check(layer, scheme)
        quantised = zip(self.rules, taken, strict=False)
        return {layer.name: scheme for (_, scheme), found in quantised if scheme != NONE for layer in found}

    def table(self, config: ModelConfig, item: int = 2) -> list[Row]:
        """A row for each rule that takes a layer, one for layers without a rule, one for all else.

        `item` is the bytes of a number that is not quantised. Raises as `assign`.
        """
        self.assign(config)
        rules = [*self.rules, ("(no rule)", NONE)]
        rows = [
            Row(
                pattern,
                f"{item * 8}-bit" if scheme == NONE else str(scheme),
                len(found),
                sum(layer.rows * layer.columns for layer in found),
                sum(scheme.bytes(layer.rows, layer.columns, item) for layer in found),
            )
            for (pattern, scheme), found in zip(rules, self._takings(config), strict=True)
            if found
        ]
        rest = other_parameters(config)
        return [*rows, Row("stem, projector, norms, biases", f"{item * 8}-bit", 0, rest, rest * item)]

    def weight_bytes(self, config: ModelConfig, item: int = 2) -> int:
        """Bytes of the whole network in memory. Raises as `assign`."""
        return sum(row.bytes for row in self.table(config, item))

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for `from_json`."""
        return {"name": self.name, "rules": [[pattern, str(scheme)] for pattern, scheme in self.rules]}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Recipe:
        """Raises KeyError, TypeError, ValueError or OptionError for anything that `to_json` did not write."""
        return cls(str(raw["name"]), tuple((str(pattern), parse(scheme)) for pattern, scheme in raw["rules"]))

    def _takings(self, config: ModelConfig) -> list[list[Layer]]:
        """The layers of each rule, and last those of none."""
        taken: list[list[Layer]] = [[] for _ in range(len(self.rules) + 1)]
        for layer in layers(config):
            fitting = (index for index, (pattern, _) in enumerate(self.rules) if fnmatchcase(layer.name, pattern))
            taken[next(fitting, -1)].append(layer)
        return taken


NO_RECIPE = Recipe("none")


def recipe_for(compute_type: str, threshold: float | None = None, rules: Sequence[str] = ()) -> Recipe:
    """The recipe of a compute type, with rules `PATTERN=SCHEME` in front.

    int8: every encoder and decoder layer, embedding and head. int4: the decoder's layers, the rest as int8.
    llm-int8: the layers through bitsandbytes, embedding and head in 16 bits. nf4: the same, 4 bits in the decoder.
    `threshold` goes with llm-int8. Raises OptionError for unknown names and for what does not go together.
    """
    if compute_type not in COMPUTE_TYPES:
        raise OptionError(f"unknown compute type {compute_type[:40]!r}: {suggest(compute_type, COMPUTE_TYPES)}")
    if threshold is not None and compute_type != "llm-int8":
        raise OptionError(f"a threshold goes with llm-int8, not with {compute_type}")
    front = tuple(map(parse_rule, rules))
    if compute_type in DTYPE_NAMES:
        return Recipe("mixed", front) if front else NO_RECIPE
    scheme = parse(compute_type) if threshold is None else llm_int8(threshold)
    name = f"{scheme} with rules" if front else str(scheme)
    return Recipe(name, (*front, *_standard_rules(scheme)))


def parse_rule(text: str) -> tuple[str, Scheme]:
    """`decoder.layers.0.*=int8`. Raises OptionError."""
    pattern, equals, scheme = text.rpartition("=")
    if not equals or not pattern:
        raise OptionError(f"{text!r} is no rule: write PATTERN=SCHEME, such as 'decoder.layers.0.*=int8'")
    return pattern, parse(scheme)


def _standard_rules(scheme: Scheme) -> tuple[tuple[str, Scheme], ...]:
    if scheme.kind == "llm-int8":
        return (("encoder.layers.*", scheme), ("decoder.layers.*", scheme))
    if scheme.kind == "nf4":
        return (("encoder.layers.*", llm_int8(DEFAULT_THRESHOLD)), ("decoder.layers.*", scheme))
    encoder = scheme if scheme.bits >= ENCODER_BITS else INT8
    return (("encoder.layers.*", encoder), ("decoder.layers.*", scheme), ("decoder.*", INT8))


def _check(layer: Layer, scheme: Scheme) -> None:
    if layer.name.startswith("encoder.") and scheme.bits < ENCODER_BITS:
        raise OptionError(f"{layer.name} cannot be {scheme}: below 8 bits the audio encoder breaks without a sign")
    if layer.name in (EMBEDDING, HEAD) and scheme not in (NONE, INT8):
        raise OptionError(f"{layer.name} cannot be {scheme}: embedding and head are int8 or none")
    if not scheme.fits(layer.columns):
        fitting = [str(group) for group in GROUPS if layer.columns % group == 0]
        advice = f"it takes {', '.join(fitting)}" if fitting else "use int8 there, which needs no group"
        raise OptionError(
            f"{layer.name} has {layer.columns} input features, which groups of {scheme.group} do not divide: {advice}"
        )


def _examples() -> str:
    return f"there are encoder.layers.*, decoder.layers.*, {EMBEDDING}"
