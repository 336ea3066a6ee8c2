"""The comparison's figures on outcomes made by hand; its processes are tried end to end elsewhere."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from quasr.errors import MissingDependencyError, OptionError
from quasr.evaluation import compare as module
from quasr.evaluation.bootstrap import difference_interval, rate_interval
from quasr.evaluation.chart import draw
from quasr.evaluation.compare import COLUMNS, Row, cells, compare, markdown, parse_precisions, read_clips, save
from quasr.evaluation.manifest import Clip
from quasr.evaluation.run import Outcome
from quasr.evaluation.score import score
from quasr.evaluation.worker import Job, Measurement
from quasr.types import TranscribeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIPS = tuple(Clip(Path(f"/{name}.wav"), f"{name}.wav", text, "s", "en", 1.0) for name, text in (
    ("a", "the cat sat down"), ("b", "good dogs"), ("c", None),
))  # fmt: skip
JOB = Job("demo", "fp32", "cpu", CLIPS, TranscribeOptions(batch_size=2), {"hub": "huggingface"}, threads=1)


def measurement(texts: Sequence[str]) -> Measurement:
    outcomes = tuple(
        Outcome(clip, text, "English", "stop", clip.reference and score(clip.reference, text, "en"), False, 2.0, 0.5)
        for clip, text in zip(CLIPS, texts, strict=True)
    )
    return Measurement("cpu", "fp32", "none", 0.25, 2_000_000, 90_000_000, None, 0.3, 0.6, 30, outcomes)


ANSWERS = {
    "fp32": measurement(["the cat sat down", "good dogs", "birds"]),
    "int8": measurement(["the cat sat down", "good dogs", "birds"]),
    "int4": measurement(["the cut sat dawn", "good dogs dogs", ""]),
    "nf4": "bitsandbytes is not installed (exit code 5)",
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setattr(module, "run_worker", lambda job: ANSWERS[job.precision])
    return compare(JOB, ["nf4", "fp32", "int8", "int4"])


def test_base_is_the_first_that_works(rows: list[Row]) -> None:
    assert [row.base for row in rows] == [False, True, False, False]
    assert rows[0].error == ANSWERS["nf4"]
    assert (rows[2].changed, rows[2].agreement) == (0, 1.0)


def test_figures(rows: list[Row]) -> None:
    row = rows[3]
    # 2 substitutions and 1 insertion on 6 words.
    assert row.summary is not None
    assert row.summary.words.rate == pytest.approx(3 / 6)
    assert (row.summary.words.insertions, row.summary.empty, row.changed) == (1, 1, 3)
    assert row.prefill_ms == pytest.approx(100)
    assert row.token_ms == pytest.approx(20)
    assert row.summary.real_time_factor == pytest.approx(0.25)
    assert row.peak == 90_000_000
    assert row.agreement is not None
    assert 0 < row.agreement < 1
    assert row.difference is not None
    assert row.difference.low > 0
    assert rows[2].difference is not None
    assert (rows[2].difference.low, rows[2].difference.high) == (0, 0)


def test_table_markdown_and_json(rows: list[Row], tmp_path: Path) -> None:
    assert all(len(cells(row)) == len(COLUMNS) for row in rows[1:])
    page = markdown("title", rows)
    assert "- **nf4** failed: bitsandbytes is not installed" in page
    assert page.count("| int4 |") == 1
    written = save(tmp_path / "new", "title", JOB, rows)
    report = json.loads(written[1].read_text(encoding="utf-8"))
    assert [row.get("error") for row in report["rows"]] == [ANSWERS["nf4"], None, None, None]
    assert report["rows"][3]["wer"] == pytest.approx(0.5)
    assert report["rows"][3]["outcomes"][1]["hypothesis"] == "good dogs dogs"
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written"):
        save(tmp_path / "file", "title", JOB, rows)


def test_jobs_and_measurements_survive_json() -> None:
    assert Job.from_json(JOB.to_json()) == JOB
    for found in ANSWERS.values():
        if isinstance(found, Measurement):
            assert Measurement.from_json(found.to_json(), JOB) == found


def test_no_chart_without_matplotlib(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"quasr\[chart\]"):
        draw(rows, tmp_path / "c.png")


@pytest.mark.slow
def test_chart(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_worker_that_dies_or_complains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def program(code: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!{python}\nimport os, signal, sys\nsys.stdin.read()\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    python = sys.executable
    program("os.kill(os.getpid(), signal.SIGKILL)")
    assert "SIGKILL: probably out of memory" in str(module.run_worker(JOB))
    program("print('first'); print('the reason', file=sys.stderr); sys.exit(4)")
    assert module.run_worker(JOB) == "the reason (exit code 4)"
    program("sys.exit(1)")
    assert module.run_worker(JOB) == "no reason was given (exit code 1)"


def test_precisions() -> None:
    assert parse_precisions("bf16, int8,int4-g64") == ["bf16", "int8", "int4-g64"]
    for wrong, message in (("", "no precisions"), ("int8,int8", "twice"), ("int8,int9", "did you mean")):
        with pytest.raises(OptionError, match=message):
            parse_precisions(wrong)


def test_clips_of_a_manifest_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.wav").write_bytes(b"12345")
    Path("m.jsonl").write_text('{"path": "a.wav", "text": "one"}\n')
    (clip,) = read_clips("a.wav")
    assert (clip.path, clip.reference, clip.size) == (tmp_path / "a.wav", None, 5)
    (clip,) = read_clips("m.jsonl")
    assert (clip.path, clip.reference) == (tmp_path / "a.wav", "one")
    with pytest.raises(OptionError, match="no file none"):
        read_clips("none.wav")


def test_interval_agrees_with_the_normal_one() -> None:
    # 400 clips of 10 words with independent errors at 20 %: the standard error of the rate is sqrt(p q / n).
    random = np.random.default_rng(0)
    errors = random.binomial(10, 0.2, 400).tolist()
    found = rate_interval(errors, [10] * 400)
    assert found is not None
    rate, margin = sum(errors) / 4000, 1.96 * (0.2 * 0.8 / 4000) ** 0.5
    assert found.low == pytest.approx(rate - margin, abs=0.002)
    assert found.high == pytest.approx(rate + margin, abs=0.002)
    assert rate_interval(errors, [10] * 400) == found
    assert rate_interval(errors, [10] * 400, seed=1) != found


def test_pairing_takes_away_what_both_share() -> None:
    random = np.random.default_rng(1)
    first = random.binomial(10, 0.3, 200)
    second = first + (np.arange(200) % 20 == 0)
    found = difference_interval(first.tolist(), second.tolist(), [10] * 200)
    alone = rate_interval(second.tolist(), [10] * 200)
    assert found is not None
    assert alone is not None
    assert 0 < found.low < 0.005 < found.high
    assert found.high - found.low < (alone.high - alone.low) / 3


def test_nothing_to_count_is_no_interval() -> None:
    assert rate_interval([], []) is None
    assert difference_interval([1], [2], [0]) is None


def test_gpu_memory_counts_where_there_is_one() -> None:
    found = ANSWERS["fp32"]
    assert isinstance(found, Measurement)
    assert Row("fp32", measurement=replace(found, peak_gpu=7)).peak == 7
