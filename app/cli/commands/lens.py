"""`depthscope lens`: what the head of a model reads from the state at each depth, and from each stream."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.model_and_text import Subject, add_subject, measured
from depthscope.app.text.terminal import Progress, emit, printable, say, show_rows

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument(
        "--tuned",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also train one affine map per depth",
    )


def _run(args: argparse.Namespace) -> int:
    def measure(subject: Subject, options: dict[str, Any], progress: Progress) -> xr.Dataset:
        from depthscope.probes.lens import lens

        model, batch, text = subject.loaded.model, subject.batch, subject.token_text
        return lens(model, batch, tuned=args.tuned, seed=args.seed, token_text=text, **options)

    _print(*measured(args, "lens", "reading", measure), args)
    return FINE


def _print(result: xr.Dataset, path: Path | None, args: argparse.Namespace) -> None:
    from depthscope.diagnostics.experiments import lens_rows, prediction_depths

    rows, depths = lens_rows(result), prediction_depths(result)
    if args.json:
        emit(
            {
                "model": result.attrs["model"],
                "file": None if path is None else str(path),
                "sequences": result.sizes["sample"],
                "no_loss": result.attrs["no_loss"],
                "readings": rows,
                "prediction_depth": [{"lens": name, **found._asdict()} for name, found in depths.items()],
            }
        )
        return
    say(
        f"{printable(result.attrs['model'])}, {result.sizes['sample']} sequences; tuned lens: {result.attrs['tuned_on']}"
    )
    say()
    show_rows(
        ("lens", "depth", "stream", "agreement", "KL, nats", "loss, nats", "entropy, nats"),
        [
            (
                str(row["lens"]),
                str(row["depth"]),
                str(row["stream"]),
                "-" if row["agreement"] is None else f"{100 * row['agreement']:.3g} %",
                *(
                    "-" if row[name] is None else f"{row[name]:.3g}"
                    for name in ("kl", "cross_entropy", "entropy")
                ),
            )
            for row in rows
        ],
    )
    say()
    for name, found in depths.items():
        say(
            f"prediction depth, {name} lens: {found.mean:.3g} of {int(result['depth'].values[-1])} "
            f"(95 %: {found.low:.3g} to {found.high:.3g}); from there on the most likely prediction stays the output's"
        )
    if path is not None:
        say(f"saved: {printable(path)}")


COMMAND = Command(
    "lens", "read the state at each depth by the model's own head (logit lens)", _add_arguments, _run
)
