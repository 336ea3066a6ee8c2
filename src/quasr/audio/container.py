"""Frames of the first sound track of anything that PyAV opens, and what was damaged in it."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import av
import av.error
from av.stream import Disposition

from quasr.audio.samples import check_rate, to_mono
from quasr.audio.spool import checked, reading
from quasr.errors import AudioDecodeError
from quasr.types import Notice

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

# A playlist may name other files and URLs; no protocol is allowed, so it cannot reach them.
CONTAINER_OPTIONS = {"protocol_whitelist": "none"}
DURATION_SLACK = 0.2
"""Seconds that decoders may lose at the ends without anything being wrong (priming, padding)."""
RIFF_STREAMED = 0x7FFF_0000
"""A RIFF size from here on is what programs write that do not know the size, as into a pipe."""


class ByteReader:
    """The rest of a seekable binary file, seen as a file of its own; has no name that could sway format probing."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        with reading(name):
            self._base = file.tell()
            self.size = file.seek(0, 2) - self._base
            file.seek(self._base)

    def read(self, size: int) -> bytes:
        """At most `size` bytes: PyAV copies all it gets into a buffer of that size without looking."""
        with reading(self._name):
            data = checked(self._file.read(size), self._name)
        if len(data) > size:
            raise AudioDecodeError(f"{self._name}: read({size}) gives {len(data)} bytes, which no file should")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of io.IOBase, counted from where the file stood at first."""
        with reading(self._name):
            return self._file.seek(offset + self._base if whence == 0 else offset, whence) - self._base

    def tell(self) -> int:
        """Bytes from where the file stood at first."""
        with reading(self._name):
            return self._file.tell() - self._base


@dataclass(slots=True)
class Damage:
    """What went wrong while decoding, in seconds of the sound that was decoded."""

    decoded: float = 0.0
    failures: int = 0
    first: float = 0.0
    missing: float = 0.0

    def fail(self) -> None:
        """Notes one packet that could not be read or decoded."""
        self.first = self.first if self.failures else self.decoded
        self.failures += 1

    def expect(self, stated: float | None) -> None:
        """Compares what was decoded with the duration that the file states."""
        if stated is not None and stated - self.decoded > DURATION_SLACK:
            self.missing = stated - self.decoded

    def notice(self, name: str) -> Notice | None:
        """One `damaged_audio` notice for the whole file, None where nothing was wrong."""
        if not self.failures and not self.missing:
            return None
        parts = [f"{self.failures} damaged parts from {self.first:.1f} s on were skipped"] if self.failures else []
        parts += [f"{self.missing:.1f} s of the stated duration are missing"] if self.missing else []
        return Notice(
            code="damaged_audio",
            message=f"{name} is damaged: {' and '.join(parts)}; the rest ({self.decoded:.1f} s) was used",
            start=self.first if self.failures else self.decoded,
            end=self.decoded,
        )


def blocks(reader: ByteReader, name: str, damage: Damage) -> Iterator[tuple[NDArray[np.float32], int]]:
    """(mono samples, rate) of each frame of the first sound track. Fills `damage`, complete after the last.

    Raises AudioDecodeError if the container or the codec is not known, or there is no sound track.
    """
    with _open(reader, name) as container:
        stream = _sound_track(container, name)
        for frame in _frames(container, stream, damage):
            rate = check_rate(frame.sample_rate, name)
            damage.decoded += frame.samples / rate
            yield to_mono(_values(frame, name), name), rate
        damage.expect(_stated_seconds(container, stream, reader))


@contextmanager
def _not_swallowed() -> Iterator[None]:
    """Raises what is no error, as Ctrl-C, where it came inside a callback of FFmpeg's.

    PyAV passes errors on, but hands KeyboardInterrupt to `sys.unraisablehook` and tells FFmpeg that the file has ended:
    a transcript would be cut short and look complete. Signals come in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    swallowed: list[BaseException] = []
    before = sys.unraisablehook

    def keep(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_value is None or isinstance(unraisable.exc_value, Exception):
            before(unraisable)
        else:
            swallowed.append(unraisable.exc_value)

    sys.unraisablehook = keep
    try:
        yield
    finally:
        sys.unraisablehook = before
        if swallowed:
            raise swallowed[0]


@contextmanager
def _open(reader: ByteReader, name: str) -> Iterator[Any]:
    if reader.size == 0:
        raise AudioDecodeError(f"{name} is empty: it has 0 bytes")
    try:
        with _not_swallowed():
            container = av.open(reader, metadata_errors="replace", container_options=CONTAINER_OPTIONS)
    except av.error.FFmpegError as error:
        raise AudioDecodeError(f"{name} is not audio in any known format, or its header is damaged") from error
    with container:
        yield container


def _sound_track(container: Any, name: str) -> Any:
    if not container.streams.audio:
        raise AudioDecodeError(f"{name} has no sound track")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise AudioDecodeError(f"{name}: the codec of its sound track is not known")
    return stream


def _frames(container: Any, stream: Any, damage: Damage) -> Iterator[Any]:
    """Frames of all packets that decode; a packet that does not is counted, one that cannot be read is the end."""
    packets = container.demux(stream)
    while True:
        try:
            with _not_swallowed():
                packet = next(packets, None)
        except av.error.FFmpegError:
            damage.fail()
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damage.fail()
            continue
        yield from frames


def _values(frame: Any, name: str) -> NDArray[Any]:
    """(samples, channels) of a frame, in its own type."""
    try:
        values: NDArray[Any] = frame.to_ndarray()
    except ValueError as error:
        raise AudioDecodeError(f"{name}: the sample format {frame.format.name} is not supported") from error
    if frame.format.is_planar:
        return values.T
    return values.reshape(-1, frame.layout.nb_channels)


def _stated_seconds(container: Any, stream: Any, reader: ByteReader) -> float | None:
    """The duration that the file itself states; None where it states none and FFmpeg only has a guess."""
    if container.format.name == "wav":
        return _riff_seconds(stream, reader)
    if _has_pictures(container) and "mov" not in container.format.name:
        return None  # the stated duration may be that of the pictures
    if stream.duration is not None:
        seconds = float(stream.duration * stream.time_base)
        return None if _is_guess(seconds, stream, reader) else seconds
    if container.duration is not None and len(container.streams) == 1:
        return float(container.duration / av.time_base)
    return None


def _has_pictures(container: Any) -> bool:
    """Whether there is a video track; the cover of an album is none."""
    return any(not track.disposition & Disposition.attached_pic for track in container.streams.video)


def _is_guess(seconds: float, stream: Any, reader: ByteReader) -> bool:
    """Whether a duration is the file's size over the bit rate, FFmpeg's guess for raw mp3 and aac."""
    guess = 8 * reader.size / stream.codec_context.bit_rate if stream.codec_context.bit_rate else 0.0
    return abs(guess - seconds) < 0.05 * seconds


def _riff_seconds(stream: Any, reader: ByteReader) -> float | None:
    """From the RIFF header: FFmpeg cuts what that states down to the bytes that are there."""
    reader.seek(0)
    head = reader.read(8)
    stated = int.from_bytes(head[4:8], "little")
    bit_rate = stream.codec_context.bit_rate
    if head[:4] != b"RIFF" or stated >= RIFF_STREAMED or not bit_rate or stream.duration is None:
        return None
    missing = max(stated + 8 - reader.size, 0)
    return float(stream.duration * stream.time_base) + 8 * missing / bit_rate
