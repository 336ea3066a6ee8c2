"""Every input and format to mono 16 kHz, and every bad input to one line."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
import wave
from typing import TYPE_CHECKING

import numpy as np
import pytest
from audio_samples import FORMATS, OneWay, encode, sample_file, silent_video, tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quasr.audio.decode import load, stream
from quasr.audio.fetch import FetchLimits
from quasr.errors import (
    AudioDecodeError,
    AudioError,
    AudioNotFoundError,
    AudioTooLargeError,
    EmptyAudioError,
    OptionError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.types import Notice


@pytest.fixture(scope="module")
def media() -> dict[str, bytes]:
    return {name: sample_file(name) for name in FORMATS}


def inner(samples: np.ndarray) -> np.ndarray:
    """Without the 100 ms at either end, where filters and codecs settle."""
    return samples[1600:-1600]


def wave_file(samples: np.ndarray, rate: int) -> bytes:
    """A mono 16-bit wav by the standard library, which is another writer than PyAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def best_fit_error(samples: np.ndarray, hz: float) -> tuple[float, float]:
    """(amplitude, relative rest) of the sine of `hz` that fits `samples` best: independent of codec delay."""
    time = np.arange(len(samples)) / 16_000
    basis = np.stack([np.sin(2 * np.pi * hz * time), np.cos(2 * np.pi * hz * time)], axis=1)
    weights = np.linalg.lstsq(basis, samples.astype(np.float64), rcond=None)[0]
    amplitude = float(np.hypot(*weights))
    return amplitude, float(np.sqrt(np.mean((samples - basis @ weights) ** 2)) / amplitude)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_tone_that_was_encoded(name: str, media: dict[str, bytes]) -> None:
    notices: list[Notice] = []
    samples = load(media[name], on_warning=notices.append)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) - 16_000) <= 0.05 * 16_000
    amplitude, rest = best_fit_error(inner(samples), 440.0)
    assert amplitude == pytest.approx(0.3, rel=0.05)
    assert rest < 0.05
    assert notices == []
    tolerance = FORMATS[name][3]
    if tolerance is not None:
        assert len(samples) == 16_000
        np.testing.assert_allclose(inner(samples), inner(tone(1.0, 16_000)), atol=tolerance)


@pytest.mark.parametrize("name", FORMATS)
def test_path_bytes_and_file_objects_are_bit_identical(name: str, media: dict[str, bytes], tmp_path: Path) -> None:
    data = media[name]
    path = tmp_path / "with space ü.bin"
    path.write_bytes(data)
    expected = load(data)
    offset = io.BytesIO(b"junk before" + data)
    offset.seek(len(b"junk before"))
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        for source in (path, str(path), path.as_uri(), bytearray(data), memoryview(data), file, raw, offset):
            np.testing.assert_array_equal(load(source), expected)
        assert not file.closed
    np.testing.assert_array_equal(load(OneWay(data)), expected)


def test_video_gives_its_sound() -> None:
    for container in ("mp4", "matroska"):
        data = encode(tone(1.0, 44_100)[None], 44_100, container, "aac", video=True)
        assert best_fit_error(inner(load(data)), 440.0)[0] == pytest.approx(0.3, rel=0.05)


def test_mono_is_the_mean_of_the_channels() -> None:
    left, right = tone(0.5, 16_000, 300.0), tone(0.5, 16_000, 900.0)
    samples = load(encode(np.stack([left, right]), 16_000, "wav", "pcm_f32le"))
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-7)
    six = np.random.default_rng(0).uniform(-1, 1, (6, 8000)).astype(np.float32)
    samples = load(encode(six, 16_000, "wav", "pcm_f32le"))
    np.testing.assert_allclose(samples, six.mean(axis=0), atol=1e-6)


