"""What an audio input is, and what to call it in a message."""

from __future__ import annotations

import os
import re
from enum import Enum
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from quasr.errors import AudioNotFoundError, OptionError

AudioInput = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | tuple[NDArray[Any], int]
"""A path, an http(s) or file URL, the bytes of a file, an open binary file, or `(array, rate)`."""

MAX_NAME = 200
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")  # two letters at least: `C://` is a drive


class Kind(Enum):
    """The five things an input can be."""

    PATH = "path"
    URL = "url"
    BYTES = "bytes"
    FILE = "file"
    ARRAY = "array"


def kind_of(source: AudioInput) -> Kind:
    """Which of the five `source` is. A `file://` URL is a path. Raises OptionError for anything else."""
    if isinstance(source, str):
        return Kind.URL if _SCHEME.match(source) and not _is_file_url(source) else Kind.PATH
    if isinstance(source, os.PathLike):
        return Kind.PATH
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Kind.BYTES
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray):
        return Kind.ARRAY
    if callable(getattr(source, "read", None)):
        return Kind.FILE
    raise OptionError(
        f"audio cannot be a {type(source).__name__}: give a path, a URL, bytes, an open binary file or (array, rate)"
    )


def path_of(source: str | os.PathLike[str]) -> str:
    """The file-system path of a PATH source. Raises AudioNotFoundError for a file URL of another machine."""
    text = os.fsdecode(source)
    if not _is_file_url(text):
        return text
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise AudioNotFoundError(f"{printable(text)} is not a valid file URL") from error
    if parts.netloc not in ("", "localhost"):
        raise AudioNotFoundError(f"{printable(text)} is on another machine: give a path or an http(s) URL")
    return unquote(parts.path)


def name_of(source: AudioInput) -> str:
    """A short printable name: the path, the URL without its secrets, or what kind of thing it is."""
    kind = kind_of(source)
    if kind is Kind.ARRAY:
        return f"array of shape {source[0].shape}"  # type: ignore[index, union-attr]
    if kind is Kind.BYTES:
        return f"{memoryview(source).nbytes} bytes"  # type: ignore[arg-type]
    if kind is Kind.FILE:
        name = getattr(source, "name", None)
        return printable(name) if isinstance(name, str) else "file object"
    return url_name(str(source)) if kind is Kind.URL else printable(os.fsdecode(source))  # type: ignore[arg-type]


def url_name(url: str) -> str:
    """The URL without user, password, query and fragment: those may be secrets."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return printable(f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}")


def printable(text: str) -> str:
    """One line of at most 200 characters, whatever is in `text`."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= MAX_NAME else f"{clean[: MAX_NAME - 3]}..."


def _is_file_url(text: str) -> bool:
    return text[:7].lower() == "file://"
