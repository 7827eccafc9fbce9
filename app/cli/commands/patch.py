"""`depthscope patch`: put states and mixing of a clean text into the forward of a corrupted one, and see what comes back."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import add_json
from depthscope.app.cli.checkpoints import add_checkpoint, capture_errors_for_users, load, read_as, site_names
from depthscope.app.cli.command import FINE, Command
from depthscope.app.cli.model_and_text import RESULT_FILE, read_text
from depthscope.app.cli.paths import InputText, OutputFile
from depthscope.app.cli.values import Spans
from depthscope.app.text.terminal import emit, printable, say, show_rows, working
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from depthscope.probes.checkpoints.load import LoadedModel

MOST_ROWS = 15
"""Cells that a terminal shows; all are in the file, in ``--json`` and in the figure."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--clean", action="append", metavar="TEXT", help="the clean text; may be given several times"
    )
    parser.add_argument(
        "--corrupted", action="append", metavar="TEXT", help="the corrupted one, with as many tokens"
    )
    parser.add_argument(
        "--answer",
        metavar="TEXT",
        help="the right next token, such as ' Paris'; the measure is then its −log p",
    )
    parser.add_argument(
        "--against", metavar="TEXT", help="a wrong one; the measure is then the difference of their logits"
    )
    parser.add_argument(
        "--pairs",
        type=InputText(),
        metavar="FILE",
        help="clean, corrupted, answer and against of many pairs, a line each, with tabs between; the last two may be missing",
    )
    for name, words in (
        ("depths", "only these depths, 0 is the embedding; a connection is at the depth where it ends"),
        ("tokens", "only these positions"),
        ("stream", "only these streams, next to all at once"),
    ):
        parser.add_argument(f"--{name}", type=Spans(), metavar="N,N-N", help=words)
    parser.add_argument("--out", type=RESULT_FILE, metavar="FILE", help="where to save (.zip)")
    parser.add_argument(
        "--figure",
        type=OutputFile("figure", lambda: (".pdf", ".svg", ".png"), "patch.svg"),
        metavar="FILE",
        help="draw the first site by depth and token",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the files of --out and --figure where they exist"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    pairs, answers = _pairs(args)
    loaded = load(args)
    from depthscope.diagnostics.experiments import save_result
    from depthscope.probes.checkpoints.text_batch import encode_pairs, single_token, token_argument
    from depthscope.probes.interventions import patch

    order, batches = encode_pairs(loaded, pairs)
    ids = token_argument(loaded)
    columns = [
        None if texts is None else [single_token(loaded, texts[number]) for number in order]
        for texts in answers
    ]
    with working(f"patching {loaded.name}") as progress, capture_errors_for_users():
        result = patch(
            loaded.model,
            [{ids: clean} for clean, _ in batches],
            [{ids: corrupted} for _, corrupted in batches],
            sites=site_names(args) or "residual",
            depths=args.depths,
            tokens=args.tokens,
            stream=args.stream,
            answer=columns[0],
            against=columns[1],
            token_text=_token_texts(loaded, batches),
            progress=progress,
            **read_as(args),
        )
    result.attrs.update(loaded.attrs)
    files = [] if args.out is None else [save_result(result, args.out)]
    if args.figure is not None:
        files.append(_draw(result, Path(args.figure)))
    _print(result, files, args)
    return FINE


def _pairs(args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[list[str] | None]]:
    """The texts of each pair, and the answers of all, right and wrong."""
    given = args.clean or args.corrupted or args.answer or args.against
    if (args.pairs is None) == (not given):
        raise InputError(
            "the texts come from --clean and --corrupted, or from --pairs FILE; give one of the two"
        )
    if args.pairs is not None:
        return _read_pairs(args.pairs)
    clean, corrupted = args.clean or [], args.corrupted or []
    if not clean or len(clean) != len(corrupted):
        raise InputError(
            f"{len(clean)} texts of --clean and {len(corrupted)} of --corrupted; expected as many, at least one"
        )
    answers = [None if text is None else [text] * len(clean) for text in (args.answer, args.against)]
    return list(zip(clean, corrupted, strict=True)), answers


def _read_pairs(path: str) -> tuple[list[tuple[str, str]], list[list[str] | None]]:
    rows = [
        row for row in csv.reader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE) if row
    ]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or not widths <= {2, 3, 4}:
        counts = ", ".join(map(str, sorted(widths)))
        raise InputError(
            f"{path} has lines of {counts} fields; expected clean, corrupted and perhaps two answers, with tabs between"
        )
    columns = [list(column) for column in zip(*rows, strict=True)]
    answers: list[list[str] | None] = [*columns[2:], *[None] * (4 - len(columns))]
    return list(zip(columns[0], columns[1], strict=True)), answers


