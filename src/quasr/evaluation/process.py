"""Measuring in fresh processes, so that memory, caches and imports of one thing do not count for the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MESSAGE_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """What the process wrote, or in one line why it did not."""

    text: str | None
    error: str = ""


def ask(module: str, question: str, environment: Mapping[str, str] | None = None) -> Answer:
    """Runs `python -m module FILE` with `question` on standard input; the answer is what it writes into FILE.

    `environment` is added to this process's own. Where the exit code is not 0, the last line on standard error is why.
    """
    with tempfile.TemporaryDirectory(prefix="quasr-") as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", module, str(answer)],
            input=question,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            env={**os.environ, **(environment or {})},
        )
        if done.returncode == 0:
            return Answer(answer.read_text(encoding="utf-8"))
    return Answer(None, _reason(done))


def end_at_interrupt() -> None:
    """For a process that `ask` starts: Ctrl-C ends it at once, unless it is ignored.

    As an exception it may be swallowed by FFmpeg's callbacks, and a clip would count as damaged.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"the process was ended by {name}" + (": probably out of memory" if name == "SIGKILL" else "")
    last = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
    return f"{last[:MESSAGE_LENGTH]} (exit code {done.returncode})"
