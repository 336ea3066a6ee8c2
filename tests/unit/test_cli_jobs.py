"""The manifest of jobs, the lines that come out, and the journal of what is complete."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from quasr.cli.inputs import single
from quasr.cli.jobs import JobLines, read_jobs
from quasr.cli.journal import JOURNAL_FILE, Fingerprint, Journal
from quasr.errors import OptionError
from quasr.types import Segment, Transcript
from quasr.weights.record import identity

SAID = Transcript("Grüße", "German", 2.0, (Segment(0, 0.0, 2.0, "Grüße", "German"),))


def manifest(folder: Path, *rows: object) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_become_inputs(tmp_path: Path) -> None:
    url = "https://host/a.mp3?key=1"
    path = manifest(
        tmp_path,
        {"path": "x/a.wav", "language": "de", "context": "Ohm"},
        "",
        {"url": url, "id": 7, "language": None},
    )
    first, second = read_jobs(path)
    assert first.path == tmp_path / "x/a.wav"
    assert (first.name, first.label, first.language, first.context) == ("x/a.wav", "x/a.wav", "de", "Ohm")
    assert (second.source, second.label, second.name) == (url, "https://host/a.mp3", "7")
    assert (second.language, second.context, second.path) == (None, None, None)


def test_a_file_beside_the_manifest_is_never_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest(tmp_path, {"path": "-"}, {"path": str(tmp_path / "a.wav")})
    first, second = read_jobs(Path("jobs.jsonl"))
    assert (first.source, first.path) == ("./-", Path("-"))
    assert second.path == tmp_path / "a.wav"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ([1], 'line 2: expected an object with a "path" or a "url"'),
        ({"path": "a", "url": "http://b"}, "line 2: expected an object"),
        ({"path": 3}, "line 2: path is 3, not text"),
        ({"path": "b", "lang": "de"}, "line 2: unknown field 'lang'"),
        ({"url": "b.wav"}, "line 2: url is 'b.wav'"),
        ({"path": "a.wav"}, "line 2: id 'a.wav' is there twice"),
    ],
)
def test_bad_rows_are_told_by_their_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_jobs(manifest(tmp_path, {"path": "a.wav"}, row))


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_jobs(tmp_path / "none.jsonl")
    with pytest.raises(OptionError, match="is empty"):
        read_jobs(manifest(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes('{"path": "é"}'.encode("latin-1"))
    with pytest.raises(OptionError, match="not UTF-8"):
        read_jobs(tmp_path / "latin.jsonl")


def test_results_go_to_the_file_at_once_and_are_found_again(tmp_path: Path) -> None:
    path, a, b = tmp_path / "new" / "out.jsonl", single("a.wav"), single("https://host/b.wav?key=1")
    out = JobLines(path)
    assert out.key("a") is None
    out.start([a, b])
    out.put(a, SAID, "k1")
    assert lines(path) == [{"id": "a", "path": "a.wav", "key": "k1", **json.loads(json.dumps(SAID.to_dict()))}]
    out.fail(b, "gone")
    out.close()
    assert lines(path)[1] == {"id": "b", "url": "https://host/b.wav?key=1", "error": "gone"}
    again = JobLines(path)
    assert (again.key("a"), again.key("b")) == ("k1", None)


def test_lines_that_are_made_again_leave_first_and_others_stay(tmp_path: Path) -> None:
    path, a, b = tmp_path / "out.jsonl", single("a.wav"), single("b.wav")
    path.write_text('{"id": "a", "key": "k"}\n{"id": "b", "error": "x"}\n{"id": "c", "key": "k"}\n{"id": "d", "ke')
    out = JobLines(path)
    out.start([b])
    assert [line["id"] for line in lines(path)] == ["a", "c"]
    out.put(b, SAID, "k")
    out.close()
    assert [line["id"] for line in lines(path)] == ["a", "c", "b"]
    assert JobLines(path).key(a.name) == "k"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"path": "a.wav"})
    with pytest.raises(OptionError, match="no results of jobs"):
        JobLines(path)
    assert lines(path) == [{"path": "a.wav"}]


def test_a_manifest_with_ids_is_no_file_of_results(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"path": "a.wav", "id": "1"})
    with pytest.raises(OptionError, match="no results of jobs"):
        JobLines(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # as /dev/null would be
    with pytest.raises(OptionError, match="leave -o out"):
        JobLines(tmp_path / "pipe")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of files there")
def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path, a, b = tmp_path / "out.jsonl", single("a.wav"), single("b.wav")
    first, second = JobLines(path), JobLines(path)
    first.start([a])
    with pytest.raises(OptionError, match=r"another run is writing .*out\.jsonl: wait for its end"):
        second.start([b])
    first.put(a, SAID, "k1")
    first.close()
    assert [line["id"] for line in lines(path)] == ["a"]
    after = JobLines(path)
    after.start([b])
    after.put(b, SAID, "k2")
    after.close()
    assert [line["id"] for line in lines(path)] == ["a", "b"]


@pytest.mark.parametrize(
    "line", ['{"output": ["a"]}', '{"output": "a", "files": 5, "key": "k"}', '{"output": "a", "files": {}}', "[" * 9999]
)
def test_a_damaged_journal_means_that_nothing_is_done(tmp_path: Path, line: str) -> None:
    (tmp_path / JOURNAL_FILE).write_text(line + "\n")
    assert Journal(tmp_path).key("a") is None


def test_text_that_utf8_cannot_say_stays_json(tmp_path: Path) -> None:
    path, item = tmp_path / "out.jsonl", replace(single("a.wav"), label="\udce9.wav")
    out = JobLines(path)
    out.start([item])
    out.fail(item, "no such file")
    out.close()
    assert lines(path)[0]["path"] == "\udce9.wav"


def test_the_journal_counts_what_has_all_its_files(tmp_path: Path) -> None:
    texts = {"sub/a.txt": "Grüße\n", "sub/a.srt": "1\n"}
    journal = Journal(tmp_path / "new")
    folder = tmp_path / "new" / "sub"
    journal.begin("sub/a", "k1", texts)
    folder.mkdir()
    (folder / "a.txt").write_text("Grüße\n", encoding="utf-8")
    assert Journal(tmp_path / "new").key("sub/a") is None
    (folder / "a.srt").write_text("1\n")
    assert Journal(tmp_path / "new").key("sub/a") == "k1"
    (folder / "a.srt").write_text("of an older run")
    assert Journal(tmp_path / "new").key("sub/a") is None
    journal.end("sub/a")
    assert journal.key("sub/a") == Journal(tmp_path / "new").key("sub/a") == "k1"
    journal.begin("sub/a", "k2", texts)
    journal.close()
    assert Journal(tmp_path / "new").key("sub/a") is None
    assert Journal(tmp_path / "new").key("b") is None
    (folder / "a.srt").unlink()
    assert Journal(tmp_path / "new").key("sub/a") is None


def rerun_does(folder: Path, key: str) -> bool:
    return Journal(folder).key("a") != key


def test_runs_with_other_options_in_one_folder_record_what_is_there(tmp_path: Path) -> None:
    """The second waits until the first has written and recorded its files: else its key could stand beside theirs."""
    first, second, path = Journal(tmp_path), Journal(tmp_path), tmp_path / "a.txt"

    def run_second() -> None:
        with second.writing("a", "k2", {"a.txt": "two"}):
            path.write_text("two")

    beside = threading.Thread(target=run_second)
    with first.writing("a", "k1", {"a.txt": "one"}):
        beside.start()
        beside.join(0.1)
        assert beside.is_alive()
        path.write_text("one")
    beside.join(5)
    first.close()
    second.close()
    assert path.read_text() == "two"
    assert rerun_does(tmp_path, "k1")
    assert not rerun_does(tmp_path, "k2")


@pytest.mark.parametrize(
    "order",
    [
        "b1 b2 w1 e1",
        "b1 b2 w2 e2 w1 e1",
        "b1 b2 w2 w1 e1",
        "b1 b2 w1 w2 e2 e1",
        "b1 w1 b2 e1 w2 e2",
        "b1 b2 w2 w1 e1 e2",
    ],
)
def test_without_locks_the_hashes_decide_between_two_runs(tmp_path: Path, order: str) -> None:
    """b: begin, w: write, e: end, of run 1 or 2; a run that does not end is killed."""
    runs, path = {"1": Journal(tmp_path), "2": Journal(tmp_path)}, tmp_path / "a.txt"
    path.write_text("")
    for what, number in order.split():
        if what == "b":
            runs[number].begin("a", f"k{number}", {"a.txt": number})
        elif what == "w":
            path.write_text(number)
        else:
            runs[number].end("a")
    for journal in runs.values():
        journal.close()
    for number in runs:
        assert rerun_does(tmp_path, f"k{number}") or path.read_text() == number


def test_a_text_without_a_key_outdates_the_lines_of_its_name(tmp_path: Path) -> None:
    """As standard input's does that of a file called stdin.wav."""
    journal = Journal(tmp_path)
    with journal.writing("a", None, {"a.txt": "one"}):
        (tmp_path / "a.txt").write_text("one")
    assert not (tmp_path / JOURNAL_FILE).exists()
    with journal.writing("a", "k1", {"a.txt": "two"}):
        (tmp_path / "a.txt").write_text("two")
    assert not rerun_does(tmp_path, "k1")
    with journal.writing("a", None, {"a.txt": "three"}):
        (tmp_path / "a.txt").write_text("three")
    journal.close()
    assert rerun_does(tmp_path, "k1")


