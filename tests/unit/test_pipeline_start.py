"""What is done beside the first import of torch: when, and that nothing of it is left behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import quasr
from quasr.errors import CheckpointError, ModelNotFoundError
from quasr.export.manifest import MANIFEST_FILE
from quasr.pipeline import start, transcriber
from quasr.pipeline.onnx import EngineWish
from quasr.pipeline.start import head_start

if TYPE_CHECKING:
    from collections.abc import Iterator

CUDA = EngineWish(device="cuda:1")
AUTO = EngineWish()
HUB = "org/name"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Devices whose context was made, in a process that has not imported torch and a machine with a driver."""
    devices: list[str] = []

    @contextmanager
    def note(device: str) -> Iterator[None]:
        devices.append(device)
        yield

    monkeypatch.setattr(start, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(start, "context_ahead", note)
    monkeypatch.setattr(start, "NVIDIA_DRIVERS", (tmp_path,))
    return devices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name in ("model-2.safetensors", "model-1.safetensors", "config.json"):
        (made / name).write_bytes(b"\0" * 8)
    return made


def wait_for_reader() -> None:
    for thread in threading.enumerate():
        if thread.name == "quasr-read-ahead":
            thread.join(30)


@pytest.mark.parametrize(
    ("wish", "device"),
    [
        (CUDA, "cuda:1"),
        (AUTO, "auto"),
        (EngineWish(engine="torch"), "auto"),
        (EngineWish(precision="bf16"), "auto"),
        (EngineWish(torch_only="a memory plan is torch's alone"), "auto"),
    ],
)
def test_a_folder_for_a_gpu(opened: list[str], folder: Path, wish: EngineWish, device: str) -> None:
    with head_start(str(folder), wish):
        assert opened == [device]
        assert not gc.isenabled()
    assert gc.isenabled()
    wait_for_reader()


@pytest.mark.parametrize(
    "wish", [EngineWish(device="cpu"), EngineWish(engine="onnx"), EngineWish(engine="torch", device="cpu")]
)
def test_nothing_without_a_gpu(opened: list[str], folder: Path, wish: EngineWish) -> None:
    with head_start(str(folder), wish):
        assert gc.isenabled()
    assert opened == []


def test_nothing_for_what_onnx_runtime_runs(opened: list[str], folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text("{}", encoding="utf-8")
    for model in ("demo", str(folder), HUB):
        with head_start(model, AUTO):
            assert gc.isenabled()
    assert opened == []


def test_nothing_without_a_driver(opened: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "NVIDIA_DRIVERS", (folder / "nvidiactl",))
    with head_start(str(folder), CUDA):
        assert gc.isenabled()
    assert opened == []


def test_nothing_without_torch(opened: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    with head_start(str(folder), CUDA):
        assert gc.isenabled()
    assert opened == []


def test_nothing_once_torch_is_there(opened: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.sys, "modules", {"torch": None})
    with head_start(str(folder), CUDA):
        assert gc.isenabled()
    assert opened == []


def test_objects_are_collected_while_a_hub_is_asked(opened: list[str]) -> None:
    with head_start(HUB, CUDA):
        assert gc.isenabled()
    assert opened == ["cuda:1"]


def test_a_collector_that_was_off_stays_off(opened: list[str], folder: Path) -> None:
    gc.disable()
    try:
        with head_start(str(folder), CUDA):
            assert opened
        assert not gc.isenabled()
    finally:
        gc.enable()
    wait_for_reader()


@pytest.mark.skipif(sys.platform != "linux", reason="files are read ahead by a call of Linux")
def test_weights_are_read_ahead(opened: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes of all of them, whatever the system takes at once."""
    taken: list[tuple[str, int, int]] = []
    send = os.sendfile

    def note(out: int, file: int, offset: int, count: int) -> int:
        sent = send(out, file, offset, min(count, 5))
        taken.append((Path(f"/proc/self/fd/{file}").resolve().name, offset, sent))
        return sent

    monkeypatch.setattr(os, "sendfile", note)
    with head_start(str(folder), CUDA):
        wait_for_reader()
    parts = [(0, 5), (5, 3), (8, 0)]
    assert taken == [(f"model-{number}.safetensors", *part) for number in (1, 2) for part in parts]


def test_weights_that_cannot_be_read_are_left(
    opened: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "sendfile", refuse, raising=False)
    with head_start(str(folder), CUDA):
        wait_for_reader()
    assert opened == ["cuda:1"]
    assert capfd.readouterr() == ("", "")


def test_loading_ends_the_head_start_when_it_fails(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcriber, "choose", lambda *_: object())
    with pytest.raises(ModelNotFoundError):
        quasr.load("no-such-folder/at/all", device="cuda:1")
    assert opened == ["cuda:1"]


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
@pytest.mark.parametrize("model", ["~no-such-user/model", "a" * 300, ""], ids=["home", "long", "empty"])
def test_a_path_that_cannot_be_is_the_loader_s_error(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, model: str, device: str
) -> None:
    monkeypatch.setattr(transcriber, "choose", lambda *_: object())
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        quasr.load(model, device=device)
    assert gc.isenabled()


def test_loading_collects_again_when_it_fails(opened: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(transcriber, "choose", lambda *_: seen.append(gc.isenabled()))
    with pytest.raises(CheckpointError):
        quasr.load(folder, device="cuda:1")
    assert (opened, seen) == (["cuda:1"], [False])
    assert gc.isenabled()
    wait_for_reader()
