"""The names of what is measured: our precisions, and peers with a mark in front. No torch here."""

from __future__ import annotations

from importlib.util import find_spec

from quasr.errors import MissingDependencyError, OptionError
from quasr.quant.scheme import suggest

PEER = "peer:"
"""Stands before the name of a peer, because bitsandbytes' methods are among our precisions too."""

PEERS = {
    "transformers": ("transformers",),
    "transformers-compile": ("transformers",),
    "llm-int8": ("transformers", "accelerate", "bitsandbytes"),
    "nf4": ("transformers", "accelerate", "bitsandbytes"),
}
"""The packages that each peer needs. llm-int8 and nf4 are bitsandbytes through transformers."""

BITSANDBYTES = ("llm-int8", "nf4")


def parse_peers(text: str | None) -> list[str]:
    """`transformers,nf4` -> names with PEER in front; None: those whose packages are installed; "none": no peers.

    Raises OptionError for unknown ones.
    """
    if text is None:
        return [PEER + name for name in PEERS if not missing_packages(name)]
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in PEERS:
            raise OptionError(f"unknown peer {name[:40]!r}: {suggest(name, tuple(PEERS))}")
        if names.count(name) > 1:
            raise OptionError(f"the peer {name} is given twice")
    return [PEER + name for name in names]


def missing_packages(peer: str) -> list[str]:
    """Those of PEERS that are not installed."""
    return [package for package in PEERS[peer] if find_spec(package) is None]


def require_packages(peer: str) -> None:
    """Raises MissingDependencyError where one is missing."""
    missing = missing_packages(peer)
    if missing:
        raise MissingDependencyError(f"{peer} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def parse_batches(text: str) -> tuple[int, ...]:
    """`4,1,16` -> (1, 4, 16). Raises OptionError."""
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError as error:
        raise OptionError(f"{text[:40]!r} are no batch sizes: write some such as 1,4,16") from error
    if sizes[0] < 1:
        raise OptionError(f"a batch of {sizes[0]} makes no sense: it must be at least 1")
    return tuple(sizes)
