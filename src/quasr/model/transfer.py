"""Small arrays on their way to the device, without anybody waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray


def to_device(values: NDArray[Any] | Sequence[int], device: torch.device) -> Tensor:
    """A tensor on `device`, whole numbers as int64. Copies to a GPU go through page-locked memory, in stream order."""
    host = torch.as_tensor(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
