"""The service, lazy segments and the stand-ins on the bundled demo model: answers, order, memory."""

from __future__ import annotations

import gc
import io
import threading
import wave
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from made_sound import RATE, sound

import quasr
from quasr.audio.decode import load as decode
from quasr.audio.source import Kind
from quasr.compat.faster_whisper import WhisperModel
from quasr.compat.qwen_asr import Qwen3ASRModel
from quasr.errors import AudioDecodeError, AudioNotFoundError, OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE = Path(str(files("quasr"))) / "demo" / "sample.flac"
STATUS = Path("/proc/self/status")

pytestmark = pytest.mark.skipif(not SAMPLE.is_file(), reason="the demo model is not in this checkout")


@pytest.fixture(scope="module")
def sample() -> NDArray[np.float32]:
    return decode(SAMPLE)


def wav(samples: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def cuts(sample: NDArray[np.float32], count: int) -> list[bytes]:
    """Different clips of 0.8 to 1.6 s."""
    starts = np.linspace(0, len(sample) - 1.6 * RATE, count).astype(int)
    lengths = np.linspace(0.8 * RATE, 1.6 * RATE, count).astype(int)
    return [wav(sample[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def test_file_bytes_and_garbage() -> None:
    with quasr.SpeechService("demo", device="cpu") as service:
        spoken = service.transcribe_file(SAMPLE)
        assert spoken.success
        assert spoken.text.startswith("Speech is turned into text")
        assert (spoken.language, spoken.error) == ("English", None)
        assert spoken.audio_duration == pytest.approx(5.575, abs=0.01)
        assert service.transcribe_bytes(SAMPLE.read_bytes()) == spoken
        missing = service.transcribe_file("no/such/file.wav")
        garbage = service.transcribe_bytes(b"no audio")
    assert (missing.success, missing.text, missing.language, missing.audio_duration) == (False, "", "", 0.0)
    assert "no/such/file.wav" in str(missing.error)
    assert "8 bytes" in str(garbage.error)
    assert "\n" not in f"{missing.error}{garbage.error}"


def test_a_model_that_is_not_there_is_an_answer() -> None:
    with quasr.SpeechService("no-such-folder", device="cpu") as service:
        result = service.transcribe_file(SAMPLE)
    assert not result.success
    assert "no-such-folder" in str(result.error)


@pytest.mark.slow
def test_fifty_threads_get_what_one_after_the_other_gets(sample: NDArray[np.float32], tmp_path: Path) -> None:
    clips = cuts(sample, 10)
    empty, noise = wav(np.zeros(0, np.float32)), b"\xff\xfb" + bytes(range(256))
    inputs: list[bytes | Path] = [*clips, empty, noise, tmp_path / "missing.wav", b""] * 4
    with quasr.load("demo", device="cpu") as transcriber:
        alone = [transcriber.transcribe(clip).text for clip in clips]
    assert len(set(alone)) > 5
    expected: list[str | None] = [*alone, None, None, None, None] * 4
    start = threading.Barrier(50)

    def ask(service: quasr.SpeechService, index: int) -> quasr.ServiceResult:
        if index < 50:
            start.wait(30)
        source = inputs[index]
        return service.transcribe_file(source) if isinstance(source, Path) else service.transcribe_bytes(source)

    with quasr.SpeechService("demo", device="cpu") as service, ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda index: ask(service, index), range(len(inputs))))
    assert [result.text if result.success else None for result in results] == expected
    assert all(result.error for result in results if not result.success)


def resident_kib() -> int:
    gc.collect()
    return int(STATUS.read_text(encoding="utf-8").split("VmRSS:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="the system does not tell a process's memory in /proc")
def test_loading_and_unloading_twenty_times_leaks_nothing(sample: NDArray[np.float32]) -> None:
    clip = wav(sample[: RATE * 2])
    with quasr.SpeechService("demo", device="cpu") as service:
        with quasr.load("demo", device="cpu") as transcriber:
            weights_kib = transcriber.info.weight_bytes // 1024
        del transcriber
        figures = []
        for _ in range(21):
            assert service.transcribe_bytes(clip).success
            loaded = resident_kib()
            service.unload()
            figures.append(resident_kib())
            assert loaded - figures[-1] > 0.8 * weights_kib
    assert figures[-1] <= figures[0] * 1.05
    assert len([thread for thread in threading.enumerate() if thread.name == "quasr-service"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_unloading_gives_the_device_s_memory_back() -> None:
    """An array, which only the inside of the service takes: machines with a GPU for tests need not have PyAV."""
    with quasr.SpeechService("demo", device="cuda") as service:
        free = []
        for _ in range(21):
            assert service._submit((sound(2.0), RATE), Kind.ARRAY, {}).result().success
            assert torch.cuda.memory_reserved() > 0
            service.unload()
            assert torch.cuda.memory_allocated() < 10 << 20
            free.append(torch.cuda.mem_get_info()[0])
    total = torch.cuda.mem_get_info()[1]
    assert total - free[-1] <= (total - free[0]) * 1.05


def test_segments_come_as_their_batches_finish(sample: NDArray[np.float32]) -> None:
    pause = np.zeros(RATE // 2, np.float32)
    audio = (np.concatenate([sample[: RATE * 2], pause, sample[: RATE * 2], pause, sample[: RATE * 2]]), RATE)
    done: list[float] = []
    with quasr.load("demo", device="cpu") as transcriber:
        options = quasr.TranscribeOptions(piece_seconds=3.0, batch_size=1)
        whole = transcriber.transcribe(audio, options)
        segments = transcriber.stream_segments(audio, options, progress=done.append)
        assert done == []
        first = next(segments)
        assert len(done) == 1
        assert [first, *segments] == list(whole.segments)
    assert len(whole.segments) > 2
    assert len(done) >= len(whole.segments)
    assert done == sorted(done)


def test_lazy_segments_check_options_at_once_and_raise_where_the_audio_ends(tmp_path: Path) -> None:
    with quasr.load("demo", device="cpu") as transcriber:
        with pytest.raises(OptionError):
            transcriber.stream_segments(SAMPLE, batch_size=0)
        missing = transcriber.stream_segments(tmp_path / "none.wav")
        with pytest.raises(AudioNotFoundError):
            next(missing)
        with pytest.raises(AudioDecodeError):
            list(transcriber.stream_segments(b"no audio"))


def test_the_stand_ins_say_what_we_say() -> None:
    text = (SAMPLE.with_name("sample.txt")).read_text(encoding="utf-8").strip()
    model = Qwen3ASRModel.from_pretrained("demo", device_map="cpu")
    (result,) = model.transcribe(str(SAMPLE), language="English")
    segments, info = WhisperModel("demo", device="cpu").transcribe(str(SAMPLE))
    assert (result.text, result.language) == ("".join(segment.text for segment in segments), "English")
    assert result.text.lower().split()[:6] == text.lower().split()[:6]
    assert (info.language, info.duration) == ("en", pytest.approx(5.575, abs=0.01))
    assert 0.5 < info.language_probability <= 1.0
