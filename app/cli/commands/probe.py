"""`depthscope probe`: run a checkpoint on text, save what its streams carried, and judge it."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import add_json, add_out
from depthscope.app.cli.checkpoint_history import PROBED_RUN, is_history, probe_history
from depthscope.app.cli.checkpoints import add_checkpoint, capture_errors_for_users, load, read_as, site_names
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.model_and_text import read_text, text_name
from depthscope.app.cli.paths import InputText
from depthscope.app.cli.values import Number, Part
from depthscope.app.text.terminal import (
    columns,
    command_line,
    emit,
    encodable,
    printable,
    remark,
    say,
    working,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr

    from depthscope.app.readings.readings import Reading

SIZES = {
    "depth": "depths",
    "sample": "sequences",
    "token": "tokens",
    "stream": "streams",
    "feature": "features",
}
"""Dimensions of a trace whose sizes are printed, and their names in the output."""


SHARD_BATCH = 8
"""Sequences a forward of a shard: a loss is a mean over its batch, so that equal gradients need equal batches."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, several=True)
    parser.add_argument(
        "--factory",
        metavar="MODULE:FUNCTION",
        help="builds the model of several checkpoints that are files of weights (imports and runs that code)",
    )
    _add_text(parser)
    add_out(
        parser,
        PROBED_RUN,
        metavar="RUN",
        about="where to save (.zarr or .zarr.zip; default the checkpoint's name and .zarr, in this folder)",
        required=False,
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="also compute spectra and the similarity of depths over every token (metrics streamed_…)",
    )
    parser.add_argument(
        "--shard",
        type=Part(),
        metavar="k/N",
        help="run only the k-th of N parts of the sequences; `depthscope merge` joins the runs of all parts",
    )
    parser.add_argument(
        "--gradients",
        action=argparse.BooleanOptionalAction,
        help="also record the gradient of the loss (default: where the model takes labels)",
    )
    parser.add_argument(
        "--settle",
        type=Number(0, 1000),
        default=10,
        metavar="N",
        help="at most N forwards for experiments that test whether a suspected problem does harm (default 10)",
    )
    parser.add_argument(
        "--verdict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="analyse the run at once and print its findings, as `depthscope check` does",
    )
    add_json(parser)


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=InputText(),
        metavar="FILE",
        help="UTF-8 text to run, at most 100 MB; - for stdin (default: English that comes with Python)",
    )
    for name, least, highest, default, metavar, about in (
        ("sequences", 1, 100_000, 8, "N", "sequences run (default 8)"),
        # The longest context that models of today are trained for, with room.
        ("length", 2, 2**20, 256, "T", "tokens per sequence (default 256)"),
        (
            "batch",
            1,
            100_000,
            None,
            "B",
            f"sequences per forward (default all in one; with --shard {SHARD_BATCH})",
        ),
        (
            "keep",
            1,
            100_000,
            None,
            "K",
            "number of sequences whose states are stored, drawn by --seed (default: all); statistics are over every token",
        ),
    ):
        parser.add_argument(
            f"--{name}", type=Number(least, highest), default=default, metavar=metavar, help=about
        )


def _run(args: argparse.Namespace) -> int:
    args.checkpoint = args.checkpoints[0]
    if args.out is None:
        # Of several checkpoints the name of the folder that they are in.
        several = len(args.checkpoints) > 1
        args.out = _default_name(str(Path(args.checkpoint).resolve().parent) if several else args.checkpoint)
        PROBED_RUN.check(args.out, "the default of --out", args)
    if is_history(args):
        return probe_history(args)
    from depthscope.diagnostics import schema

    # Before torch is imported and the model is loaded, which takes far longer than this.
    schema.require_replaceable(args.out, force=args.force)
    text = read_text(args.text)
    loaded = load(args)
    # After `load`, which prints that torch is being imported while it is.
    from depthscope import probes
    from depthscope.probes.checkpoints.text_batch import encode_text, token_texts

    batch = encode_text(loaded, text, sequences=args.sequences, length=args.length, seed=args.seed)
    gradients = "labels" in batch if args.gradients is None else args.gradients
    if args.gradients is None and not gradients:
        remark(f"no gradients: {printable(loaded.name)} takes no labels, so that there is no loss")
    forwards, of_shard = _forwards(batch, args)
    with working(f"probing {loaded.name}"), capture_errors_for_users():
        run = probes.capture(
            loaded.model,
            forwards,
            gradients=gradients,
            **read_as(args),
            sites=site_names(args),
            max_sequences=args.keep or args.sequences,
            seed=args.seed,
            streaming=args.streaming,
            first_sequence=of_shard.get("first_sequence", 0),
            settle=args.settle,
            token_text=token_texts(loaded, batch),
            attrs={
                **loaded.attrs,
                "checkpoint": 1,
                "data": text_name(args.text),
                "data_digest": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
                **of_shard.get("attrs", {}),
            },
        )
    path = schema.save_run(run, args.out, force=args.force)
    # What comes next needs neither, and a model is as large as its run.
    del loaded, batch, forwards
    _print_saved(run, path, _judged(path) if args.verdict else [], args)
    return FINE


