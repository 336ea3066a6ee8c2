"""`quasr quantize` with a smaller vocabulary, and in the format of other programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from quasr.cli import main
from quasr.cli.target import Target
from quasr.errors import OptionError

needs_demo = pytest.mark.skipif(
    not (Path(main.__file__).parents[1] / "demo" / "model").is_dir(), reason="the demo model is not in this checkout"
)


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["quasr", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main.run()
    return int(caught.value.code or 0)


@needs_demo
@pytest.mark.slow
def test_a_pruned_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Only these words.\n")
    words = ("quantize", "demo", "--to", "bf16", "--keep-tokens-from", text, "--device", "cpu", "-o", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr()
    assert "of 1,792 tokens stay" in said.err
    assert "ms a token here (cpu) instead of" in said.out
    kept = json.loads((tmp_path / "out" / "quasr_quantization.json").read_text())["metadata"]["vocabulary"]
    assert kept["kept"] < 700
    assert kept == {"languages": [], "kept": kept["kept"], "of": 1792}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["thinker_config"]["text_config"]["vocab_size"] == kept["kept"]


@needs_demo
@pytest.mark.slow
def test_the_format_of_other_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("quantize", "demo", "--to", "int4", "--format", "compressed-tensors", "--device", "cpu")
    assert run(monkeypatch, *words, "-o", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["dtype"] == "bfloat16"


@needs_demo
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "int8", "--languages", "de"], "this model does not know German"),
        (["--to", "int8", "--languages", "xx"], "'xx' is not known"),
        (["--to", "int8", "--languages", ","], "names no language"),
        (["--to", "int8", "--keep-tokens-from", "absent.txt"], "cannot be read"),
        (["--to", "int8", "--format", "compressed-tensors"], "are written in int4"),
        (["--to", "bf16"], "quantises nothing"),
    ],
)
def test_wrong_wishes_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "quantize", "demo", *words, "--device", "cpu", "-o", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_formats_have_names() -> None:
    with pytest.raises(OptionError, match="unknown format 'gguf': there is quasr, compressed-tensors"):
        Target(Path("out"), "gguf", None).recipe("int4", None, ())
