"""The CUDA context that is made ahead: which calls the driver gets, in what order, and what happens without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from quasr.engine import context
from quasr.engine.context import context_ahead

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path

NO_DEVICE, NOT_INITIALISED = 100, 3
"""CUDA's error numbers."""


class Driver:
    """Stands in for libcuda: notes its calls, and gives device 40 + n for the n-th visible one."""

    def __init__(self, **refusals: int) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._refusals = refusals

    def _call(self, name: str, *arguments: object) -> int:
        self.calls.append((name, *arguments))
        return self._refusals.get(name, 0)

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._call("init", flags, os.environ.get("CUDA_MODULE_LOADING"))

    def cuDeviceGet(self, device: ctypes._CArgObject, index: int) -> int:  # noqa: N802
        device._obj.value = 40 + index  # type: ignore[attr-defined]
        return self._call("get", index)

    def cuDevicePrimaryCtxRetain(self, _: object, device: ctypes.c_int) -> int:  # noqa: N802
        return self._call("retain", device.value)

    def cuDevicePrimaryCtxRelease_v2(self, device: ctypes.c_int) -> int:  # noqa: N802
        return self._call("release", device.value)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restored afterwards."""
    monkeypatch.setenv("CUDA_MODULE_LOADING", "")
    monkeypatch.delenv("CUDA_MODULE_LOADING")


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    monkeypatch.setattr(context.ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    return driver


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_context_is_held_until_the_end(monkeypatch: pytest.MonkeyPatch, device: str, index: int) -> None:
    driver = use(monkeypatch, Driver())
    with context_ahead(device):
        pass
    number = 40 + index
    assert driver.calls == [("init", 0, "LAZY"), ("get", index), ("retain", number), ("release", number)]


def test_it_is_made_beside_what_is_done_within(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, within = use(monkeypatch, Driver()), threading.Event()
    started = threading.Event()

    def wait(flags: int) -> int:
        started.set()
        return 0 if within.wait(30) else NOT_INITIALISED

    monkeypatch.setattr(driver, "cuInit", wait)
    with context_ahead("cuda"):
        assert started.wait(30)
        assert driver.calls == []
        within.set()
    assert [name for name, *_ in driver.calls] == ["get", "retain", "release"]


def test_it_is_let_go_of_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(monkeypatch, Driver())
    with pytest.raises(KeyError), context_ahead("cuda"):
        raise KeyError
    assert driver.calls[-1] == ("release", 40)


@pytest.mark.parametrize(
    ("refusals", "made"),
    [
        ({"init": NOT_INITIALISED}, ["init"]),
        ({"get": NO_DEVICE}, ["init", "get"]),
        ({"retain": NO_DEVICE}, ["init", "get", "retain"]),
    ],
)
def test_what_the_driver_refuses_is_left(
    monkeypatch: pytest.MonkeyPatch, refusals: dict[str, int], made: list[str]
) -> None:
    driver = use(monkeypatch, Driver(**refusals))
    with context_ahead("cuda:1"):
        pass
    assert [name for name, *_ in driver.calls] == made


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(context, "DRIVER", "libnobody-has-this.so.1")
    with context_ahead("cuda"):
        pass
    assert capfd.readouterr() == ("", "")


def test_the_users_way_of_loading_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    driver = use(monkeypatch, Driver())
    with context_ahead("cuda"):
        pass
    assert driver.calls[0] == ("init", 0, "EAGER")


STUB = """
#include <stdio.h>
int cuInit(unsigned flags) { printf("init %u\\n", flags); return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; printf("get %d\\n", index); return 0; }
int cuDevicePrimaryCtxRetain(void **made, int device) { *made = made; printf("retain %d\\n", device); return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { printf("release %d\\n", device); return fflush(stdout); }
"""
"""The driver's signatures as its API reference has them, for what ctypes makes of the arguments."""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="no C compiler for a stub library")
def test_arguments_reach_a_library_of_c(tmp_path: Path) -> None:
    source = tmp_path / "stub.c"
    source.write_text(STUB, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    code = "from quasr.engine.context import context_ahead\nwith context_ahead('cuda:2'): pass"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["init 0", "get 2", "retain 42", "release 42", ""]
    assert done.stderr == ""
