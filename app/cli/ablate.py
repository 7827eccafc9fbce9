"""`depthscope ablate`: change the forward of a model at one place after another, and measure what that does."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import (
    Force,
    Json,
    ModelAndText,
    capture_errors_for_users,
    names,
    option,
    spans,
    text_digest,
    with_model,
)
from depthscope.app.text.terminal import emit, printable, say, show_rows, working
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from depthscope.probes.checkpoints.load import LoadedModel

MOST_ROWS = 15
"""Cells of patching that a terminal shows; all are in the file and in ``--json``."""

FACTS = ("model", "measure", "measured", "difference", "no_effect", "no_loss", "other_paths", "left_out")
"""Attributes of a result that ``--json`` prints."""


def _places(about: str) -> Any:
    return option("N,N-N", f"Only these {about} (default: each one).")


@with_model(length=128)
def ablate(
    model: ModelAndText,
    do: Annotated[
        str,
        option("A,B", "skip (blocks); identity, uniform (in place of H_res); drop-stream, bypass (states)."),
    ] = "skip",
    blocks: Annotated[str | None, _places("blocks")] = None,
    connections: Annotated[str | None, _places("connections")] = None,
    depths: Annotated[str | None, _places("depths; 0 is the embedding")] = None,
    stream: Annotated[str | None, _places("streams")] = None,
    tokens: Annotated[str | None, _places("positions, of patching")] = None,
    patch: Annotated[
        Path | None,
        option(
            "FILE",
            "Activation patching instead: a file of lines with a clean text, a corrupted one and perhaps the right and a "
            "wrong next token, tabs between; states of the clean text are put into the forward of the corrupted one.",
        ),
    ] = None,
    run: Annotated[
        Path | None, option("RUN", "A run of this checkpoint and text: the result is saved next to it.")
    ] = None,
    out: Annotated[Path | None, option("FILE", "Where to save the result (.zarr).")] = None,
    force: Force = False,
    json: Json = False,
) -> int:
    """Measure what each block, stream or state is worth.

    Blocks are skipped, mixing is replaced, streams are dropped or states are patched, and the change of the loss is measured.
    """
    from depthscope.diagnostics.experiments import result_path, save_result

    # What is there is refused before any work.
    place = out or (None if run is None else result_path(run, "ablate"))
    if place is not None and place.exists() and not force:
        raise InputError(f"{place} exists; name another file with --out, or add --force to replace it")
    given = {
        "blocks": blocks,
        "connections": connections,
        "depths": depths,
        "streams": stream,
        "tokens": tokens,
    }
    where = {name: None if text is None else spans(text) for name, text in given.items()}
    text = model.read_text()
    loaded = model.load()
    if run is not None:
        _require_same(run, loaded, text)
    kinds = names(do) or []
    result = (
        _ablated(model, loaded, text, kinds, where)
        if patch is None
        else _patched(model, loaded, patch, where)
    )
    result.attrs.update(loaded.attrs)
    if place is not None:
        save_result(result, place)
    _print(result, place, is_patch=patch is not None, json=json)
    return FINE


def _require_same(run: Path, loaded: LoadedModel, text: str) -> None:
    """Refuse a result that would lie next to a run of other weights or another text."""
    from depthscope.diagnostics import open_run

    attrs = open_run(run).attrs
    if attrs.get("weights_digest") not in (None, loaded.digest):
        raise InputError(f"{run} was made of other weights than this checkpoint's; name its own checkpoint")
    # Of a run that was captured in Python it is a digest of token ids, which a text cannot be compared with.
    known = str(attrs.get("data_digest", ""))
    if known.startswith("sha256:") and known != text_digest(text):
        raise InputError(
            f"{run} was made of another text ({printable(attrs.get('data', 'unnamed'))}); give it with --text"
        )


def _ablated(
    model: ModelAndText, loaded: LoadedModel, text: str, kinds: list[str], where: dict[str, Any]
) -> xr.Dataset:
    from depthscope.probes.checkpoints.text_batch import token_texts
    from depthscope.probes.interventions import ablate as run_experiments
    from depthscope.probes.interventions import plan

    places = {name: of for name, of in where.items() if name != "tokens"}
    plans = [plan(kind, **places) for kind in kinds]
    batch = model.batch(loaded, text)
    with working(f"changing {loaded.name}"), capture_errors_for_users():
        texts = token_texts(loaded, batch)
        return run_experiments(loaded.model, batch, plans, token_text=texts, **model.read_as)


def _patched(model: ModelAndText, loaded: LoadedModel, file: Path, where: dict[str, Any]) -> xr.Dataset:
    from depthscope.probes.checkpoints.text_batch import (
        encode_pairs,
        single_token,
        token_argument,
        token_texts,
    )
    from depthscope.probes.interventions import patch

    rows = _read_pairs(file)
    order, batches = encode_pairs(loaded, [(row[0], row[1]) for row in rows])
    answers = [
        [single_token(loaded, rows[number][column]) for number in order] if len(rows[0]) > column else None
        for column in (2, 3)
    ]
    shown = []
    for pair in batches:
        clean, corrupted = (token_texts(loaded, {"ids": ids}).tolist() for ids in pair)
        shown += [
            [a if a == b else f"{a.strip()} → {b.strip()}" for a, b in zip(*both, strict=True)]
            for both in zip(clean, corrupted, strict=True)
        ]
    ids = token_argument(loaded)
    with working(f"patching {loaded.name}") as progress, capture_errors_for_users():
        return patch(
            loaded.model,
            [{ids: clean} for clean, _ in batches],
            [{ids: corrupted} for _, corrupted in batches],
            depths=where["depths"],
            tokens=where["tokens"],
            stream=where["streams"],
            answer=answers[0],
            against=answers[1],
            token_text=shown,
            progress=progress,
            **model.read_as,
        )


def _read_pairs(file: Path) -> list[list[str]]:
    text = file.read_text(encoding="utf-8")
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or not widths <= {2, 3, 4}:
        counts = ", ".join(map(str, sorted(widths))) or "no"
        raise InputError(
            f"{file} has lines of {counts} fields; expected clean, corrupted and perhaps two answers, with tabs between"
        )
    return rows


def _print(result: xr.Dataset, place: Path | None, *, is_patch: bool, json: bool) -> None:
    from depthscope.diagnostics.experiments import base_loss, patch_rows, table_rows

    attrs = result.attrs
    if json:
        facts = {name: attrs[name] for name in FACTS if name in attrs}
        found = (
            {"cells": patch_rows(result)}
            if is_patch
            else {"base_loss": base_loss(result)._asdict(), "experiments": table_rows(result)}
        )
        file = None if place is None else str(place)
        emit({**facts, "file": file, "sequences": result.sizes["sample"], **found})
        return
    (_print_patching if is_patch else _print_experiments)(result)
    for name, words in (("no_effect", "no effect is defined"), ("other_paths", "note")):
        if attrs.get(name):
            say(f"{words}: {printable(attrs[name])}")
    for line in attrs["left_out"]:
        say(f"left out: {printable(line)}")
    if place is not None:
        say(f"saved: {printable(place)}")


def _print_experiments(result: xr.Dataset) -> None:
    from depthscope.diagnostics.experiments import base_loss, table_rows

    loss = base_loss(result)
    known = loss.sequences > 0
    unchanged = f"loss {loss.mean:.4g} nats" if known else f"no loss: {result.attrs['no_loss']}"
    say(f"{printable(result.attrs['model'])}, {result.sizes['sample']} sequences, unchanged: {unchanged}")
    say()
    show_rows(
        ("experiment", "loss change, nats (95 %)", "KL, nats", "output change"),
        [
            (
                row["experiment"],
                _interval(row, "loss_change") if known else "-",
                "-" if row["kl"] is None else f"{row['kl']:.3g}",
                "-" if row["output_change"] is None else f"{100 * row['output_change']:.3g} %",
            )
            for row in table_rows(result)
        ],
    )


def _print_patching(result: xr.Dataset) -> None:
    from depthscope.diagnostics.experiments import patch_rows

    rows = patch_rows(result)
    clean, corrupted = (float(result[name].mean()) for name in ("clean", "corrupted"))
    say(
        f"{printable(result.attrs['model'])}, pairs: {result.sizes['sample']}; {result.attrs['measured']}: {clean:.4g} clean, "
        f"{corrupted:.4g} corrupted"
    )
    say()
    show_rows(
        ("depth", "block", "token", "text", "stream", "effect (95 %)", "change (95 %)"),
        [
            (
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
        say(f"and {len(rows) - MOST_ROWS} smaller changes: see --out and --json")


def _interval(row: dict[str, Any], name: str) -> str:
    value, low, high = (row[name + ending] for ending in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:+.3g}" + ("" if low is None else f" ({low:+.3g} to {high:+.3g})")
