from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from made_sound import write_wav
from tiny_checkpoint import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the -hf layout."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "hf", "hf")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network and tokenizer in the original layout."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "original", "original")


@pytest.fixture(scope="session")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of sound."""
    return write_wav(tmp_path_factory.mktemp("audio") / "sound.wav", 2.0)
