"""Any audio input to mono 16 kHz float32, as a stream of blocks in constant memory or all at once."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from quasr.audio.fetch import DEFAULT_LIMITS, FetchLimits, fetch
from quasr.audio.samples import Resampler, by_channel, check_rate, to_mono, with_known_scale
from quasr.audio.source import AudioInput, Kind, kind_of, name_of, path_of
from quasr.audio.spool import reading, spool
from quasr.errors import AudioDecodeError, AudioNotFoundError, EmptyAudioError, OptionError
from quasr.types import SAMPLE_RATE, Notice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

OnWarning = Callable[[Notice], None]
BLOCK_SECONDS = 10.0
ARRAY_BLOCK = 1 << 18
"""Samples of an array that are converted at a time."""

_log = logging.getLogger(__name__)


def log_notice(notice: Notice) -> None:
    """The default for `on_warning`: one line through `logging`, which prints it unless told otherwise."""
    _log.warning("%s", notice.message)


def load(
    source: AudioInput, limits: FetchLimits = DEFAULT_LIMITS, *, on_warning: OnWarning = log_notice
) -> NDArray[np.float32]:
    """All of `source`: (samples,) at 16 kHz. Errors and warnings are those of `stream`."""
    return np.concatenate(list(stream(source, limits, on_warning=on_warning)))


def stream(
    source: AudioInput,
    limits: FetchLimits = DEFAULT_LIMITS,
    *,
    block_seconds: float = BLOCK_SECONDS,
    on_warning: OnWarning = log_notice,
) -> Iterator[NDArray[np.float32]]:
    """Blocks of `block_seconds` (the last is shorter), mono at 16 kHz; errors come with the block they concern.

    Channels are averaged, integers scaled to [-1, 1), floats beyond [-1, 1] kept. Of several sound tracks the first
    is taken. A file object is read from where it stands and stays open; one that cannot seek is first
    copied to a temporary file, within `limits.max_bytes`. Where a file is damaged, the parts that decode are used
    and `on_warning` gets one Notice `damaged_audio` after the last block.

    Raises AudioNotFoundError, AudioFetchError, AudioTooLargeError, AudioDecodeError (not audio, no sound track,
    NaN, nothing decodes), EmptyAudioError (zero samples), OptionError (no audio input at all).
    """
    if not 0 < block_seconds < math.inf:
        raise OptionError(f"block_seconds must be a positive number of seconds, not {block_seconds}")
    name = name_of(source)
    if kind_of(source) is Kind.ARRAY:
        parts = _array_blocks(cast("tuple[NDArray[Any], int]", source), name)
    else:
        parts = _file_blocks(source, limits, name, on_warning)
    empty = True
    for block in _regroup(parts, max(1, round(block_seconds * SAMPLE_RATE))):
        empty = False
        yield block
    if empty:
        raise EmptyAudioError(f"{name} has no samples: record it again or leave it out")


def _array_blocks(source: tuple[NDArray[Any], int], name: str) -> Iterator[NDArray[np.float32]]:
    rate = check_rate(source[1], name)
    values = with_known_scale(by_channel(source[0], name), name)
    resampler = Resampler()
    for start in range(0, len(values), ARRAY_BLOCK):
        yield from resampler.feed(to_mono(values[start : start + ARRAY_BLOCK], name), rate)
    yield from resampler.finish()


def _file_blocks(
    source: AudioInput, limits: FetchLimits, name: str, on_warning: OnWarning
) -> Iterator[NDArray[np.float32]]:
    # Here, because arrays need no FFmpeg.
    from quasr.audio.container import ByteReader, Damage, blocks

    damage, resampler = Damage(), Resampler()
    with _opened(source, limits, name) as file:
        for samples, rate in blocks(ByteReader(file, name), name, damage):
            yield from resampler.feed(samples, rate)
    yield from resampler.finish()
    notice = damage.notice(name)
    if notice is not None and damage.decoded == 0:
        raise AudioDecodeError(f"{name} is damaged: none of its sound could be decoded")
    if notice is not None:
        on_warning(notice)


def _regroup(parts: Iterable[NDArray[np.float32]], size: int) -> Iterator[NDArray[np.float32]]:
    """The same samples in blocks of `size`; the last is shorter, none is empty."""
    held: list[NDArray[np.float32]] = []
    room = size
    for part in parts:
        rest = part
        while rest.size:
            held.append(rest[:room])
            rest, room = rest[room:], room - held[-1].size
            if not room:
                yield np.concatenate(held)
                held, room = [], size
    if held:
        yield np.concatenate(held)


@contextmanager
def _opened(source: AudioInput, limits: FetchLimits, name: str) -> Iterator[IO[bytes]]:
    """A seekable binary file with the bytes of `source`; closed afterwards unless it is the caller's own."""
    kind = kind_of(source)
    if kind is Kind.FILE and _can_seek(source, name):
        yield cast("IO[bytes]", source)
        return
    with _own_file(source, kind, limits, name) as file:
        if _can_seek(file, name):
            yield file
        else:
            with spool(_reader(file, name), limits.max_bytes, name) as copy:
                yield copy


@contextmanager
def _own_file(source: AudioInput, kind: Kind, limits: FetchLimits, name: str) -> Iterator[IO[bytes]]:
    if kind is Kind.FILE:
        file = spool(_reader(cast("IO[bytes]", source), name), limits.max_bytes, name)
    elif kind is Kind.BYTES:
        file = io.BytesIO(cast("bytes", source))
    elif kind is Kind.URL:
        file = fetch(cast("str", source), limits)
    else:
        file = _open_path(path_of(cast("str", source)), name)
    with file:
        yield file


def _open_path(path: str, name: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise AudioNotFoundError(f"{name} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise AudioNotFoundError(f"{name} is a folder: give the files in it") from error
    except PermissionError as error:
        raise AudioNotFoundError(f"{name} may not be read: check its permissions") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AudioNotFoundError(f"{name} cannot be opened: {reason}") from error


def _reader(file: IO[bytes], name: str) -> Callable[[int], object]:
    def read(size: int) -> object:
        with reading(name):
            return file.read(size)

    return read


def _can_seek(file: Any, name: str) -> bool:
    seekable = getattr(file, "seekable", None)
    with reading(name):
        return bool(seekable and seekable())