def test_float_files_keep_values_beyond_one() -> None:
    loud = tone(0.1, 16_000, level=3.0)
    np.testing.assert_array_equal(load(encode(loud[None], 16_000, "wav", "pcm_f32le")), loud)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int8, [-128, 0, 64], [-1.0, 0.0, 0.5]),
        (np.uint8, [0, 128, 192], [-1.0, 0.0, 0.5]),
        (np.int16, [-32768, 0, 16384], [-1.0, 0.0, 0.5]),
        (np.dtype(">i2"), [-32768, 0, 16384], [-1.0, 0.0, 0.5]),
        (np.uint16, [0, 32768, 49152], [-1.0, 0.0, 0.5]),
        (np.int32, [-(2**31), 0, 2**30], [-1.0, 0.0, 0.5]),
        (np.int64, [-32768, 0, 16384], [-1.0, 0.0, 0.5]),
        (np.dtype(">i8"), [-32768, 0, 16384], [-1.0, 0.0, 0.5]),
        (np.float16, [-1.0, 0.0, 0.5], [-1.0, 0.0, 0.5]),
        (np.float64, [-2.0, 0.0, 0.5], [-2.0, 0.0, 0.5]),
    ],
)
def test_array_types_are_scaled(dtype: np.dtype, values: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(load((np.array(values, dtype=dtype), 16_000)), np.array(expected, np.float32))


@pytest.mark.parametrize("first", [0, 20_000])
def test_what_numpy_makes_of_sixteen_bits_is_not_taken_for_silence(first: int) -> None:
    """The whole array decides, not the block of it at hand."""
    samples = (tone(20.0, 16_000) * 32767).astype(np.int16)
    samples[:first] = 0
    np.testing.assert_array_equal(load((np.array(samples.tolist()), 16_000)), load((samples, 16_000)))


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, [-256.0, 0.5], [-256.0, 0.5]),
        (np.float32, [-16384.0, 8192.0], [-0.5, 0.25]),
        (np.float16, [16384.0, -40000.0], [0.5, -40000 / 32768]),
        (np.float64, [2.0**30, -(2.0**31)], [0.5, -1.0]),
        (np.float64, [2.0**22, 0.0], [2.0**-9, 0.0]),
    ],
)
def test_floats_that_were_integers_are_scaled(dtype: np.dtype, values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(load((np.array(values, dtype=dtype), 16_000)), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.int64, [0, 32768]),
        (np.int64, [-32769, 0]),
        (np.int64, [-(2**63), 2**62]),
        (np.uint32, [0, 1000]),
        (np.uint64, [0, 2**64 - 1]),
    ],
)
def test_integers_of_unknown_full_scale_are_refused(dtype: np.dtype, values: list[int]) -> None:
    with pytest.raises(AudioDecodeError, match=f"values from {values[0]} to {values[1]}, whose full scale") as error:
        load((np.array(values, dtype=dtype), 16_000))
    one_line(error)


