from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import pytest

from quasr.errors import OptionError, QuasrError, ResourceError
from quasr.output import FORMATS, write_files
from quasr.types import Segment, Transcript

if TYPE_CHECKING:
    from pathlib import Path

HELLO = Transcript("Grüß Gott", "German", 2.0, (Segment(0, 0.0, 2.0, "Grüß Gott"),))


def test_writes_each_format_in_utf8_and_makes_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"
    paths = write_files(HELLO, folder, "my.talk", FORMATS)
    assert paths == [folder / f"my.talk.{fmt}" for fmt in FORMATS]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert (folder / "my.talk.txt").read_bytes() == "Grüß Gott\n".encode()
    assert json.loads((folder / "my.talk.json").read_bytes())["text"] == "Grüß Gott"


def test_replaces_an_older_file_and_follows_the_umask(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (path,) = write_files(HELLO, tmp_path, "a", ["txt"])
    assert path.read_text(encoding="utf-8") == "Grüß Gott\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EACCES, OptionError),
        (errno.EROFS, OptionError),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[QuasrError]
) -> None:
    old = tmp_path / "a.txt"
    old.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(kind, match=r"a\.txt") as caught:
        write_files(HELLO, tmp_path, "a", ["txt"])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "old"


def test_a_folder_that_is_a_file_is_an_option_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="choose another output folder"):
            write_files(HELLO, folder, "a", ["txt"])


def test_a_name_that_is_too_long_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="File name too long"):
        write_files(HELLO, tmp_path, "a" * 300, ["txt"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="docx"):
        write_files(HELLO, tmp_path, "a", ["txt", "docx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["", ".", "../a", "a/b", "/a", "a\0b"])
def test_a_stem_with_folders_is_refused(tmp_path: Path, stem: str) -> None:
    with pytest.raises(OptionError, match="no file name"):
        write_files(HELLO, tmp_path, stem, ["txt"])
