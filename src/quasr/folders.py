"""Where quasr keeps what it makes for itself."""

from __future__ import annotations

import os
from pathlib import Path

from quasr.errors import ResourceError


def cache_folder(name: str) -> Path:
    """`quasr/NAME` in XDG_CACHE_HOME, or else in ~/.cache. Raises ResourceError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quasr" / name
    except RuntimeError as error:
        raise ResourceError(f"there is no home folder for quasr's cache ({name}): set XDG_CACHE_HOME") from error
