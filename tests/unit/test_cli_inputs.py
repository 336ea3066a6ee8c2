"""What `quasr transcribe` takes: files, folders, patterns, URLs, standard input."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import pytest

from quasr.cli.inputs import check_names, gather, refuse_long_names, total_seconds
from quasr.cli.journal import Fingerprint
from quasr.errors import AudioNotFoundError, OptionError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def wav(path: Path, frames: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(2 * frames))


def test_a_folder_without_r_is_refused_where_it_stands(here: Path) -> None:
    touch(here, "talks/a.wav", "b.wav")
    folder, file = gather(["talks", "b.wav"], recursive=False)
    assert isinstance(folder.error, AudioNotFoundError)
    assert str(folder.error) == "talks is a folder: add -r to take the audio and video files in it"
    assert (file.source, file.error) == ("b.wav", None)


def test_a_folder_gives_its_media_sorted_as_a_tree(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(here, "in/b.MP3", "in/sub/a.wav", "in/a.mkv", "in/notes.txt", "in/cover.jpg", "in/.hidden.wav")
    touch(here, "in/.trash/old.wav")
    found = gather(["in"], recursive=True)
    assert [item.source for item in found] == [str(Path("in", name)) for name in ("a.mkv", "b.MP3", "sub/a.wav")]
    assert [item.name for item in found] == ["a", "b", "sub/a"]
    assert capsys.readouterr().err == "in: 2 other files are left out, 3 are audio or video\n"


def test_files_of_one_stem_in_a_folder_keep_their_endings(here: Path) -> None:
    touch(here, "in/talk.mp4", "in/talk.wav", "in/x/talk.wav")
    found = gather(["in"], recursive=True)
    assert [item.name for item in found] == ["talk.mp4", "talk.wav", "x/talk"]
    check_names(found, Path("out"))


def test_a_folder_without_media_is_an_error(here: Path) -> None:
    touch(here, "in/notes.txt")
    (item,) = gather(["in"], recursive=True)
    assert "has no audio or video files" in str(item.error)


def test_patterns_are_expanded_sorted_unless_a_file_is_named_so(here: Path) -> None:
    touch(here, "b1.wav", "b2.wav", "deep/er/b3.wav", "x[1].wav", "x1.wav")
    assert [item.source for item in gather(["b*.wav"], recursive=False)] == ["b1.wav", "b2.wav"]
    assert [item.source for item in gather(["x[1].wav"], recursive=False)] == ["x[1].wav"]
    assert [item.name for item in gather(["deep/**/*.wav"], recursive=False)] == ["b3"]
    assert [item.source for item in gather(["none*.wav"], recursive=False)] == ["none*.wav"]


def test_each_file_once_in_the_order_given(here: Path) -> None:
    touch(here, "b.wav", "a.wav")
    (here / "link.wav").symlink_to("a.wav")
    found = gather(["b.wav", "a.wav", "./b.wav", "*.wav", (here / "a.wav").as_uri(), "-", "-"], recursive=False)
    assert [item.source for item in found] == ["b.wav", "a.wav", "-"]


def test_urls_show_no_secrets_and_name_their_output(here: Path) -> None:
    (item,) = gather(["https://me:pass@host/talks/day.one.mp3?key=1"], recursive=False)
    assert (item.label, item.name, item.path) == ("https://host/talks/day.one.mp3", "day.one", None)
    (bare,) = gather(["https://host/"], recursive=False)
    assert bare.name


def test_names_that_meet_are_an_error_unless_one_cannot_be_read(here: Path) -> None:
    touch(here, "one/a.wav", "two/a.flac", "a/b.wav")
    with pytest.raises(OptionError, match=r"several inputs would write out.a\.\*: one/a\.wav and two/a\.flac"):
        check_names(gather(["one/a.wav", "two/a.flac"], recursive=False), Path("out"))
    check_names(gather(["one/a.wav", "a"], recursive=False), Path("out"))


def test_the_total_is_what_containers_state_or_unknown(here: Path) -> None:
    wav(here / "a.wav", 4000)
    wav(here / "b.wav", 12000)
    touch(here, "empty.wav")
    assert total_seconds(gather(["a.wav", "b.wav"], recursive=False)) == pytest.approx(0.5 + 1.5)
    assert total_seconds(gather(["a.wav", "empty.wav"], recursive=False)) is None
    assert total_seconds(gather(["a.wav", "https://host/x.wav"], recursive=False)) is None
    assert total_seconds(gather(["missing.wav"], recursive=False)) is None


def test_a_file_url_that_no_file_can_have(here: Path) -> None:
    (item,) = gather(["file:///a%00b.wav"], recursive=False)
    assert (item.source, item.path) == ("file:///a%00b.wav", None)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_read_before_its_turn(here: Path) -> None:
    os.mkfifo("sound.wav")
    write_and_read = os.open("sound.wav", os.O_RDWR)
    os.write(write_and_read, b"RIFF")
    items = gather(["sound.wav"], recursive=False)
    assert total_seconds(items) is None
    assert Fingerprint("model", {}).of(items[0]) is None
    assert os.read(write_and_read, 9) == b"RIFF"
    os.close(write_and_read)


def test_names_that_no_output_can_have_are_errors_of_their_own(here: Path) -> None:
    names = [f"talks/{'ä' * 125}.wav", f"talks/{'a' * 251}.wav", "b.wav"]
    touch(here, *names)
    inputs = refuse_long_names(gather(names, recursive=False))
    assert [item.error is None for item in inputs] == [True, False, True]
    assert "too long for an output file: rename it" in str(inputs[1].error)
