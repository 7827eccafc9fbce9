"""`depthscope jacobian`: how each block and the complete chain stretch small changes of the state, saved next to the run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.model_and_text import Subject, add_subject, measured
from depthscope.app.cli.values import Number
from depthscope.app.text.terminal import Progress, emit, printable, say, show_rows

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr

SEQUENCES, LENGTH = 2, 32
"""A product with a Jacobian is a backward, and each block takes some hundreds: a short text, unless another is asked for."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument(
        "--values",
        type=Number(1, 64),
        default=8,
        metavar="N",
        help="singular values of each Jacobian (default 8)",
    )
    parser.add_argument(
        "--tokens",
        choices=("all", "own"),
        default="all",
        help="all: every token moves every token (default); own: each token only itself, which costs one backward per token",
    )
    parser.add_argument(
        "--routing",
        choices=("full", "frozen"),
        default="full",
        help="with streams: through H_pre, H_post and H_res too (default), or with them held constant",
    )


def _run(args: argparse.Namespace) -> int:
    args.sequences, args.length = args.sequences or SEQUENCES, args.length or LENGTH

    def measure(subject: Subject, options: dict[str, Any], progress: Progress) -> xr.Dataset:
        from depthscope.probes.jacobian import jacobians_by_depth

        asked = {name: getattr(args, name) for name in ("values", "tokens", "routing", "seed")}
        result = jacobians_by_depth(
            subject.loaded.model, subject.batch, **asked, progress=progress, **options
        )
        if subject.data_digest is not None:
            result.attrs["data_digest"] = subject.data_digest
        return result

    _print(*measured(args, "jacobian", "measuring", measure), args)
    return FINE


def _print(result: xr.Dataset, path: Path | None, args: argparse.Namespace) -> None:
    from depthscope.diagnostics.experiments import jacobian_rows

    rows = jacobian_rows(result)
    if args.json:
        attrs = {name: result.attrs[name] for name in ("model", "tokens", "routing", "num_tokens", "dtype")}
        emit({**attrs, "file": None if path is None else str(path), "jacobians": rows})
        return
    say(
        f"{printable(result.attrs['model'])}: Jacobians of {result.attrs['num_tokens']} tokens, tokens "
        f"{result.attrs['tokens']}, routing {result.attrs['routing']}, {result.attrs['dtype']}"
    )
    say()
    show_rows(
        ("from", "to", "largest σ", "mean σ²", "variance of σ²"),
        [
            (
                str(row["start"]),
                str(row["stop"]),
                _at_least(row["singular_values"][0], row["errors"][0]),
                _number(row["mean_square"], row["mean_square_error"]),
                _number(row["square_variance"], row["square_variance_error"]),
            )
            for row in rows
        ],
    )
    say()
    say("≥: found in a subspace, so that the largest σ may be larger; some σ lies within the residual of it")
    say("mean σ² 1 and variance 0: every small change keeps its size (dynamical isometry)")
    if path is not None:
        say(f"saved: {printable(path)}")


def _at_least(value: float | None, residual: float | None) -> str:
    """A lower bound, with the residual of the vector that gives it."""
    if value is None:
        return "-"
    return f"≥ {value:.4g}" if residual is None else f"≥ {value:.4g} (residual {residual:.1g})"


def _number(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.1g}"


COMMAND = Command(
    "jacobian",
    "singular values of the Jacobian of every block, and of all blocks together",
    _add_arguments,
    _run,
)
