"""The bundled demo model on its bundled clip: the words that were spoken."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

import quasr

DEMO = Path(str(files("quasr"))) / "demo"

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