def _token_texts(loaded: LoadedModel, batches: Sequence[tuple[Any, Any]]) -> list[list[str]]:
    """The text of each token, both where the two differ."""
    from depthscope.probes.checkpoints.text_batch import token_texts

    rows = []
    for pair in batches:
        clean, corrupted = (token_texts(loaded, {"ids": ids}) for ids in pair)
        rows += [
            [
                one if one == other else f"{one.strip()} → {other.strip()}"
                for one, other in zip(*row, strict=True)
            ]
            for row in zip(clean.tolist(), corrupted.tolist(), strict=True)
        ]
    return rows


def _draw(result: xr.Dataset, path: Path) -> Path:
    from depthscope.app.drawing.matplotlib import write_figure
    from depthscope.app.figures.build.patching_map import patching_map

    write_figure(patching_map(result), path)
    return path


def _print(result: xr.Dataset, files: Sequence[Path], args: argparse.Namespace) -> None:
    from depthscope.diagnostics.experiments import patch_rows

    rows, attrs = patch_rows(result), result.attrs
    if args.json:
        known = (
            "model",
            "measure",
            "measured",
            "difference",
            "no_effect",
            "no_loss",
            "other_paths",
            "left_out",
        )
        facts = {name: attrs[name] for name in known}
        emit(
            {
                **facts,
                "files": [str(path) for path in files],
                "sequences": result.sizes["sample"],
                "cells": rows,
            }
        )
        return
    clean, corrupted = (float(result[name].mean()) for name in ("clean", "corrupted"))
    count = result.sizes["sample"]
    say(
        f"{printable(attrs['model'])}, {count} pair{'s' * (count != 1)}; {attrs['measured']}: {clean:.4g} clean, "
        f"{corrupted:.4g} corrupted"
    )
    say()
    show_rows(
        ("site", "depth", "block", "token", "text", "stream", "effect (95 %)", "change (95 %)"),
        [
            (
                row["site"],
                str(row["depth"]),
                "-" if row["block"] is None else str(row["block"]),
                "all" if row["token"] is None else str(row["token"]),
                str(row.get("token_text", "")),
                "all" if row["stream"] is None else str(row["stream"]),
                _interval(row, "effect"),
                _interval(row, "change"),
            )
            for row in rows[:MOST_ROWS]
        ],
    )
    if len(rows) > MOST_ROWS:
        say(f"and {len(rows) - MOST_ROWS} smaller changes: see --figure, --out and --json")
    for name, words in (("no_effect", "no effect is defined"), ("other_paths", "note")):
        if attrs[name]:
            say(f"{words}: {printable(attrs[name])}")
    for line in attrs["left_out"]:
        say(f"left out: {printable(line)}")
    for path in files:
        say(f"saved: {printable(path)}")


def _interval(row: dict[str, Any], name: str) -> str:
    value, low, high = (row[name + ending] for ending in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:+.3g}" + ("" if low is None else f" ({low:+.3g} to {high:+.3g})")


COMMAND = Command(
    "patch",
    "activation patching: states and mixing of a clean text in the forward of a corrupted one",
    _add_arguments,
    _run,
)
