"""What a process does from its start until a saved folder is loaded on a GPU, and until a first clip is transcribed.

    TRITON_CACHE_DIR=cache XDG_CACHE_HOME=cache PYTHONPYCACHEPREFIX=bytecode python tests/gpu/start.py FOLDER

The first time with empty folders kernels and bytecode are compiled; the second time they are there. Two processes are
told of: one as users have it, and one that waits for the device after each stage of the clip. Then come the imports.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS, TOKENS = 6, 24
IMPORTS = 15

marks: list[tuple[float, str]] = []
lookups: list[float] = []


def age() -> float:
    """Seconds since this process was started, to a hundredth: field 22 of Linux's stat, in ticks since boot."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def mark(what: str) -> None:
    thread = threading.current_thread()
    marks.append((age(), what if thread is threading.main_thread() else f"  in a thread: {what}"))


def watch(owner: Any, name: str, what: str, wait: Callable[[], object] | None = None) -> None:
    """Notes when `owner.name` has returned for the first time, and what it started has ended."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if getattr(owner, name) is watched:
            setattr(owner, name, function)
            if wait is not None:
                wait()
            mark(what)
        return result

    setattr(owner, name, watched)


def watch_load() -> None:
    """What `quasr.load` calls without torch, and, once there is torch, what it calls then."""
    from quasr.engine import context, device
    from quasr.pipeline import transcriber

    watch(context._Context, "__init__", "CUDA context made")
    watch(device, "_torch", "torch imported")
    watch(device, "_device", "torch has initialised CUDA")
    choose = transcriber.choose

    def chosen(*args: str) -> Any:
        placement = choose(*args)
        transcriber.choose = choose
        watch_torch()
        return placement

    transcriber.choose = chosen
    watch(transcriber, "check_vocabulary", "config and tokenizer read")
    watch(transcriber, "second_tries", "files of the folder looked at")


def watch_torch() -> None:
    from quasr.engine import factory
    from quasr.quant import store
    from quasr.weights import load

    mark("engine and network imported")
    watch(factory, "prepare_kernels", "kernels imported")
    watch_triton()
    watch(load, "_build", "network built without memory")
    watch(load, "Staging", "first memory on the GPU side: staging buffers")
    watch(store, "load_network", "weights read")
    watch(factory, "make_engine", "engine made")


def watch_triton() -> None:
    import triton.compiler
    from triton.runtime import cache

    mark("Triton imported")
    if hasattr(cache, "triton_key"):
        watch(cache, "triton_key", "Triton's library hashed")
    compile_kernel = triton.compiler.compile

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        kernel = compile_kernel(*args, **kwargs)
        lookups.append(time.perf_counter() - started)
        return kernel

    triton.compiler.compile = timed


def watch_clip(wait: bool) -> None:
    import torch

    from quasr.engine import fast_engine

    ended = torch.cuda.synchronize if wait else None
    watch(fast_engine, "embed_prompts", "encoder and prompt embedded", ended)
    watch(fast_engine.Rows, "admit", "prompt computed, first token", ended)
    watch(fast_engine.Steps, "run", "first decode steps", ended)


def work(folder: str, wait: bool) -> None:
    """Prints the marks of loading and a clip."""
    mark("interpreter up")
    import numpy as np

    mark("numpy imported")
    import quasr

    load = quasr.load
    mark("quasr imported")
    watch_load()
    noise = (np.random.default_rng(0).standard_normal(SECONDS * 16000) * 0.1).astype(np.float32)
    transcriber = load(folder, device="cuda")
    mark("LOADED")
    watch_clip(wait)
    transcriber.transcribe((noise, 16000), max_new_tokens=TOKENS)
    mark(f"A CLIP OF {SECONDS} s TRANSCRIBED")
    transcriber.transcribe((noise, 16000), max_new_tokens=TOKENS)
    mark("again")
    before = 0.0
    for at, what in sorted(marks):
        print(f"{at:7.2f} s {at - before:+6.2f}  {what}")
        before = at
    print(f"{len(lookups)} kernels looked up or compiled in {sum(lookups):.2f} s")
    import torch

    if not Path(torch.__cached__).is_file():
        print("torch has no bytecode here: importing it compiles 1,000 modules anew, which takes seconds")


def imports() -> None:
    """The largest times that single modules took for themselves, by `python -X importtime`."""
    code = (
        "import quasr.pipeline.transcriber, torch, quasr.engine.factory, quasr.quant.store, quasr.kernels.triton_linear"
    )
    told = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    rows = [line.removeprefix("import time:").split("|") for line in told.stderr.splitlines() if "|" in line][1:]
    print(f"imports: {sum(int(row[0]) for row in rows) / 1e6:.2f} s for {len(rows)} modules, of which alone")
    for own, _, name in sorted(rows, key=lambda row: -int(row[0]))[:IMPORTS]:
        print(f"{int(own) / 1e6:7.3f} s {name.strip()}")


def main() -> int:
    if len(sys.argv) == 3:
        work(sys.argv[1], sys.argv[2] == "waiting")
        return 0
    for how in ("as it is", "waiting"):
        print(f"{how}:", flush=True)
        if code := subprocess.run([sys.executable, __file__, sys.argv[1], how], check=False).returncode:
            return code
    imports()
    return 0


if __name__ == "__main__":
    sys.exit(main())