def test_arrays_at_16_khz_need_neither_ffmpeg_nor_soxr() -> None:
    code = (
        "import sys\nsys.modules.update(av=None, soxr=None)\n"
        "import numpy, quasr.pipeline.transcriber\nfrom quasr.audio.decode import load\n"
        "print(len(load((numpy.zeros(5), 16000))))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"5\n"


class Interrupted(io.BytesIO):
    """Ctrl-C comes while FFmpeg reads the file for the `count`-th time."""

    def __init__(self, data: bytes, count: int) -> None:
        super().__init__(data)
        self.left = count

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().read(size)


@pytest.mark.parametrize("name", ["wav16", "flac", "mp3", "m4a", "ogg", "mkv", "aac"])
def test_an_interrupt_inside_ffmpeg_is_not_taken_for_the_end(name: str) -> None:
    data, hook = sample_file(name, 5.0), sys.unraisablehook
    for count in (1, 2, 5, 20):
        file = Interrupted(data, count)
        raised = False
        try:
            load(file)
        except KeyboardInterrupt:
            raised = True
        assert raised == (file.left <= 0)
        assert raised or count > 2
        assert sys.unraisablehook is hook


def test_array_shapes() -> None:
    both = np.stack([tone(0.1, 16_000, 300.0), tone(0.1, 16_000, 900.0)])
    expected = both.mean(axis=0)
    np.testing.assert_allclose(load((both, 16_000)), expected, atol=1e-7)
    np.testing.assert_allclose(load((both.T, 16_000)), expected, atol=1e-7)
    np.testing.assert_array_equal(load((both[:1], 16_000)), both[0])


def test_array_equals_the_file_it_was_written_to() -> None:
    samples = (tone(1.3, 44_100) * 32767).astype(np.int16)
    np.testing.assert_array_equal(load((samples, 44_100)), load(wave_file(samples, 44_100)))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_length_and_tone(rate: int) -> None:
    samples = load((tone(1.0, rate), rate))
    assert len(samples) == 16_000
    np.testing.assert_allclose(inner(samples), inner(tone(1.0, 16_000)), atol=1e-4)


def test_resampling_lets_nothing_alias() -> None:
    samples = load((tone(1.0, 48_000, hz=9_500.0), 48_000))
    assert float(np.abs(inner(samples)).max()) < 1e-4


def test_block_size_does_not_change_the_samples(media: dict[str, bytes]) -> None:
    expected = load(media["mp3"])
    for seconds in (0.01, 0.3, 99.0):
        parts = list(stream(media["mp3"], block_seconds=seconds))
        assert {len(part) for part in parts[:-1]} <= {round(seconds * 16_000)}
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_chained_streams_of_two_rates() -> None:
    first = encode(tone(1.0, 44_100)[None], 44_100, "ogg", "flac")
    second = encode(tone(1.0, 22_050)[None], 22_050, "ogg", "flac")
    samples = load(first + second, on_warning=lambda notice: None)
    assert len(samples) in (16_000, 32_000)
    assert best_fit_error(inner(samples[:16_000]), 440.0)[0] == pytest.approx(0.3, rel=0.01)


# --- bad input: one line, the right class


def one_line(error: pytest.ExceptionInfo[AudioError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_missing_file_folder_and_strange_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "no.wav", tmp_path, tmp_path / "nul\0byte", tmp_path / ("x" * 5000), tmp_path / "a\nb"):
        with pytest.raises(AudioNotFoundError) as error:
            load(path)
        one_line(error)
    with pytest.raises(AudioNotFoundError, match="another machine"):
        load("file://server/share/a.wav")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.wav"
    path.write_bytes(b"x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # the tests may run as root, whom no mode stops

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(AudioNotFoundError, match=r"secret\.wav may not be read: check its permissions"):
        load(path)


def test_not_audio(tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("This is a shopping list.\n" * 100)
    with pytest.raises(AudioDecodeError, match=r"text\.wav is not audio"):
        load(text)
    with pytest.raises(AudioDecodeError, match="is empty"):
        load(b"")
    with pytest.raises(AudioDecodeError, match="is empty"):
        load(OneWay(b""))
    for container in ("mp4", "matroska"):
        with pytest.raises(AudioDecodeError, match="no sound track"):
            load(silent_video(container))


def test_zero_samples() -> None:
    for source in (
        wave_file(np.zeros(0, np.int16), 16_000),
        (np.zeros(0, np.float32), 16_000),
        (np.zeros((0, 2), np.int16), 44_100),
    ):
        with pytest.raises(EmptyAudioError) as error:
            load(source)
        one_line(error)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_sound(bad: float) -> None:
    samples = tone(0.1, 16_000)
    samples[700] = bad
    for source in ((samples, 16_000), (samples.astype(np.float64), 44_100)):
        with pytest.raises(AudioDecodeError, match="NaN, infinite or beyond"):
            load(source)
    with pytest.raises(AudioDecodeError, match="NaN, infinite or beyond"):
        load(encode(samples[None], 16_000, "wav", "pcm_f32le"))
    with pytest.raises(AudioDecodeError, match="NaN, infinite or beyond"):
        load((np.array([1e300]), 16_000))


@pytest.mark.parametrize("rate", [0, -16_000, 16_000.0, True, None, "16000", 10, 10**9])
def test_bad_rates(rate: object) -> None:
    with pytest.raises(AudioDecodeError, match="sampling rate"):
        load((tone(0.1, 16_000), rate))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4)),
        np.zeros((100, 100)),
        np.zeros(5, bool),
        np.zeros(5, complex),
        np.array(["a"]),
        np.array(1.0),
    ],
)
def test_arrays_that_are_no_sound(array: np.ndarray) -> None:
    with pytest.raises(AudioDecodeError) as error:
        load((array, 16_000))
    one_line(error)


