"""Stand-ins for other packages' classes: change one import, keep the rest of the program."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable


class ArgumentError(OptionError, ValueError):
    """An argument that makes no sense, or that quasr cannot honour: a ValueError too, as those packages raise."""


def warn_ignored(names: Iterable[str]) -> None:
    """One UserWarning for all arguments that have no meaning here, at the line that calls our caller."""
    ignored = ", ".join(names)
    if ignored:
        warnings.warn(f"quasr has no use for {ignored} and ignores it", UserWarning, stacklevel=3)
