from __future__ import annotations

import subprocess
import sys

import pytest

import quasr


@pytest.mark.parametrize("name", quasr.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(quasr, name) is not None
    assert name in dir(quasr)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = quasr.nonsense


@pytest.mark.parametrize("statement", ["import quasr", "import quasr.cli.main", "from quasr import Transcriber, load"])
def test_import_brings_no_torch(statement: str) -> None:
    code = f"{statement}; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