def _forwards(batch: dict[str, Any], args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The batches to run, one per forward; and of a shard the number of its first sequence and the run's attributes."""
    if args.batch is None and args.shard is None:
        return batch, {}
    from depthscope.probes.checkpoints.text_batch import batches_of, shard_span, token_ids
    from depthscope.probes.run.shards import SHARD

    size = args.batch or SHARD_BATCH
    forwards = batches_of(batch, size)
    if args.shard is None:
        return forwards, {}
    first, end = shard_span(len(forwards), *args.shard)
    number, of = args.shard
    facts = {
        "number": number,
        "of": of,
        "sequences": len(token_ids(batch)),
        "batch": size,
        "length": args.length,
    }
    return forwards[first:end], {"first_sequence": first * size, "attrs": {SHARD: facts}}


def _default_name(checkpoint: str) -> str:
    """A name for the run in the working folder: that of the checkpoint, of a factory that of its module and function."""
    name = Path(checkpoint).resolve().name.removesuffix(".gguf").replace(":", "-").replace("@", "-")
    return f"{name or 'run'}.zarr"


def _judged(path: Path) -> list[Reading]:
    """The saved run, one reading for each of its chains; none where it cannot be judged, since the run is there."""
    from depthscope.app.readings.readings import read_paths

    try:
        with working("analysing and judging") as progress:
            return read_paths([str(path)], progress=progress)[0]
    except ValueError as error:
        remark(f"{path} is saved, and not judged: {error}")
        return []


def _print_saved(run: xr.DataTree, path: Path, readings: Sequence[Reading], args: argparse.Namespace) -> None:
    from depthscope.app.tables.findings import NOTHING, cards_of, count_words
    from depthscope.app.text.cards import cards_text
    from depthscope.diagnostics import schema

    sizes: dict[str, dict[str, int]] = {}
    for chain in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", chain)
        # A run may have statistics alone.
        known = {} if trace is None else trace.sizes
        sizes[chain or "run"] = {word: known[dim] for dim, word in SIZES.items() if dim in known}
    if args.json:
        cards = [card.as_dict() for reading in readings for card in cards_of(reading)]
        judged = {"findings": cards} if args.verdict else {}
        emit({"run": str(path), "attrs": dict(run.attrs), "sizes": sizes, **judged})
        return
    say(f"{printable(path)}: {printable(run.attrs.get('model'))}, {printable(run.attrs.get('family'))}")
    for chain, size in sizes.items():
        counts = " · ".join(f"{word} {count}" for word, count in size.items())
        say(f"  {counts}" if chain == "run" else f"  {chain}: {counts}")
    if str(run.attrs.get("proof", "")).startswith(schema.UNPROVEN):
        say(f"  {printable(run.attrs['proof'])}")
    for part in run.attrs.get("not_covered", ()):
        say(f"  not covered: {printable(part['sentence'])}")
    for odd in run.attrs.get("remarks", ()):
        say(f"  remark: {odd['sentence']}")
    for reading in readings:
        say()
        say(f"{printable(reading.name)}: {count_words(reading.findings)}")
        say()
        say(cards_text(cards_of(reading), width=columns(), shown=encodable) or NOTHING)
    say()
    say(f"Next: {command_line('check', path)}")
    say(f"      {command_line('dashboard', path)}")


COMMAND = Command(
    "probe", "run a checkpoint on text, save what its streams carried, and judge it", _add_arguments, _run
)
