"""Files in memory: what Linux says of the maps of this process."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from quasr.engine.file_map import map_file
from quasr.errors import CheckpointError

SMAPS = Path("/proc/self/smaps")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(path: Path) -> list[str]:
    """The kernel's two-letter words on the map of `path`: hg wants large pages, nh none."""
    text = SMAPS.read_text()
    about = text[text.index(str(path)) :]
    return about[about.index("VmFlags:") :].partition("\n")[0].split()[1:]


@pytest.mark.skipif(not (SMAPS.exists() and LARGE_PAGES.exists()), reason="this kernel has no large pages")
def test_large_pages_are_asked_for_what_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w" * 5000)
    (tmp_path / "table").write_bytes(b"t" * 5000)
    weights, table = map_file(tmp_path / "weights", whole=True), map_file(tmp_path / "table", whole=False)
    assert (weights[-1:], table[:2]) == (b"w", b"tt")
    assert "hg" in flags_of(tmp_path / "weights")
    assert "nh" in flags_of(tmp_path / "table")


@pytest.mark.parametrize("whole", [False, True])
def test_a_kernel_without_large_pages_maps_all_the_same(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"):
        monkeypatch.setattr(mmap, name, 12345, raising=False)  # unknown to any kernel: refused with an error
    (tmp_path / "weights").write_bytes(b"abc")
    assert map_file(tmp_path / "weights", whole=whole)[:] == b"abc"
    for name in ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"):
        monkeypatch.delattr(mmap, name)
    assert map_file(tmp_path / "weights", whole=whole)[:] == b"abc"


def test_a_missing_and_an_empty_file_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("missing", "empty"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be mapped .*: export the model again$"):
            map_file(tmp_path / name, whole=True)
