"""`depthscope describe`: the family, blocks, streams, layout and sites that are found in a checkpoint."""

from __future__ import annotations

import argparse

from depthscope.app.cli.arguments import add_json
from depthscope.app.cli.checkpoints import add_checkpoint, capture_errors_for_users, load, read_as, site_names
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.paths import InputPath
from depthscope.app.text.terminal import emit, say, show_rows, working
from depthscope.diagnostics.errors import InputError

# One small forward: it finds the structure and proves the connections, and measures nothing.
SEQUENCES, LENGTH = 2, 32


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="read the connections from the safetensors or GGUF (folder or file) and build no model",
    )
    parser.add_argument(
        "--dialect",
        type=InputPath(),
        metavar="FILE",
        help="with --weights-only: your own rows of how tensors are named and used (TOML, docs/dialects.md)",
    )
    parser.add_argument(
        "--as",
        dest="as_dialect",
        metavar="NAME",
        help="with --weights-only: the dialect or model type to read the checkpoint as, where its own type is not known",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if args.weights_only:
        return _describe_weights(args)
    _refuse_options_of_weight_files(args)
    loaded = load(args)
    from depthscope import probes
    from depthscope.probes.checkpoints.text_batch import encode_text, sample_text

    batch = encode_text(loaded, sample_text(), seed=args.seed, sequences=SEQUENCES, length=LENGTH)
    with capture_errors_for_users():
        found = probes.describe(loaded.model, batch, sites=site_names(args), **read_as(args))
    if args.json:
        emit({"checkpoint": args.checkpoint, "name": loaded.name, "digest": loaded.digest, **found.as_dict()})
    else:
        say(str(found))
    return FINE


def _refuse_options_of_weight_files(args: argparse.Namespace) -> None:
    given = [
        name for name, value in (("dialect", args.dialect), ("as", args.as_dialect)) if value is not None
    ]
    if given:
        raise InputError(f"--{given[0]} says how weight files are read; add --weights-only, or leave it out")


def _describe_weights(args: argparse.Namespace) -> int:
    # --seed and --device have defaults, so that it cannot be known whether they were given.
    options = ("weights", "layers", "layout", "streams", "sites", "dtype")
    given = [name for name in options if getattr(args, name) is not None]
    if given:
        raise InputError(
            f"--{', --'.join(given)} and --weights-only do not go together: no model is built or run; leave one out"
        )
    with working("importing torch"):
        from depthscope.probes.static import page
        from depthscope.probes.static.describe import describe_weights
    found = describe_weights(args.checkpoint, dialect_file=args.dialect, as_dialect=args.as_dialect)
    if args.json:
        emit(found.as_dict())
        return FINE
    say(page.heading(found))
    if found.connections:
        for columns, rows in page.tables(found):
            say()
            show_rows(columns, rows)
        say()
        say(page.ending(found))
    return FINE


COMMAND = Command("describe", "describe a checkpoint: family, blocks, streams", _add_arguments, _run)
