"""Test media, made with PyAV: known samples in, the bytes of a file out."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

FORMATS = {
    # name: (container, codec, native rate, largest error against the input at 16 kHz; None for lossy codecs)
    "wav8": ("wav", "pcm_u8", 44_100, 2e-2),
    "wav16": ("wav", "pcm_s16le", 44_100, 1e-4),
    "wav24": ("wav", "pcm_s24le", 44_100, 1e-5),
    "wav32": ("wav", "pcm_s32le", 44_100, 1e-5),
    "wavfloat": ("wav", "pcm_f32le", 44_100, 1e-5),
    "wavdouble": ("wav", "pcm_f64le", 44_100, 1e-5),
    "flac": ("flac", "flac", 48_000, 1e-4),
    "mp3": ("mp3", "libmp3lame", 44_100, None),
    "m4a": ("ipod", "aac", 44_100, None),
    "ogg": ("ogg", "libopus", 48_000, None),
    "webm": ("webm", "libopus", 48_000, None),
    "mkv": ("matroska", "aac", 44_100, None),
    "aac": ("adts", "aac", 44_100, None),
}


def tone(seconds: float, rate: int, hz: float = 440.0, level: float = 0.3) -> np.ndarray:
    """(samples,) float32 sine."""
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode(
    channels: np.ndarray, rate: int, container: str, codec: str, *, video: bool = False, options: dict | None = None
) -> bytes:
    """(channels, samples) float32 -> the bytes of a file; with `video` a small picture track comes first."""
    file = io.BytesIO()
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(channels)]
    with av.open(file, "w", format=container, options=options or {}) as out:
        pictures = _video_track(out) if video else None
        track = out.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), format="fltp", layout=layout)
        frame.sample_rate = rate
        frame.time_base = Fraction(1, rate)
        frame.pts = 0
        to_codec = av.AudioResampler(format=track.format, layout=layout, rate=rate)
        for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
            out.mux(track.encode(part))
        out.mux(track.encode(None))
        if pictures is not None:
            _mux_pictures(out, pictures)
    return file.getvalue()


def silent_video(container: str = "mp4") -> bytes:
    """A file with a picture track and no sound track."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        _mux_pictures(out, _video_track(out))
    return file.getvalue()


def sample_file(name: str, seconds: float = 1.0) -> bytes:
    """A stereo 440 Hz tone in one of FORMATS."""
    container, codec, rate, _ = FORMATS[name]
    return encode(np.stack([tone(seconds, rate)] * 2), rate, container, codec)


def _video_track(out: av.container.OutputContainer) -> av.VideoStream:
    track = out.add_stream("mpeg4", rate=10)
    track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
    return track


def _mux_pictures(out: av.container.OutputContainer, track: av.VideoStream) -> None:
    for _ in range(5):
        out.mux(track.encode(av.VideoFrame(32, 32, "yuv420p")))
    out.mux(track.encode(None))


class OneWay:
    """A readable file object that cannot seek, like a pipe; gives short reads."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        """At most 1000 bytes."""
        return self._file.read(min(size, 1000) if size > 0 else 1000)
