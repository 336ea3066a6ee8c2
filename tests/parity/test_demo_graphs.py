"""The bundled ONNX folder: made of the bundled weights, and near enough to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import quasr
from quasr.evaluation.score import Edits, score
from quasr.export.folder import ExportOptions, export_folder
from quasr.pipeline.onnx import DEMO_GRAPHS
from quasr.weights.hub import DEMO_FOLDER

SPEECH = Path(__file__).resolve().parents[2] / "../shared/speech/public"

pytestmark = pytest.mark.slow


def test_another_export_gives_the_same_bytes(tmp_path: Path) -> None:
    export_folder(DEMO_FOLDER, tmp_path / "again", ExportOptions("int8", 128, "fp32"))
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == {path.name: path.read_bytes() for path in DEMO_GRAPHS.iterdir()}


def test_error_rates_are_those_of_torch() -> None:
    """Over every tenth clip of real speech: too few to tell 0.1 points, enough to see damage."""
    if not SPEECH.is_dir():
        pytest.skip("the test speech is not beside this checkout")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()][::10]
    rates = []
    for engine in ("onnx", "torch"):
        with quasr.load("demo", engine=engine, threads=1) as model:
            results = list(model.transcribe_batch([SPEECH / row["path"] for row in rows], guards=False))
        edits = Edits()
        for row, result in zip(rows, results, strict=True):
            assert isinstance(result, quasr.Transcript)
            edits += (row.get("text") and score(row["text"], result.text, row["lang"]).words) or Edits()
        rates.append(edits.rate)
    assert rates[0] is not None
    assert rates[1] is not None
    assert abs(rates[0] - rates[1]) < 0.02
