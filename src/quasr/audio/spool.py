"""Keeps a stream of unknown length in a temporary file, in constant memory and under a size limit."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from quasr.errors import AudioDecodeError, AudioTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEMORY_BYTES = 8 * 1024**2
"""Shorter streams stay in memory, longer ones go to disk."""
READ_BYTES = 64 * 1024


def spool(read: Callable[[int], object], max_bytes: int, name: str) -> IO[bytes]:
    """Everything that `read(size)` gives until it gives nothing, as a temporary file at position 0.

    Raises AudioTooLargeError past `max_bytes` or what the disk holds, AudioDecodeError if `read` does not give bytes.
    """
    file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        while data := checked(read(READ_BYTES), name):
            if file.tell() + len(data) > max_bytes:
                raise AudioTooLargeError(too_large(name, max_bytes))
            _write(file, data, name)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _write(file: IO[bytes], data: bytes, name: str) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise AudioTooLargeError(
            f"{name} does not fit into the temporary folder ({error.strerror}): free some space, or set TMPDIR"
        ) from error


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Makes AudioDecodeError of what a file raises that breaks while it is read, or is closed: others are not ours."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise AudioDecodeError(f"{name} cannot be read: {reason}") from error


def checked(data: object, name: str) -> bytes:
    """`data` if it is bytes. Text files give str, non-blocking ones None: AudioDecodeError."""
    if not isinstance(data, bytes):
        raise AudioDecodeError(f"{name} gives {type(data).__name__}, not bytes: open it in binary mode ('rb')")
    return data


def too_large(name: str, max_bytes: int) -> str:
    """The message for an input over the size limit."""
    return f"{name} is over the limit of {max_bytes} bytes: raise max_bytes or give a shorter file"
