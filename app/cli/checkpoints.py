"""How do commands load a checkpoint? The arguments that name it, its loading, and the errors of its capture."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import add_layers
from depthscope.app.cli.paths import InputPath
from depthscope.app.cli.values import Checked, Number, OneOf, quoted
from depthscope.app.text.terminal import working
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    from depthscope.probes.checkpoints.load import LoadedModel


DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Types in which a model can run: a capture measures real numbers, and torch has no matrix products of 8-bit floats."""

OUTSIDE_OF_BRACKETS = re.compile(r",(?![^{(]*[})])")
_DEVICE = re.compile(r"(cpu|cuda|xpu|mps)(?::(\d{1,3}))?", re.ASCII)


@dataclass(frozen=True)
class Device(Checked):
    """A torch device by its name, such as ``cpu`` or ``cuda:1``; `load` asks whether this machine has it."""

    def check(self, value: str, option: str, args: argparse.Namespace) -> None:
        """Refuse the name of no device that a model can run on; see `Checked.check`."""
        if not _DEVICE.fullmatch(value):
            raise InputError(
                f"{option} {quoted(value)} is not a device; expected cpu, cuda, cuda:1, xpu or mps"
            )


def require_device(device: str) -> None:
    """Refuse a device that this machine does not have, before a model is loaded."""
    import torch

    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    kind, _, number = device.partition(":")
    if int(number or 0) >= counts[kind]:
        present = [
            f"{name}:{index}" if count > 1 else name
            for name, count in counts.items()
            for index in range(count)
        ]
        raise InputError(f"this machine has no device {device!r}; it has {', '.join(present)}")


def add_checkpoint(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """A checkpoint as ``args.checkpoint``, or several as ``args.checkpoints``, and how its model is built and read."""
    parser.add_argument(
        "checkpoints" if several else "checkpoint",
        metavar="CHECKPOINT",
        nargs="+" if several else None,
        type=InputPath(must_exist=False),
        help="transformers folder, .gguf file, organisation/name on the Hugging Face hub (@revision), module:factory (imports "
        "and runs that code: only what you trust), or the word smollm2",
    )
    parser.add_argument("--weights", type=InputPath(), metavar="FILE", help="state dict for module:factory")
    add_layers(parser)
    parser.add_argument(
        "--layout", metavar="AXES", help="axes of the state, such as 'B T N D' (default: detected)"
    )
    parser.add_argument(
        "--streams",
        type=Number(1, 65536),
        metavar="N",
        help="number of streams, where the layout merges them with another axis",
    )
    add_sites(parser)
    parser.add_argument(
        "--seed",
        type=Number(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the sampled sequences (default 0)",
    )
    parser.add_argument(
        "--device", type=Device(), default="cpu", metavar="cpu|cuda|…", help="torch device (default cpu)"
    )
    parser.add_argument(
        "--dtype",
        type=OneOf(lambda: DTYPES),
        metavar="|".join(DTYPES),
        help="precision of the model (default its own)",
    )


def read_as(args: argparse.Namespace) -> dict[str, Any]:
    """How the model is read, of ``--layers``, ``--layout`` and ``--streams`` what was given; the rest is detected."""
    options = {name: getattr(args, name) for name in ("layers", "layout", "streams")}
    return {name: value for name, value in options.items() if value is not None}


def load(args: argparse.Namespace) -> LoadedModel:
    """The model of ``args.checkpoint`` with its tokenizer."""
    # Seconds, in which nothing else would be printed.
    with working("importing torch"):
        from depthscope.probes.checkpoints.hub import is_hub_name
        from depthscope.probes.checkpoints.load import load_checkpoint
    require_device(args.device)
    # What is fetched has a bar of its own, which a spinner would break.
    with nullcontext() if is_hub_name(args.checkpoint) else working(f"loading {args.checkpoint}"):
        return load_checkpoint(args.checkpoint, weights=args.weights, dtype=args.dtype, device=args.device)


def add_sites(parser: argparse.ArgumentParser) -> None:
    """``--sites``, for `site_names`."""
    parser.add_argument(
        "--sites",
        metavar="NAMES",
        help="sites to record, such as mid,final or 'blocks.{0,4,8}.hook_resid_post' (default: all states)",
    )


def site_names(args: argparse.Namespace) -> list[str] | None:
    """Names given with ``--sites``; None asks for every state."""
    # Not `comma_separated`: an empty name is refused by the capture, which lists the sites that there are.
    return None if args.sites is None else [name.strip() for name in OUTSIDE_OF_BRACKETS.split(args.sites)]


@contextmanager
def capture_errors_for_users() -> Iterator[None]:
    """Turn a refused capture, or an error of the model's own code, into a ValueError that the command line prints as one line.

    Every other error is ours and keeps its traceback.

    Raises InputError: With the message of the refusal, or the error of the model and its place.
    """
    from depthscope.probes.checkpoints.user_code import is_model_error, own_error
    from depthscope.probes.model.errors import CaptureError

    try:
        # What the model prints in its forward is no result of the command.
        with redirect_stdout(sys.stderr):
            yield
    # A RuntimeError of its own: the message tells the user what to do, so that no traceback is needed.
    except CaptureError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a model may call sys.exit
        if not is_model_error(error):
            raise
        raise InputError(own_error("the model", error)) from error
