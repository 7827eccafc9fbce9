"""`depthscope ablate`: change the forward of a model at one place after another, and measure what that does."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.model_and_text import Subject, add_subject, measured
from depthscope.app.cli.paths import InputRun
from depthscope.app.cli.values import Names, Spans
from depthscope.app.text.terminal import Progress, emit, printable, say, show_rows
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr

    from depthscope.probes.interventions import Plan


# Later blocks of which a terminal shows a column each.
MOST_COLUMNS = 12


def _kinds() -> Iterable[str]:
    from depthscope.diagnostics.experiments import KINDS

    return [name.replace("_", "-") for name in KINDS]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument(
        "--do",
        type=Names("experiment", _kinds),
        default=["skip"],
        metavar="A,B",
        help="skip, skip-past, repeat, swap (blocks); identity, uniform, mean, sinkhorn (in place of H_res); "
        "drop-stream, freeze-stream, rescue, massive, patch, bypass, without-attention, merge-tokens, without-mean, "
        "one-direction, merge-streams (states); default skip",
    )
    for name, words in (
        ("blocks", "only these blocks, such as 3,5-7 (else each one)"),
        ("connections", "only these connections"),
        ("depths", "only these depths, 0 is the embedding"),
        ("stream", "only these streams"),
        ("tokens", "only these positions, of skip-past, streams and patch"),
    ):
        parser.add_argument(f"--{name}", type=Spans(), metavar="N,N-N", help=words)
    parser.add_argument("--together", action="store_true", help="all places at once, as one experiment")
    parser.add_argument(
        "--from",
        dest="source",
        type=InputRun(),
        metavar="RUN",
        help="for patch: the run that the states are taken from",
    )


def _run(args: argparse.Namespace) -> int:
    if ("patch" in args.do) != (args.source is not None):
        raise InputError("--do patch and --from RUN go together: the run is where the states come from")

    def measure(subject: Subject, options: dict[str, Any], progress: Progress) -> xr.Dataset:
        from depthscope.probes.interventions import ablate

        model, batch = subject.loaded.model, subject.batch
        return ablate(model, batch, _plans(args), token_text=subject.token_text, **options)

    _print(*measured(args, "ablate", "changing", measure), args)
    return FINE


def _plans(args: argparse.Namespace) -> list[Plan]:
    from depthscope.diagnostics import open_run
    from depthscope.probes.interventions import plan

    places = {name: getattr(args, name) for name in ("blocks", "connections", "depths", "tokens")}
    plans = []
    for name in args.do:
        source: Any = open_run(args.source) if name == "patch" else None
        plans.append(plan(name, **places, streams=args.stream, together=args.together, source=source))
    return plans


def _print(result: xr.Dataset, path: Path | None, args: argparse.Namespace) -> None:
    from depthscope.diagnostics.experiments import base_loss, mean_later_change, table_rows

    rows = table_rows(result)
    loss = base_loss(result)
    if args.json:
        emit(
            {
                "model": result.attrs["model"],
                "file": None if path is None else str(path),
                "sequences": result.sizes["sample"],
                "base_loss": loss._asdict(),
                "no_loss": result.attrs["no_loss"],
                "other_paths": result.attrs["other_paths"],
                "experiments": rows,
                "left_out": result.attrs["left_out"],
            }
        )
        return
    known = loss.sequences > 0
    unchanged = f"loss {loss.mean:.4g} nats" if known else f"no loss: {result.attrs['no_loss']}"
    say(f"{printable(result.attrs['model'])}, {result.sizes['sample']} sequences, unchanged: {unchanged}")
    say()
    show_rows(
        ("experiment", "loss change, nats (95 %)", "KL, nats", "output change", "later blocks", "rescued"),
        [
            (
                row["experiment"],
                _interval(row) if known else "-",
                _short(row["kl"]),
                _short(row["output_change"], "%"),
                _short(mean_later_change(row), "%"),
                _short(row["rescued"], "%"),
            )
            for row in rows
        ],
    )
    _show_later_blocks(rows)
    if result.attrs["other_paths"]:
        say(f"note: {printable(result.attrs['other_paths'])}")
    for line in result.attrs["left_out"]:
        say(f"left out: {printable(line)}")
    if path is not None:
        say()
        say(f"saved: {printable(path)}")


def _show_later_blocks(rows: list[dict[str, Any]]) -> None:
    """The matrix of changes by later block, where its columns fit into a terminal."""
    blocks = sorted({later["block"] for row in rows for later in row["later_blocks"]})
    if len(rows) < 2 or not blocks:
        return
    say()
    if len(blocks) > MOST_COLUMNS:
        say(f"the change of what each of {len(blocks)} later blocks adds is in --json and in the saved file")
        return
    say("change of what each later block adds, relative to what it added, by block:")
    found = [{later["block"]: later["change"] for later in row["later_blocks"]} for row in rows]
    show_rows(
        ("experiment", *map(str, blocks)),
        [
            (row["experiment"], *(_short(of_row.get(block), "%") for block in blocks))
            for row, of_row in zip(rows, found, strict=True)
        ],
    )


def _interval(row: dict[str, Any]) -> str:
    change, low, high = row["loss_change"], row["loss_change_low"], row["loss_change_high"]
    if change is None:
        return "-"
    return f"{change:+.3g}" + (f" ({low:+.3g} to {high:+.3g})" if low is not None else " (one sequence)")


def _short(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{100 * value:.3g} %" if unit == "%" else f"{value:.3g}"


COMMAND = Command(
    "ablate",
    "skip blocks, replace mixing, drop streams: the effect on the loss",
    _add_arguments,
    _run,
)
