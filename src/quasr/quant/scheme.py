"""How the numbers of one layer are stored: a name, bits, a group. No torch here."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from quasr.errors import OptionError

Kind = Literal["none", "int8", "int4", "llm-int8", "nf4"]

GROUPS = (128, 64, 32)
"""Neighbouring input features that may share a scale."""

INT4_GROUP = 128
"""What `int4` means by itself."""

NF4_GROUP = 64
"""bitsandbytes' default block (Dettmers et al. 2023)."""

DEFAULT_THRESHOLD = 6.0
"""LLM.int8's: columns of activations this large stay in 16 bits (Dettmers et al. 2022)."""

NAMES = (
    "none",
    "int8",
    *(f"int8-g{group}" for group in GROUPS),
    "int4",
    *(f"int4-g{group}" for group in GROUPS),
    "llm-int8",
    "nf4",
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group` input features share one scale; 0 is the whole row. `threshold` counts for llm-int8 only."""

    kind: Kind
    bits: int
    group: int = 0
    threshold: float = DEFAULT_THRESHOLD

    def __str__(self) -> str:
        """The name that `parse` reads."""
        if self.kind in ("int8", "int4") and self.group:
            return f"{self.kind}-g{self.group}"
        if self.kind == "llm-int8" and self.threshold != DEFAULT_THRESHOLD:
            return f"{self.kind}:{self.threshold!r}"
        return self.kind

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` weights divides into groups."""
        return not self.group or columns % self.group == 0

    def bytes(self, rows: int, columns: int, item: int) -> int:
        """Bytes of a (rows, columns) weight with its scales; `item` is the size of a 16- or 32-bit number.

        bitsandbytes keeps its scales in fp32, and a byte that tells the format of an llm-int8 weight.
        """
        numbers = rows * columns
        groups = rows * (columns // self.group if self.group else 1)
        return {
            "none": numbers * item,
            "int8": numbers + groups * item,
            "int4": numbers // 2 + groups * item,
            "llm-int8": numbers + rows * 4 + 1,
            "nf4": numbers // 2 + groups * 4,
        }[self.kind]


NONE = Scheme("none", 16)
INT8 = Scheme("int8", 8)


def parse(name: str) -> Scheme:
    """The scheme of a name: one of NAMES, where int4 is int4-g128, or `llm-int8:THRESHOLD`. Raises OptionError."""
    found = re.fullmatch(r"(none|int8|int4|llm-int8|nf4)(?:-g(\d{1,6}))?(?::([^:]{1,32}))?", name)
    if found is None or (found[3] and found[1] != "llm-int8"):
        raise OptionError(f"unknown scheme {name[:40]!r}: {suggest(name, NAMES)}")
    kind, group = found[1], found[2]
    if group is not None and (kind not in ("int8", "int4") or int(group) not in GROUPS):
        raise OptionError(f"no scheme {name!r}: int8 and int4 take the groups {', '.join(map(str, GROUPS))}")
    if kind == "llm-int8":
        return llm_int8(DEFAULT_THRESHOLD if found[3] is None else found[3])
    bits = {"none": 16, "int8": 8, "int4": 4, "nf4": 4}[kind]
    default = {"int4": INT4_GROUP, "nf4": NF4_GROUP}.get(kind, 0)
    return Scheme(kind, bits, int(group) if group else default)  # type: ignore[arg-type]


def llm_int8(threshold: float | str) -> Scheme:
    """LLM.int8 with a threshold, 0 for none. Raises OptionError for what is no number from 0 upwards."""
    try:
        value = float(threshold)
    except ValueError as error:
        raise OptionError(f"the threshold {threshold!r} is no number: 0 turns it off, 6.0 is usual") from error
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"the threshold is {value}: it must be 0 or more, where 0 turns it off")
    return Scheme("llm-int8", 8, 0, value)


def suggest(name: str, known: tuple[str, ...]) -> str:
    """The close names, or else all."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
