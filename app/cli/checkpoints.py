"""How do commands load a checkpoint? The arguments that name it, its loading, and the errors of its capture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from depthscope.app.text.terminal import working

if TYPE_CHECKING:
    from depthscope.probes.checkpoints.load import LoadedModel


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, and how its model is built and read."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="transformers folder, .gguf file, module:factory (imports and runs that code: only what you trust), or the word "
        "smollm2",
    )
    parser.add_argument("--weights", metavar="FILE", help="state dict for module:factory")
    parser.add_argument(
        "--layers", metavar="PATH", help="the list of blocks, such as model.layers (else detected)"
    )
    parser.add_argument(
        "--layout", metavar="AXES", help="axes of the state, such as 'B T N D' (else detected)"
    )
    # Not `positive_integer`: the capture refuses a wrong number itself, and the Python interface needs that too.
    parser.add_argument("--streams", type=int, metavar="N", help="streams, where the layout merges them")
    parser.add_argument(
        "--sites",
        metavar="NAMES",
        help="what to keep, such as mid,final or 'blocks.3.hook_resid_post' (else all states)",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the sequences (default 0)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument(
        "--dtype", metavar="float32|bfloat16|…", help="precision of the model (default its own)"
    )


def load(args: argparse.Namespace) -> LoadedModel:
    """The model of ``args.checkpoint`` with its tokenizer.

    Parameters
    ----------
    args : Namespace
        Arguments of `add_checkpoint`.

    Returns
    -------
    LoadedModel
    """
    # Seconds, in which nothing else would be printed.
    with working("importing torch"):
        from depthscope.probes.checkpoints.load import load_checkpoint
    with working(f"loading {args.checkpoint}"):
        return load_checkpoint(args.checkpoint, weights=args.weights, dtype=args.dtype, device=args.device)


def site_names(args: argparse.Namespace) -> list[str] | None:
    """Names given with ``--sites``; None asks for every state.

    Parameters
    ----------
    args : Namespace
        Arguments of `add_checkpoint`.

    Returns
    -------
    list of str or None
    """
    # Not `comma_separated`: an empty name is refused by the capture, which lists the sites that there are.
    return None if args.sites is None else [name.strip() for name in args.sites.split(",")]


@contextmanager
def capture_errors_for_users() -> Iterator[None]:
    """Turn a refused capture, or an error of the model's own code, into a ValueError that the command line prints as one line.

    Every other error is ours and keeps its traceback.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        With the message of the refusal, or the error of the model and its place.
    """
    from depthscope.probes.checkpoints.user_code import is_model_error, own_error
    from depthscope.probes.model.errors import CaptureError

    try:
        # What the model prints in its forward is no result of the command.
        with redirect_stdout(sys.stderr):
            yield
    # A RuntimeError of its own: the message tells the user what to do, so that no traceback is needed.
    except CaptureError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a model may call sys.exit
        if not is_model_error(error):
            raise
        raise ValueError(own_error("the model", error)) from error
