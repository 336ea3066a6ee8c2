"""Documentation that can be checked: the command reference, and links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_reference_is_the_programs_own_help(tmp_path: Path) -> None:
    script = tmp_path / "generate_cli.py"
    script.write_text((ROOT / "docs/generate_cli.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == (ROOT / "docs/cli.md").read_text(encoding="utf-8"), (
        "run python docs/generate_cli.py"
    )


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_to_files(page: str) -> None:
    source = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", source.read_text(encoding="utf-8")):
        assert (source.parent / target).exists(), target
