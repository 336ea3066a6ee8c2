"""What every test may rely on, however the test run was started."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

if not Path("/dev/nvidiactl").exists():
    # Triton reads it when it is imported, which any test may do: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Wall time says nothing where others share the processor.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C works in tests of it: a run that a shell started in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _thawed() -> Iterator[None]:
    """At the end nothing is kept from the collector, so that what was never closed is told."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """
    What is alive before a file of tests (torch and transformers: a million objects) is left out of its collections,
    and what the file left unclosed is told at its end.
    """
    gc.freeze()
    yield
    gc.collect()
