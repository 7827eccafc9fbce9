"""`depthscope probe`: run a checkpoint on text and save what its streams carried."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from depthscope.app.cli.arguments import add_json, positive_integer, require_run_name
from depthscope.app.cli.checkpoints import add_checkpoint, capture_errors_for_users, load, site_names
from depthscope.app.cli.command import FINE, Command
from depthscope.app.text.terminal import emit, say, working

if TYPE_CHECKING:
    import xarray as xr

SIZES = {
    "depth": "depths",
    "sample": "sequences",
    "token": "tokens",
    "stream": "streams",
    "feature": "features",
}
"""Dimensions of a trace whose sizes are printed, and their names in the output."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to run, - for stdin")
    parser.add_argument("--out", required=True, metavar="RUN", help="where to save (.nc, .zarr or .zarr.zip)")
    parser.add_argument(
        "--sequences", type=positive_integer, default=8, metavar="N", help="sequences kept (default 8)"
    )
    parser.add_argument(
        "--length", type=positive_integer, default=256, metavar="T", help="tokens a sequence (default 256)"
    )
    parser.add_argument(
        "--gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the gradient of the loss",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.diagnostics import schema

    # Both are checked before torch is imported and the model is loaded, which takes far longer than this.
    require_run_name(args.out, suffixes=schema.SUFFIXES)
    text = _read_text(args.text)
    loaded = load(args)
    # After `load`, which prints that torch is being imported while it is.
    from depthscope import probes
    from depthscope.probes.checkpoints.text_batch import encode_text, token_texts

    batch = encode_text(loaded, text, sequences=args.sequences, length=args.length, seed=args.seed)
    with working(f"probing {loaded.name}"), capture_errors_for_users():
        run = probes.capture(
            loaded.model,
            batch,
            gradients=args.gradients,
            layers=args.layers,
            layout=args.layout,
            streams=args.streams,
            sites=site_names(args),
            max_sequences=args.sequences,
            seed=args.seed,
            token_text=token_texts(loaded, batch),
            attrs={
                "model": loaded.name,
                "weights_digest": loaded.digest,
                # The name alone: a run is sent around, and a full path tells who its author is.
                "data": "stdin" if args.text == "-" else Path(args.text).name,
                "data_digest": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
            },
        )
    _print_saved(run, schema.save_run(run, args.out), args)
    return FINE


def _read_text(source: str) -> str:
    """The text of a file, or of stdin for ``-``."""
    # A pipe or a device that nothing writes to would be waited for without end; stdin is the user's to end.
    if source != "-" and Path(source).exists() and not Path(source).is_file():
        raise ValueError(f"{source} is no regular file; expected one with text, or - for stdin")
    raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        # No guess at another encoding: wrong characters would be other tokens, without an error.
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{source} contains no text; expected a few thousand words of UTF-8")
    return text


def _print_saved(run: xr.DataTree, path: Path, args: argparse.Namespace) -> None:
    from depthscope.diagnostics import schema

    sizes: dict[str, dict[str, int]] = {}
    for chain in schema.chains(run):
        trace = schema.chain_dataset(run, "trace", chain)
        # A run may have statistics alone.
        known = {} if trace is None else trace.sizes
        sizes[chain or "run"] = {word: known[dim] for dim, word in SIZES.items() if dim in known}
    if args.json:
        emit({"run": str(path), "attrs": dict(run.attrs), "sizes": sizes})
        return
    say(f"{path}: {run.attrs.get('model')}, {run.attrs.get('family')}")
    for chain, size in sizes.items():
        counts = " · ".join(f"{word} {count}" for word, count in size.items())
        say(f"  {counts}" if chain == "run" else f"  {chain}: {counts}")
    say()
    say(f"Next: depthscope check {path}")
    say(f"      depthscope dashboard {path}")


COMMAND = Command("probe", "run a checkpoint on text and save what its streams carried", _add_arguments, _run)
