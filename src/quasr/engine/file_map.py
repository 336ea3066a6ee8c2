"""A file in memory, to be read only: the system holds its pages once for all processes that map it."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

from quasr.errors import CheckpointError
from quasr.export.manifest import AGAIN

if TYPE_CHECKING:
    from pathlib import Path


def map_file(path: Path, *, whole: bool) -> mmap.mmap:
    """Maps `path`. `whole`: all of it will be read again and again, else a little here and there.

    A system that can is asked for large pages of the one and for small pages of the other: with pages of 2 MB memory is
    read some 2 % faster, but the first byte that is wanted counts for all of a page. Linux reads a file into large
    pages where its file system has them; what it has read before stays as it is. Raises CheckpointError for a file that
    is missing or empty.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped ({error}): {AGAIN}") from error
    advice = getattr(mmap, "MADV_HUGEPAGE" if whole else "MADV_NOHUGEPAGE", None)
    with suppress(OSError):  # a kernel without large pages
        if advice is not None:
            mapped.madvise(advice)
    return mapped
