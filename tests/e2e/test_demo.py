"""The bundled demo model on its bundled clip: the words that were spoken."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import quasr
from quasr.audio.decode import load as load_audio

DEMO = Path(str(files("quasr"))) / "demo"
BATCHES = Path(__file__).resolve().parents[2] / "training" / "batches.py"

pytestmark = pytest.mark.skipif(not (DEMO / "model").is_dir(), reason="the demo model is not in this checkout")


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def test_demo_transcribes_its_sample() -> None:
    (sample,) = (path for path in DEMO.glob("sample.*") if path.suffix != ".txt")
    with quasr.load("demo", device="cpu") as transcriber:
        result = transcriber.transcribe(sample)
    assert words(result.text) == words((DEMO / "sample.txt").read_text(encoding="utf-8"))
    assert result.language == "English"
    assert result.finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_demo_tells_of_a_piece_longer_than_its_training(engine: str) -> None:
    """Longer than the longest batch of `training/batches.py`; as many tokens as a moment takes."""
    (buckets,) = re.findall(r"^BUCKETS = .*?(\d+)\)$", BATCHES.read_text(encoding="utf-8"), re.MULTILINE)
    sample = load_audio(DEMO / "sample.flac")
    uncut = np.tile(sample, 7)[: 16_000 * (int(buckets) + 1)]
    options = quasr.TranscribeOptions(chunk="none", guards=False, max_new_tokens=3)
    with quasr.load("demo", engine=engine, device="cpu", threads=1) as transcriber:
        told = [
            [notice.message for notice in transcriber.transcribe((clip, 16_000), options).warnings]
            for clip in (uncut, uncut[:-16_000])
        ]
    assert [len(messages) for messages in told] == [2, 1]
    assert f"from 0.0 to {int(buckets) + 1}.0 s is one piece, and this model was trained on {buckets} s" in told[0][0]
