"""Sample values: any type to float32, any channel count to mono, any rate to 16 kHz."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.errors import AudioDecodeError
from quasr.types import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import soxr
    from numpy.typing import NDArray

MAX_ABS = 2.0**31
"""Largest |x| of any integer format taken as float; its power spectrum still fits in float32."""
MOST_OVERDRIVEN, MOST_OF_16_BITS = 2.0**8, 2.0**20
"""Peaks of a float array: up to the first (48 dB too loud) it is one; up to the second its values were of 16 bits, with
room for sums of channels; beyond that of 24 or 32."""
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1_000, 6_000_000
"""Hz. Below, a few bytes would grow into gigabytes of samples; above, nothing records."""
RESAMPLE_QUALITY = "HQ"  # 20 bits: the noise it adds is below that of 16-bit recordings


def check_rate(rate: object, name: str) -> int:
    """`rate` in Hz as an int. Raises AudioDecodeError unless it is an integer between 1 kHz and 6 MHz."""
    if not isinstance(rate, (int, np.integer)) or isinstance(rate, bool):
        raise AudioDecodeError(f"{name}: the sampling rate must be a whole number of Hz, not {rate!r}")
    if not MIN_RATE <= int(rate) <= MAX_RATE:
        raise AudioDecodeError(f"{name}: a sampling rate of {rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")
    return int(rate)


def by_channel(array: NDArray[Any], name: str) -> NDArray[Any]:
    """A (samples, channels) view of (samples,), (samples, channels) or (channels, samples).

    An array with more columns than rows is (channels, samples): no clip has more channels than samples.
    """
    if array.ndim == 1 or (array.ndim == 2 and not array.size):
        return array.reshape(-1, 1)
    if array.ndim != 2:
        raise AudioDecodeError(f"{name} is not audio: give (samples,) or (samples, channels)")
    columns = array.T if array.shape[1] > array.shape[0] else array
    if columns.shape[1] > MAX_CHANNELS:
        raise AudioDecodeError(f"{name} has {columns.shape[1]} channels: at most {MAX_CHANNELS} are taken")
    return columns


def with_known_scale(array: NDArray[Any], name: str) -> NDArray[Any]:
    """An array of which the type says what full scale is: 1.0 of floats, of integers the type's own range.

    64-bit audio does not exist: an int64 array is what numpy makes of lists and of arithmetic, and by its type 16-bit
    samples would be silence. Floats that were integers (`astype(float)`) are far beyond what a model knows. Both are
    taken for what they were. Raises AudioDecodeError for larger int64 values, and for uint32 and uint64.
    """
    if not array.size or array.dtype.kind not in "fiu":
        return array
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        return _as_unit(array, float(max(-low, high)))
    if array.dtype.itemsize < 4 or array.dtype == np.int32:
        return array
    if array.dtype.kind == "i" and np.iinfo(np.int16).min <= low and high <= np.iinfo(np.int16).max:
        return array.astype(np.int16)
    raise AudioDecodeError(
        f"{name} holds {array.dtype} values from {low} to {high}, whose full scale nobody knows: "
        "convert it to int16, int32, or floats between -1 and 1"
    )


def _as_unit(array: NDArray[Any], peak: float) -> NDArray[Any]:
    """Floats with the scale of integers, to about 1; what is out of any range (NaN, too) is refused later."""
    if not MOST_OVERDRIVEN < peak <= MAX_ABS:
        return array
    full = 2.0**15 if peak <= MOST_OF_16_BITS else 2.0**31
    return np.divide(array, full, dtype=np.promote_types(array.dtype, np.float32))


def to_mono(values: NDArray[Any], name: str) -> NDArray[np.float32]:
    """(samples, channels) of any real type -> (samples,) float32, the mean of the channels.

    Integers are scaled to [-1, 1). Floats are kept as they are, beyond [-1, 1] too: clipping would distort what
    a float file can hold. Raises AudioDecodeError for NaN, infinity and values that no format can mean.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = _as_float(values, name)
        mono = scaled[:, 0] if scaled.shape[1] == 1 else scaled.mean(axis=1)
        mono = mono.astype(np.float32, copy=False)
    if not bool(np.all(np.abs(mono) <= MAX_ABS)):  # false for NaN as well
        raise AudioDecodeError(f"{name} holds samples that are NaN, infinite or beyond {MAX_ABS:g}: export it again")
    return mono


def _as_float(values: NDArray[Any], name: str) -> NDArray[Any]:
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if kind == "f":
        return values.astype(np.float32) if bits < 32 else values
    if kind not in "iu":
        raise AudioDecodeError(f"{name} holds {values.dtype} values: audio is integers or floats")
    scaled: NDArray[np.floating[Any]] = values.astype(np.float32 if bits <= 16 else np.float64)
    half = 2.0 ** (bits - 1)
    return (scaled - half if kind == "u" else scaled) / half


class Resampler:
    """Mono blocks of any rate to 16 kHz, by soxr; the rate may change on the way (chained files do that)."""

    def __init__(self) -> None:
        self._rate = SAMPLE_RATE
        self._stream: soxr.ResampleStream | None = None

    def feed(self, samples: NDArray[np.float32], rate: int) -> Iterator[NDArray[np.float32]]:
        """(samples,) at `rate` Hz in; blocks at 16 kHz out, as far as the filter can see."""
        if rate != self._rate:
            yield from self.finish()
            self._rate = rate
            if rate != SAMPLE_RATE:
                import soxr

                self._stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality=RESAMPLE_QUALITY)
        yield samples if self._stream is None else self._stream.resample_chunk(samples)

    def finish(self) -> Iterator[NDArray[np.float32]]:
        """What the filter still holds."""
        if self._stream is not None:
            yield self._stream.resample_chunk(np.empty(0, np.float32), last=True)
            self._stream = None
