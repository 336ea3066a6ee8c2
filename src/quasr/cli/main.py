"""`quasr`: the commands, and how their errors become one line and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Annotated, Any

import typer

from quasr import __version__
from quasr.cli.bench import bench
from quasr.cli.compare import compare
from quasr.cli.doctor import doctor
from quasr.cli.eval import evaluate
from quasr.cli.export import export
from quasr.cli.plan import plan
from quasr.cli.quantize import quantize
from quasr.cli.terminal import abandon_stdout, note, open_closed_streams, refused_stdout, result
from quasr.cli.transcribe import transcribe, whisper_spelling
from quasr.errors import QuasrError

INTERRUPTED = 130
"""128 + SIGINT: what a shell reports for a program that the user stopped."""

BROKEN_PIPE = 1
"""Click's own code for it, which covers what commands print; ours covers the last flush."""

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)
"""What a stream says that cannot be written: full, over a quota, closed, broken."""

UsageError: Any = typer.BadParameter.__mro__[1]
"""Click's base of wrong arguments, out of whichever click this Typer carries."""

app = typer.Typer(
    name="quasr",
    help="Speech to text with Qwen3-ASR.",
    add_completion=False,
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("transcribe", context_settings={"token_normalize_func": whisper_spelling})(transcribe)
app.command("eval")(evaluate)
app.command("quantize")(quantize)
app.command("export")(export)
app.command("plan")(plan)
app.command("compare")(compare)
app.command("bench")(bench)
app.command("doctor")(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        result(f"quasr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Speech to text with Qwen3-ASR."""


def run() -> None:
    """Entry point of the `quasr` program: exits with the code that the outcome deserves."""
    open_closed_streams()
    # Transcripts are UTF-8 whatever the locale says: a pipe must not fail on the first accent.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except QuasrError as error:
        return _complain(str(error), error.exit_code)
    except UsageError as error:
        return _complain(f"{error.format_message()} See 'quasr --help'.", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, as with `| head`.
        abandon_stdout()
        return BROKEN_PIPE
    except OSError as error:
        # Typer prints the help. What else is written is no stream, and has a name.
        if error.filename is not None or error.errno not in WRITE_ERRORS:
            raise
        refused = refused_stdout(error)
        return _complain(str(refused), refused.exit_code)
    return code if isinstance(code, int) else 0


def _complain(message: str, code: int) -> int:
    note(f"error: {' '.join(message.split())}")
    return code
