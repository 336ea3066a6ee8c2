"""`quasr bench` in real processes, and that a peer is given the same work as our engine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from quasr.bench.checkpoint import make_checkpoint
from quasr.bench.job import Job
from quasr.bench.shape import SHAPES
from quasr.bench.systems import Prompt, QuasrSystem
from quasr.bench.worker import clips
from quasr.cli import main
from quasr.engine.base import ClipRequest
from quasr.model.config import read_config

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


def quasr(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["quasr", *map(str, arguments)])
    return main._exit_code()


@pytest.mark.slow
def test_bench_measures_ours_and_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    code = quasr(
        monkeypatch, "bench", "--shape", "demo", "--precisions", "int8,int4-g64", "--peers", "transformers",
        "--seconds", "1", "--tokens", "4", "--batches", "1,2", "--repeats", "1", "--threads", "1", "--device", "cpu",
        "-o", tmp_path / "b.json",
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    header, *rows = out.splitlines()
    assert header.split()[0] == "system"
    assert [row.split()[0] for row in rows] == ["int8", "int4-g64", "peer:transformers"]
    for row in json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["rows"]:
        assert [one["clips"] for one in row["batches"]] == [1, 2]
        assert all(one["audio_seconds_per_second"] > 0 and one["peak"] > row["weight_bytes"] for one in row["batches"])
        assert row["prefill"] > 0
        assert 0 < row["start"]["load"] < row["start"]["ready"]


@pytest.mark.slow
def test_a_peer_gets_the_same_prompt_and_says_the_same(tmp_path: Path) -> None:
    """The tokens of both in fp32 on the made checkpoint, from the same noise: two clips, with all that is timed."""
    pytest.importorskip("transformers")
    from quasr.bench.peers import TransformersSystem

    make_checkpoint(tmp_path / "demo", SHAPES["demo"])
    job = Job("fp32", str(tmp_path / "demo"), "cpu", seconds=2.5, tokens=8)
    ours, peer = QuasrSystem(job), TransformersSystem(replace(job, system="transformers"))
    samples = clips(job, 2)
    prompt = Prompt.of(read_config(tmp_path / "demo"))
    results = ours._engine.run([ClipRequest(one, prompt.prefix, prompt.suffix, 8) for one in samples])
    inputs = peer._inputs(samples)
    found = peer._model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert [result.tokens for result in results] == [tuple(row) for row in found.tolist()]
    for system in (ours, peer):
        for tokens in (1, 8):
            system.prepare(samples, tokens)()
    assert ours.token_bytes == peer.token_bytes
    # transformers counts the table of sinusoids too.
    assert peer.info.weight_bytes == pytest.approx(ours.info.weight_bytes, rel=1e-3)


@pytest.mark.slow
def test_peers_refuse_what_they_would_read_wrongly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    arguments = ("--seconds", "1", "--tokens", "2", "--batches", "1", "--repeats", "1", "--device", "cpu")
    code = quasr(monkeypatch, "bench", "--model", "demo", "--precisions", "none", "--peers", "transformers", *arguments)
    assert code == 1
    assert "is in the original layout, which transformers does not read: give an -hf one" in capfd.readouterr().err


def test_nothing_to_measure_and_contradictions(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("--precisions", "none", "--peers", "none"), "there is nothing to measure"),
        (("--model", "demo", "--shape", "demo", "--peers", "none"), "leave out --shape and --keep"),
        (("--shape", "9b", "--peers", "none"), "unknown shape '9b'"),
        (("--precisions", "int9", "--peers", "none"), "unknown compute type 'int9'"),
    ):
        assert quasr(monkeypatch, "bench", *arguments) == 2
        assert message in capfd.readouterr().err
