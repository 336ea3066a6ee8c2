"""Jobs that are killed, interrupted or run again, on a tiny random checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest
from made_sound import write_wav

import quasr
from quasr.cli import main

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from pathlib import Path

# A fork of a process that has torch already starts in no time, and is killed like any other.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "quasr.cli.main", "quasr.pipeline.transcriber", "quasr.engine.torch_engine"])


def program(arguments: list[str], log: Path) -> None:
    """`quasr` in a process of its own, with both outputs in files."""
    import torch

    torch.set_num_threads(1)
    for number, path in ((1, log.with_suffix(".out")), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    sys.argv = ["quasr", "transcribe", "--device", "cpu", "--max-new-tokens", "4", "--batch-size", "1", *arguments]
    code = main._exit_code()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(arguments: list[str], log: Path) -> BaseProcess:
    process = context.Process(target=program, args=(arguments, log))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def make_tree(folder: Path, count: int) -> list[str]:
    """Names of `count` short clips in a tree of three folders."""
    names = [f"{index % 3}/{index:03}" for index in range(count)]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(folder / f"{name}.wav", 0.1 + 0.001 * index, seed=index)
    return names


def complete(out: Path) -> list[str]:
    """Outputs that are there, recorded or not: each appears whole or not at all."""
    return sorted(path.relative_to(out).with_suffix("").as_posix() for path in out.rglob("*.txt"))


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    """Time and inode of every complete output: both change when it is written again."""
    found = {name: (out / f"{name}.txt").stat() for name in complete(out)}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def kill_later(process: BaseProcess, out: Path, seconds: float) -> None:
    """SIGKILL some time after the next output is complete."""
    before = len(complete(out))
    while process.is_alive() and len(complete(out)) <= before:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    process.join()


def survive(model: Path, folder: Path, count: int, kills: int) -> None:
    names = make_tree(folder / "in", count)
    out, arguments = folder / "out", ["-r", str(folder / "in"), "-o", str(folder / "out"), "--model", str(model)]
    (out / "0").mkdir(parents=True)
    (out / "0" / ".quasr-5eed.tmp").touch()  # as a kill within the milliseconds of a write leaves it
    chance, before, killed = random.Random(7), {}, 0
    for _ in range(kills):
        process = start(arguments, folder / "log")
        kill_later(process, out, chance.uniform(0, 0.02))
        killed += process.exitcode == -signal.SIGKILL
        now = stamps(out)
        assert {name: now[name] for name in before} == before, "a complete output was made again"
        before = now
    assert killed == kills, "the job ended before it could be killed: it needs more files"
    assert 0 < len(before) < count
    assert finish(start(arguments, folder / "last")) == 0
    now = stamps(out)
    assert {name: now[name] for name in before} == before, "a complete output was made again"
    assert complete(out) == sorted(names)
    assert f"{len(before)} of {count} inputs skipped" in (folder / "last").read_text()
    assert list(out.rglob("*.tmp")) == []
    check_texts(model, folder, names)


def check_texts(model: Path, folder: Path, names: list[str]) -> None:
    """Against the library, one clip at a time."""
    with quasr.load(model, device="cpu") as transcriber:
        expected = {
            name: transcriber.transcribe(folder / "in" / f"{name}.wav", max_new_tokens=4).text for name in names
        }
    found = {name: (folder / "out" / f"{name}.txt").read_text(encoding="utf-8").strip() for name in names}
    assert found == {name: text.strip() for name, text in expected.items()}
    assert len(set(found.values())) > 1


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on(hf: Path, tmp_path: Path) -> None:
    survive(hf, tmp_path, count=24, kills=2)


@pytest.mark.slow
def test_a_job_of_200_files_survives_ten_kills(hf: Path, tmp_path: Path) -> None:
    survive(hf, tmp_path, count=200, kills=10)


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_rest_follows(hf: Path, tmp_path: Path) -> None:
    names = make_tree(tmp_path / "in", 60)
    out, arguments = tmp_path / "out", ["-r", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", str(hf)]
    process = start(arguments, tmp_path / "log")
    while process.is_alive() and not complete(out):
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == main.INTERRUPTED
    log, done = (tmp_path / "log").read_text(), complete(out)
    assert "Traceback" not in log
    assert f"interrupted: {len(done)} of 60 inputs are done" in log
    assert 0 < len(done) < 60
    assert finish(start(arguments, tmp_path / "last")) == 0
    assert complete(out) == sorted(names)
    check_texts(hf, tmp_path, names)


@pytest.mark.slow
def test_a_job_file_that_is_killed_goes_on(hf: Path, tmp_path: Path) -> None:
    names = make_tree(tmp_path / "in", 40)
    manifest, out = tmp_path / "in" / "jobs.jsonl", tmp_path / "out.jsonl"
    rows = [{"path": f"{name}.wav", "id": name} for name in names] + [{"path": "missing.wav"}]
    manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["--jobs", str(manifest), "-o", str(out), "--model", str(hf)]
    process = start(arguments, tmp_path / "log")
    while process.is_alive() and not (out.exists() and out.read_bytes().count(b"\n")):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = out.read_text().split("\n")[:-1]
    assert finish(start(arguments, tmp_path / "last")) == 1
    lines = out.read_text().splitlines()
    assert lines[: len(before)] == before, "a job that was done was done again"
    found = {line["id"]: line for line in map(json.loads, lines)}
    assert len(lines) == len(found) == 41
    assert "does not exist" in found.pop("missing.wav")["error"]
    assert sorted(found) == sorted(names)
    assert all(line["text"] for line in found.values())
    assert f"{len(before)} of 41 inputs skipped" in (tmp_path / "last").read_text()