def test_what_a_killed_run_left_half_written_is_swept_unless_somebody_works(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    left = [tmp_path / ".quasr-00ff.tmp", tmp_path / "sub" / ".quasr-17.tmp"]
    kept = [tmp_path / ".other.tmp", tmp_path / "quasr-1.tmp", tmp_path / "else" / ".quasr-2.tmp"]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    journal.sweep(["a", "sub/b"])  # no journal, so no run of ours was here
    assert all(path.exists() for path in left)
    journal.begin("a", "k", {"a.txt": "x"})
    other = Journal(tmp_path)
    other.sweep(["a", "sub/b"])
    assert all(path.exists() for path in left)
    other.close()
    journal.close()
    swept = Journal(tmp_path)
    swept.sweep(["a", "sub/b"])
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
    swept.begin("a", "k", {"a.txt": "x"})
    swept.close()
    assert len(lines(tmp_path / JOURNAL_FILE)) == 2


def test_a_journal_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.begin("a", "k1", {"a.txt": "text"})
    first.end("a")
    first.close()
    (tmp_path / "a.txt").write_text("corrected by hand")
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(tmp_path)
        assert journal.key("a") == ("k1" if end == len(whole) - 1 else None)
        journal.begin("b", "k2", {"a.txt": "x"})
        journal.end("b")
        journal.close()
        assert Journal(tmp_path).key("b") == "k2"


def test_the_fingerprint_follows_audio_model_and_options(tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    audio.write_bytes(b"one")
    item, plain = single(str(audio)), Fingerprint("m", {"language": None})
    key = plain.of(item)
    assert key == Fingerprint("m", {"language": None}).of(item)
    copy = tmp_path / "b.wav"
    copy.write_bytes(b"one")
    assert plain.of(single(str(copy))) == key
    others = [
        Fingerprint("n", {"language": None}).of(item),
        Fingerprint("m", {"language": "de"}).of(item),
        plain.of(replace(item, language="de")),
        plain.of(replace(item, context="Ohm")),
        plain.of(single("https://host/a.wav")),
    ]
    audio.write_bytes(b"two")
    others.append(plain.of(item))
    assert len({key, *others}) == 7
    assert plain.of(single(str(tmp_path / "none.wav"))) is None
    assert plain.of(single("-")) is None


def test_the_models_identity_changes_with_its_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    (tmp_path / "README.md").touch()
    before = identity(tmp_path)
    (tmp_path / "README.md").write_text("more")
    assert identity(tmp_path) == before
    os.utime(weights, (1, 1))
    touched = identity(tmp_path)
    weights.write_bytes(b"12345")
    assert len({before, touched, identity(tmp_path)}) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_is_told_by_the_close_as_well(tmp_path: Path) -> None:
    """A line that was refused stays buffered, and the close tries it again."""
    results, journal = JobLines(tmp_path / "out.jsonl"), Journal(tmp_path)
    results._file = full = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(OptionError, match=r"out\.jsonl cannot be written \(No space left on device\)"):
        results.fail(single("a.wav"), "broken")
    with pytest.raises(OptionError, match=r"out\.jsonl cannot be written \(No space left on device\)"):
        results.close()
    assert full.closed

    journal._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(OptionError, match=r"jsonl cannot be written \(No space"):
        journal.begin("a", "key", {"a.txt": "a"})
    with pytest.raises(OptionError, match=r"jsonl cannot be written \(No space"):
        journal.close()
    assert journal._file.closed
