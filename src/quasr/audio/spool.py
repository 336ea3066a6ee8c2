"""Keeps a stream of unknown length in a temporary file, in constant memory and under a size limit."""

from __future__ import annotations

import tempfile
from typing import IO, TYPE_CHECKING

from quasr.errors import AudioDecodeError, AudioTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY_BYTES = 8 * 1024**2
"""Shorter streams stay in memory, longer ones go to disk."""
READ_BYTES = 64 * 1024


def spool(read: Callable[[int], object], max_bytes: int, name: str) -> IO[bytes]:
    """Everything that `read(size)` gives until it gives nothing, as a temporary file at position 0.

    Raises AudioTooLargeError past `max_bytes`, AudioDecodeError if `read` does not give bytes.
    """
    file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        while data := checked(read(READ_BYTES), name):
            if file.tell() + len(data) > max_bytes:
                raise AudioTooLargeError(too_large(name, max_bytes))
            file.write(data)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def checked(data: object, name: str) -> bytes:
    """`data` if it is bytes. Text files give str, non-blocking ones None: AudioDecodeError."""
    if not isinstance(data, bytes):
        raise AudioDecodeError(f"{name} gives {type(data).__name__}, not bytes: open it in binary mode ('rb')")
    return data


def too_large(name: str, max_bytes: int) -> str:
    """The message for an input over the size limit."""
    return f"{name} is over the limit of {max_bytes} bytes: raise max_bytes or give a shorter file"
