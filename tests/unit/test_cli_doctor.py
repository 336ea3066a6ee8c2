from __future__ import annotations

import hashlib
import json
import sys
from typing import TYPE_CHECKING

import pytest

from quasr.cli import main

if TYPE_CHECKING:
    from pathlib import Path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["quasr", "doctor", *arguments])
    return main._exit_code()


def test_without_torch_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(monkeypatch) == 0
    captured = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert captured.err == ""
    assert "engine torch        cannot run: torch is not installed: pip install 'quasr[cuda]'" in captured.out
    assert "cpu: " in lines["memory"]
    assert lines["numpy"]


def cached(folder: Path, content: bytes) -> Path:
    """A folder with one file, and the record of what it should be."""
    (folder / "config.json").write_bytes(content)
    fetched = b'{"a": 1}'
    record = {"size": len(fetched), "sha256": hashlib.sha256(fetched).hexdigest()}
    source = {"hub": "huggingface", "id": "org/x", "revision": "main", "commit": "0" * 40}
    (folder / "quasr_source.json").write_text(json.dumps({**source, "files": {"config.json": record}}))
    return folder


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [(b'{"a": 1}', 0, "is as it was fetched"), (b'{"a": 2}', 3, "config.json has another content")],
)
def test_verifies_a_cached_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: bytes,
    code: int,
    line: str,
) -> None:
    assert run(monkeypatch, "--model", str(cached(tmp_path, content))) == code
    assert line in capsys.readouterr().out.splitlines()[-1]