def test_wrong_types() -> None:
    for source in (None, 3, [1, 2], (tone(0.1, 16_000),), ([0.0], 16_000)):
        with pytest.raises(OptionError, match="audio cannot be"):
            load(source)
    with pytest.raises(OptionError, match="block_seconds"):
        list(stream(b"x", block_seconds=0))


def test_file_objects_that_misbehave(media: dict[str, bytes]) -> None:
    class Greedy(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(-1)

    with pytest.raises(AudioDecodeError, match="open it in binary mode"):
        load(io.StringIO("text"))
    with pytest.raises(AudioDecodeError, match="which no file should"):
        load(Greedy(media["wav16"]))


class Breaks(io.BytesIO):
    """Reads so many times, and then fails as a disk does, or a network folder."""

    def __init__(self, data: bytes, reads: int, seeks: bool) -> None:
        super().__init__(data)
        self.left, self.seeks = reads, seeks

    def seekable(self) -> bool:
        return self.seeks

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize("reads", [0, 1, 3])
@pytest.mark.parametrize("seeks", [True, False])
def test_files_that_break_while_they_are_read(media: dict[str, bytes], reads: int, seeks: bool) -> None:
    with pytest.raises(AudioDecodeError, match="file object cannot be read: Input/output error"):
        load(Breaks(media["wav16"] * 2, reads, seeks))


def test_files_that_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        pass
    with pytest.raises(AudioDecodeError, match=r"a\.wav cannot be read: .*closed file"):
        load(file)


def test_a_pipe_that_the_disk_cannot_hold(media: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda **_: Full())
    with pytest.raises(AudioTooLargeError, match=r"does not fit into the temporary folder \(No space left on device\)"):
        load(OneWay(media["wav16"]))


def test_pipe_over_the_size_limit(media: dict[str, bytes]) -> None:
    with pytest.raises(AudioTooLargeError, match="over the limit of 5000 bytes"):
        load(OneWay(media["wav16"]), FetchLimits(max_bytes=5000))


# --- damage: what is there is used, and said


@pytest.mark.parametrize("name", ["wav16", "wav24", "wavfloat", "flac", "mp3", "webm", "mkv", "aac"])
def test_truncated_files_give_what_is_there_and_a_notice(name: str) -> None:
    data = sample_file(name, 3.0)
    notices: list[Notice] = []
    samples = load(data[: int(len(data) * 0.6) - 3], on_warning=notices.append)
    assert 1.2 < len(samples) / 16_000 < 2.2
    assert best_fit_error(inner(samples)[:16_000], 440.0)[0] == pytest.approx(0.3, rel=0.05)
    assert [notice.code for notice in notices] == ["damaged_audio"]
    assert notices[0].end == pytest.approx(len(samples) / 16_000, abs=0.01)


def test_hole_in_the_middle_is_reported_where_it_is() -> None:
    data = bytearray(sample_file("mp3", 3.0))
    at = len(data) // 2
    data[at : at + 4000] = bytes(4000)
    notices: list[Notice] = []
    samples = load(bytes(data), on_warning=notices.append)
    assert 2.0 < len(samples) / 16_000 < 3.0
    assert [notice.code for notice in notices] == ["damaged_audio"]
    assert notices[0].start == pytest.approx(1.5, abs=0.2)


def test_no_false_alarm_without_a_stated_duration() -> None:
    varying = np.concatenate([tone(2.0, 44_100), np.zeros(4 * 44_100, np.float32)])[None]
    bare = encode(varying, 44_100, "mp3", "libmp3lame", options={"write_xing": "0"})
    streamed = bytearray(sample_file("wav16"))
    streamed[4:8] = b"\xff" * 4
    notices: list[Notice] = []
    film = encode(tone(0.1, 44_100)[None], 44_100, "asf", "aac", video=True)
    for data in (bare, bytes(streamed), film, sample_file("mp3") + b"TAG" + bytes(125)):
        load(data, on_warning=notices.append)
    assert notices == []


def test_damage_is_logged_where_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    data = sample_file("flac", 2.0)
    load(data[: len(data) // 2])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is damaged" in caplog.text


def test_nothing_decodes() -> None:
    data = bytearray(sample_file("flac"))
    data[100:] = np.random.default_rng(0).bytes(len(data) - 100)
    with pytest.raises(AudioDecodeError, match="is damaged: none of its sound"):
        load(bytes(data))


def test_playlists_cannot_reach_other_files(
    tmp_path: Path, media: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.wav").write_bytes(media["wav16"])
    monkeypatch.chdir(tmp_path)
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:3,\n"
    for text in (
        "ffconcat version 1.0\nfile secret.wav\n",
        f"{head}secret.wav\n#EXT-X-ENDLIST\n",
        f"{head}http://127.0.0.1:9/a.ts\n",
    ):
        (tmp_path / "list.m3u8").write_text(text)
        for source in (text.encode(), tmp_path / "list.m3u8"):
            with pytest.raises(AudioDecodeError) as error:
                load(source)
            one_line(error)


def test_damaged_files_make_no_noise_on_stderr(tmp_path: Path) -> None:
    data = sample_file("mp3", 2.0)
    path = tmp_path / "broken.mp3"
    path.write_bytes(data[:9000] + bytes(3000) + data[12000:-500])
    code = "import sys; from quasr.audio.decode import load; load(sys.argv[1], on_warning=lambda notice: None)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


MEMORY_SCRIPT = """
import resource, sys
from quasr.audio.chunk import pieces
from quasr.audio.decode import stream
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for piece in pieces(stream(sys.argv[1]), 30.0): pass
before = peak()
total = sum(len(piece.samples) for piece in pieces(stream(sys.argv[2]), 30.0))
print(total, peak() - before)
"""


@pytest.mark.slow
def test_memory_is_constant_for_long_files(tmp_path: Path) -> None:
    for name, minutes in (("short.wav", 2), ("long.wav", 60)):
        with wave.open(str(tmp_path / name), "wb") as out:
            out.setnchannels(2)
            out.setsampwidth(2)
            out.setframerate(44_100)
            for second in range(60 * minutes):
                noise = np.random.default_rng(second % 7).integers(-3000, 3000, 2 * 44_100, dtype=np.int16)
                out.writeframes(noise.tobytes())
    arguments = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "short.wav"), str(tmp_path / "long.wav")]
    total, grown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    assert int(total) == 3600 * 16_000
    assert float(grown) < 16  # MiB; all samples would be 220


# --- fuzz: only AudioError comes out, and soon

FUZZ = settings(max_examples=60, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
HEADS = (
    b"",
    b"RIFF\xff\xff\xff\xffWAVEfmt ",
    b"fLaC",
    b"ID3\x04",
    b"OggS",
    b"\x1aE\xdf\xa3",
    b"\x00\x00\x00\x18ftypmp42",
)


def tolerate(data: bytes) -> None:
    """Loads it, or fails as it should; any other exception fails the test."""
    message = ""
    samples = np.ones(1, np.float32)
    try:
        samples = load(data, on_warning=lambda notice: None)
    except AudioError as error:
        message = str(error)
    assert "\n" not in message
    assert samples.size
    assert np.isfinite(samples).all()


@FUZZ
@given(st.sampled_from(HEADS), st.binary(max_size=3000))
def test_fuzz_random_bytes(head: bytes, body: bytes) -> None:
    tolerate(head + body)


@FUZZ
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=30),
    st.floats(0.01, 1),
    st.booleans(),
)
def test_fuzz_mutated_files(
    media: dict[str, bytes], name: str, changes: list[tuple[float, int]], keep: float, in_head: bool
) -> None:
    data = bytearray(media[name])
    reach = min(len(data), 400) if in_head else len(data)
    for place, value in changes:
        data[int(place * (reach - 1))] = value
    tolerate(bytes(data[: max(1, int(keep * len(data)))]))
