"""Small arrays on their way to the device, without anybody waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray


def to_device(values: NDArray[Any] | Sequence[int], device: torch.device) -> Tensor:
    """A tensor on `device`, a list as int64. Copies to a GPU go through page-locked memory, in stream order."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def all_to_device(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, ...]:
    """`to_device` of several (n,) arrays by one copy, whose parts they share."""
    return to_device(np.concatenate(arrays), device).split([len(one) for one in arrays])
