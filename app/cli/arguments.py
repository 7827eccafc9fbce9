"""Which arguments do several commands share? Each is declared here once, with its type."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from depthscope.app.cli.paths import InputRun, OutputFile, OutputFolder, run_endings
from depthscope.app.cli.values import ByteCount, Names, Number, OneOf

if TYPE_CHECKING:
    from depthscope.app.figures import Selection

RUN_FILE = OutputFile("run", run_endings)
"""A run that is written."""


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Run files and folders of runs as ``args.runs``; `open_runs` opens them."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=InputRun(folders=True), help="run file, or a folder of runs"
    )
    add_max_bytes(parser)


def add_max_bytes(parser: argparse.ArgumentParser) -> None:
    """``--max-bytes``: how much memory the arrays of one run may take, as ``args.max_bytes``."""
    parser.add_argument(
        "--max-bytes",
        type=ByteCount(),
        metavar="BYTES",
        help="refuse a run that unpacks to more, such as 500MB or 2GiB (default: a limit by the size of its file)",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """``--layers``: where the blocks are, as ``args.layers``."""
    parser.add_argument(
        "--layers", metavar="PATH", help="module path of the blocks, such as model.layers (default: detected)"
    )


def add_out(
    parser: argparse.ArgumentParser, kind: OutputFile, *, metavar: str, about: str, required: bool = True
) -> None:
    """``--out`` for one file as ``args.out``, and ``--force``: an existing file is replaced with it alone."""
    parser.add_argument("--out", type=kind, required=required, metavar=metavar, help=about)
    parser.add_argument("--force", action="store_true", help="replace the file of --out where it exists")


def add_out_folder(parser: argparse.ArgumentParser, *, about: str, default: str | None = None) -> None:
    """``--out`` for a folder as ``args.out``."""
    parser.add_argument(
        "--out", type=OutputFolder(), required=default is None, default=default, metavar="DIR", help=about
    )


# More would train for days; nobody needs as many to see how much chance does.
MOST_SEEDS = 100


def add_seeds(parser: argparse.ArgumentParser, *, about: str, default: int | None = 1) -> None:
    """``--seeds`` as ``args.seeds``: how many; `about` names the default where it is None."""
    parser.add_argument(
        "--seeds",
        type=Number(1, MOST_SEEDS),
        default=default,
        metavar="N",
        help=f"train from seeds 0 to N-1, {about}" + ("" if default is None else f" (default {default})"),
    )


def add_metrics(parser: argparse.ArgumentParser, *, about: str) -> None:
    """``--metrics`` as ``args.metrics``: a list of names in the catalogue, or None."""

    def names() -> Iterable[str]:
        from depthscope.diagnostics import CATALOGUE

        return CATALOGUE

    parser.add_argument("--metrics", type=Names("metric", names), metavar="A,B", help=about)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: the command prints one JSON document on stdout and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def add_browser(parser: argparse.ArgumentParser) -> None:
    """``--no-browser`` as ``args.browser``, true by default."""
    # The positive name: `if args.browser` reads better than a double negative.
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="print the address only")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which version of each number is shown; `selection_of` reads them."""

    def labels_of(name: str) -> Sequence[str]:
        from depthscope.app.figures import CHOICES

        return CHOICES[name]

    group = parser.add_argument_group("which version of the numbers")
    # No `choices=`: the labels are declared with the figures, and that import costs xarray.
    for name, labels, words in (
        ("scope", "sequence|data", "within each sequence, or all tokens pooled"),
        ("tokens", "all|ordinary", "ordinary: without tokens that have massive activations"),
        ("centering", "raw|centred", "centred: the mean over tokens is subtracted"),
        ("reduction", "mean|median|p1|p99|max", "over tokens, for mixing metrics"),
    ):
        group.add_argument(f"--{name}", type=OneOf(partial(labels_of, name)), metavar=labels, help=words)


def selection_of(args: argparse.Namespace) -> Selection:
    """The slice that `add_selection`'s arguments ask for, with the figures' defaults for those not given."""
    from depthscope.app.figures import Selection

    # Options that were not given are left out, so that the defaults are declared in `Selection` alone.
    given = {name: getattr(args, name) for name in ("scope", "tokens", "centering", "reduction")}
    return Selection.of({name: label for name, label in given.items() if label is not None})
