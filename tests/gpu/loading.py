"""Seconds to load a checkpoint folder on to a GPU as a compute type, and the most memory beside the weights.

    python tests/gpu/loading.py FOLDER int8

`auto` loads a saved folder as it is. CUDA is initialised before the clock starts; the page cache should be warm.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from quasr.model.config import read_config
from quasr.quant.recipe import recipe_for
from quasr.quant.store import load_network


def main() -> None:
    folder, scheme = Path(sys.argv[1]), sys.argv[2]
    device = torch.device("cuda", 0)
    torch.ones(64, 64, device=device, dtype=torch.bfloat16).matmul(torch.ones(64, 1, device=device).bfloat16())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    network, name = load_network(folder, read_config(folder), recipe_for(scheme), torch.bfloat16, device)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    beside = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    print(f"{name}: {seconds:.2f} s, weights {weights / 1e9:.3f} GB, most beside them {beside / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
