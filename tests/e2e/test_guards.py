"""The guards around the demo model: sound that is hard on a recogniser, and clean speech that must not be touched."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soxr
import torch

import quasr
from quasr.audio.decode import stream
from quasr.audio.fetch import FetchLimits
from quasr.engine.base import ClipRequest, ClipResult
from quasr.engine.device import Memory, Placement, choose
from quasr.model.config import read_config
from quasr.pipeline import engines
from quasr.quant.recipe import NO_RECIPE, recipe_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from quasr.audio.source import AudioInput
    from quasr.engine.base import Engine
    from quasr.quant.recipe import Recipe

RATE = 16_000
DEMO = Path(str(files("quasr"))) / "demo"
PUBLIC = Path(__file__).resolve().parents[2] / "../shared/speech/public"
CONTEXT = "Kwasar, Eleonore, Fourier and the quiet garden"

pytestmark = pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="the demo model is not in this checkout")


@pytest.fixture(scope="module")
def transcriber() -> Iterator[quasr.Transcriber]:
    torch.set_num_threads(1)
    with quasr.load("demo", engine="torch", device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def sample() -> NDArray[np.float32]:
    return np.concatenate(list(stream(str(DEMO / "sample.flac"), FetchLimits())))


SPOKEN = re.findall(r"\w+", (DEMO / "sample.txt").read_text(encoding="utf-8").lower())


def words(result: quasr.Transcript) -> list[str]:
    return re.findall(r"\w+", result.text.lower())


def noise(seconds: float, level: float) -> NDArray[np.float32]:
    return np.random.default_rng(5).normal(0, level, round(seconds * RATE)).astype(np.float32)


@pytest.mark.slow
def test_a_word_forty_times_is_stopped_tried_again_and_told(
    transcriber: quasr.Transcriber, sample: NDArray[np.float32]
) -> None:
    word = sample[round(1.5 * RATE) : round(2.2 * RATE)]
    result = transcriber.transcribe((np.tile(word, 40), RATE))
    (notice,) = result.warnings
    assert (notice.code, notice.start, notice.end) == ("repetition", 0.0, 28.0)
    assert notice.retry_helped is not None
    # 28 s may take 396 tokens; two tries, of which the second is in two parts, are stopped far sooner together.
    assert result.timings.tokens < 300
    assert {"text", "the"} <= set(words(result))
    assert "".join(segment.text for segment in result.segments) == result.text


@pytest.mark.parametrize("level", [0.0, 0.001, 0.1])
def test_the_context_is_not_heard_in_silence_and_noise(transcriber: quasr.Transcriber, level: float) -> None:
    result = transcriber.transcribe((noise(3.0, level), RATE), context=CONTEXT)
    echoed = set(words(result)) & set(re.findall(r"\w+", CONTEXT.lower()))
    assert not echoed or "context_echo" in {notice.code for notice in result.warnings}
    assert len(words(result)) <= 3


def test_a_click_has_no_text(transcriber: quasr.Transcriber) -> None:
    click = np.zeros(RATE // 10, np.float32)
    click[800:810] = 1.0
    result = transcriber.transcribe((click, RATE))
    assert (result.text, result.warnings) == ("", ())


def on_one_channel(samples: NDArray[np.float32]) -> AudioInput:
    return np.stack([samples * 2, np.zeros_like(samples)], axis=1), RATE


def by_telephone(samples: NDArray[np.float32]) -> AudioInput:
    return soxr.resample(samples, RATE, 8000).astype(np.float32), 8000


@pytest.mark.parametrize("spoil", [on_one_channel, by_telephone])
def test_poor_sound_that_is_good_enough(
    transcriber: quasr.Transcriber, sample: NDArray[np.float32], spoil: object
) -> None:
    result = transcriber.transcribe(spoil(sample))  # type: ignore[operator]
    assert words(result) == SPOKEN
    assert result.warnings == ()


def test_clipped_sound_still_has_words(transcriber: quasr.Transcriber, sample: NDArray[np.float32]) -> None:
    peak = float(np.abs(sample).max())
    result = transcriber.transcribe((np.clip(sample, -peak / 8, peak / 8) * 8, RATE))
    assert len(set(words(result)) & set(SPOKEN)) >= len(set(SPOKEN)) // 2


@pytest.mark.slow
@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the clips of ../shared/speech/public are not on this machine")
def test_clean_clips_trip_nothing_and_keep_their_text(transcriber: quasr.Transcriber) -> None:
    rows = [json.loads(line) for line in (PUBLIC / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    english = [row for row in rows if row["subset"] in ("librispeech", "ljspeech")]
    clips = [str(PUBLIC / row["path"]) for row in sorted(english, key=lambda row: row["seconds"])[:40]]
    guarded = list(transcriber.transcribe_batch(clips, context=CONTEXT, batch_size=4))
    free = list(transcriber.transcribe_batch(clips, context=CONTEXT, batch_size=4, guards=False))
    for one, other in zip(guarded, free, strict=True):
        assert isinstance(one, quasr.Transcript)
        assert isinstance(other, quasr.Transcript)
        assert one.warnings == ()
        assert one.text == other.text


class Faulty:
    """A real engine whose first answer loops."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info, self.stats = engine.info, engine.stats
        self.runs = 0

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        self.runs += 1
        found = self.engine.run(requests)
        if self.runs > 1:
            return found
        return [ClipResult(one.tokens[:6] * 20, one.logprobs[:6] * 20, "loop") for one in found]

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def second_engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that are made for second tries."""
    made: list[Engine] = []
    real = engines.torch_engine

    def keep(source: engines.Source, placement: Placement, recipe: Recipe, offload: int = 0) -> Engine:
        engine = real(source, placement, recipe, offload)
        if recipe is NO_RECIPE:
            made.append(engine)
        return engine

    monkeypatch.setattr(engines, "torch_engine", keep)
    return made


def with_a_fault(loaded: quasr.Transcriber, sample: NDArray[np.float32]) -> tuple[quasr.Transcript, Faulty]:
    """The sample through a transcriber whose first answer loops."""
    faulty = Faulty(loaded._engine.engine)
    loaded._engine.engine = faulty
    return loaded.transcribe((sample, RATE)), faulty


@pytest.mark.slow
def test_a_fault_of_four_bits_is_cured_in_sixteen(sample: NDArray[np.float32], second_engines: list[Engine]) -> None:
    with quasr.load("demo", device="cpu", compute_type="int4") as loaded:
        result, faulty = with_a_fault(loaded, sample)
        assert (faulty.runs, faulty.info.scheme) == (1, "int4-g128")
    (notice,) = result.warnings
    assert (notice.code, notice.retry_helped, notice.retry_weights) == ("repetition", True, "16-bit")
    assert words(result)[:4] == SPOKEN[:4]
    (second,) = second_engines
    assert (second.info.scheme, second.info.dtype, second.info.device) == ("none", "bf16", "cpu")
    with pytest.raises(RuntimeError, match="closed"):
        second.run([ClipRequest(sample, (1,), (2,), 3)])


@pytest.mark.slow
def test_under_a_memory_limit_the_second_try_stays_quantised(
    sample: NDArray[np.float32], second_engines: list[Engine]
) -> None:
    with quasr.load("demo", device="cpu", compute_type="int4", memory="2GB") as loaded:
        result, faulty = with_a_fault(loaded, sample)
        assert faulty.runs == 2
    (notice,) = result.warnings
    assert (notice.retry_weights, second_engines) == ("quantised", [])
    assert "a memory limit is set" in notice.message


@pytest.mark.slow
def test_without_room_in_main_memory_it_stays_quantised_and_says_so(
    sample: NDArray[np.float32], second_engines: list[Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 24000000 kB\nMemAvailable: 1000 kB\n")
    monkeypatch.setattr(engines, "MEMINFO", tmp_path / "meminfo")
    with quasr.load("demo", device="cpu", compute_type="int4") as loaded:
        result, _ = with_a_fault(loaded, sample)
    (notice,) = result.warnings
    assert (notice.retry_weights, second_engines) == ("quantised", [])
    assert "and 2MB are free" in notice.message


def test_a_saved_quantised_folder_has_no_16_bits(tmp_path: Path) -> None:
    folder = DEMO / "model"
    source = engines.Source(folder, read_config(folder), frozenset())
    place = choose("cpu")
    assert engines.second_tries(source, place, NO_RECIPE, planned=False).weights == "same"
    (tmp_path / "config.json").write_text(
        '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}'
    )
    retry = engines.second_tries(replace(source, folder=tmp_path), place, recipe_for("int8"), planned=False)
    assert (retry.weights, retry.make) == ("quantised", None)


def test_a_gpu_with_room_takes_the_second_tries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(DEMO / "model")
    gpu = Placement(torch.device("cuda", 1), torch.bfloat16)
    found = [Memory("cpu", 8 << 30, 8 << 30), Memory("cuda:0 (X)", 9 << 30, 9 << 30)]
    monkeypatch.setattr(engines, "memory", lambda: found)
    for free, chosen in ((1 << 30, "cuda:1"), (1 << 20, "cpu")):
        found[2:] = [Memory("cuda:1 (X)", free, 9 << 30)]
        place = engines.second_place(config, gpu)
        assert (str(place.device), place.dtype_name) == (chosen, "bf16")


NOISE = PUBLIC.parent / "noise/esc10"


@pytest.mark.skipif(not NOISE.is_dir(), reason="the noise of ../shared/speech/noise is not on this machine")
@pytest.mark.parametrize("name", ["3-170015-A", "4-167077-C"])
def test_words_out_of_noise_are_told(transcriber: quasr.Transcriber, name: str) -> None:
    result = transcriber.transcribe(NOISE / f"{name}.opus", language="English")
    assert words(result)
    assert [notice.code for notice in result.warnings] == ["doubtful_speech"]


@pytest.mark.slow
@pytest.mark.skipif(not NOISE.is_dir(), reason="the noise of ../shared/speech/noise is not on this machine")
def test_music_without_a_singer_has_no_words_or_a_warning(transcriber: quasr.Transcriber) -> None:
    pieces = [path for path in sorted((NOISE.parent / "music").glob("*.opus")) if "Hobbs" not in path.name]
    assert len(pieces) == 3
    for result in transcriber.transcribe_batch(pieces):
        assert isinstance(result, quasr.Transcript)
        assert not result.text or "doubtful_speech" in {notice.code for notice in result.warnings}
