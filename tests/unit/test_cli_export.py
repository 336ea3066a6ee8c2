"""`quasr export` as a user types it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from quant_samples import checkpoint

from quasr.cli import main
from quasr.export.manifest import read_manifest

if TYPE_CHECKING:
    from pathlib import Path

torch.set_num_threads(1)


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["quasr", "export", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main.run()
    return int(caught.value.code or 0)


def test_a_folder_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source")
    words = (source, "-o", tmp_path / "out", "--weights", "int4", "--group", "32")
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr()
    assert "decoder.onnx.data" in said.out
    assert f"wrote {tmp_path / 'out'} (int4)" in said.err
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.weights, manifest.group, manifest.activations) == ("int4", 32, "int8")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--group", "48"), 2, "no group of 48: there is 128, 64, 32, 0"),
        (("--activations", "int4"), 2, "unknown activations 'int4': there is int8, fp32"),
        (("--weights", "bf16"), 2, "unknown weights 'bf16': there is fp32, int8, int4"),
    ],
)
def test_arguments_that_make_no_sense(
    words: tuple[str, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    source = checkpoint(tmp_path / "source")
    assert run(monkeypatch, source, "-o", tmp_path / "out", *words) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("quasr.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert run(monkeypatch, tmp_path, "-o", tmp_path / "out") == 5
    assert "export needs onnx: install the extra with pip install 'quasr[quant]'" in capsys.readouterr().err
