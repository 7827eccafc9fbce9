"""How is the result of an experiment saved and described? One file next to the run, and one line a change."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.errors import AbsentError, InputError
from depthscope.diagnostics.experiments.intervals import Estimate, estimate
from depthscope.diagnostics.experiments.kinds import SETTLED_BY
from depthscope.diagnostics.experiments.variables import CELLS, ESTIMATES
from depthscope.diagnostics.numbers import number, percent
from depthscope.diagnostics.schema import open_tree, without_suffix, write_zip
from depthscope.diagnostics.schema.attributes import encode_dataset

# A zipped Zarr as of a run, but not `.zarr.zip`: a folder of runs is listed by the endings of runs, and this is none.
SUFFIX = ".zip"
EXPERIMENTS = "depthscope experiments"
RESULTS = ("ablate", "lens")
"""The commands whose results are saved next to a run."""

MADE_BY = "`depthscope ablate`, or of `ds.lens`"
COLUMNS = ("loss_change", "kl", "output_change")


def result_path(run: str | os.PathLike[str], what: str) -> Path:
    """Where the result of an experiment on a run is saved: ``a.zarr`` and ``ablate`` give ``a.ablate.zip``."""
    path = Path(run)
    return path.with_name(f"{without_suffix(path.name)}.{what}{SUFFIX}")


def results_beside(
    run: str | os.PathLike[str], weights_digest: str | None, data_digest: str | None = None
) -> dict[str, xr.Dataset]:
    """What the experiments, the lens and the Jacobians of a run gave, as far as their results are next to it.

    ``weights_digest``: of the run: results of other weights are left out.
    ``data_digest``: of the run's text: results of another text are left out, where they name theirs.
    Returns: By a name of `RESULTS`; without what is missing, or is of somebody else.
    """
    results = {}
    digests = {"weights_digest": weights_digest, "data_digest": data_digest}
    for what in RESULTS:
        with suppress(OSError, ValueError):
            found = open_result(result_path(run, what))
            if all(len({of_run, found.attrs.get(name)} - {None}) < 2 for name, of_run in digests.items()):
                results[what] = found
    return results


def save_result(result: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a result of `ablate`, `patch` or `lens` to one file (a zipped Zarr), which takes an earlier one's place."""
    plain = result.assign_attrs({**result.attrs, "kind_of_file": EXPERIMENTS})
    with replaced_file(path) as fresh:
        write_zip(xr.DataTree(encode_dataset(plain)), fresh)
    return Path(path)


def open_result(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read a result into memory.

    ``path``: a file of `save_result`.
    Raises InputError: For a file that is no such result, or not as it was saved.
    Raises AbsentError: Where there is none.
    """
    file = Path(path)
    if not file.exists():
        raise AbsentError(f"no result of experiments at {file}; make one with {MADE_BY}")
    with open_tree(file) as opened:
        found = opened.to_dataset().load()
    if found.attrs.get("kind_of_file") != EXPERIMENTS:
        raise InputError(f"{file} is not a result of experiments; expected one of {MADE_BY}")
    return found


def table_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """One row an experiment, with plain values: None for what is not known."""
    rows = []
    for position, name in enumerate(result["experiment"].values):
        row: dict[str, Any] = {"experiment": str(name)}
        for column in ("kind", "block", "depth", "connection", "stream"):
            value = result[column].values[position]
            row[column] = str(value) if column == "kind" else None if value < 0 else int(value)
        rows.append(row | _estimates(result, COLUMNS, position))
    return rows


def _estimates(result: xr.Dataset, names: tuple[str, ...], at: Any) -> dict[str, float | None]:
    """Some means over sequences at one place, with their errors and intervals."""
    found = {name + end: result.get(name + end) for name in names for end in ESTIMATES}
    values = {name: math.nan if of is None else float(of.values[at]) for name, of in found.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def result_for(finding: Any, result: xr.Dataset) -> str:
    """What the experiment that settles a finding gave, where it was run at the finding's place.

    Returns: The experiment at that place which changes the loss most; empty where none was run.
    """
    kind = SETTLED_BY.get(finding.verdict)
    if kind is None or "experiment" not in result.dims:
        return ""
    # A block that is skipped is a step, or two, that is left out.
    kinds = {kind, "skip"} if kind == "bypass" else {kind}
    rows = [row for row in table_rows(result) if row["kind"] in kinds and _at_the_place(row, finding)]

    def size(row: dict[str, Any]) -> float:
        return abs(row["output_change"] or 0.0 if row["loss_change"] is None else row["loss_change"])

    return sentence(max(rows, key=size)) if rows else ""


def _at_the_place(row: dict[str, Any], finding: Any) -> bool:
    stream = str(finding.stream)
    if stream.isdigit() and row["stream"] not in (None, int(stream)):
        return False
    if finding.axis not in ("depth", "connection") or finding.first < 0:
        return True
    at = row[finding.axis]
    # An experiment at several places has no connection of its own, and begins at its first depth.
    return at is None or finding.first <= at <= finding.last


def sentence(row: dict[str, Any]) -> str:
    """One experiment as a phrase, such as ``skip block 3: loss +0.5 nats (95 %: +0.25 to +0.75)``."""
    name, change = row["experiment"], row["loss_change"]
    if change is None:
        return f"{name}: the output changes by {percent(row['output_change'] or 0.0)}"
    low, high = row["loss_change_low"], row["loss_change_high"]
    loss = f"{name}: loss {number(change, sign=True)} nats"
    if low is None:
        return f"{loss} (one sequence: no interval)"
    # Within its interval a change of zero is possible, whatever its mean.
    undecided = "; 0 is possible" if low <= 0 <= high else ""
    return f"{loss} (95 %: {number(low, sign=True)} to {number(high, sign=True)}{undecided})"


def base_loss(result: xr.Dataset) -> Estimate:
    """Loss of the unchanged model in nats, over sequences."""
    return estimate(result["base_loss"].mean("token").values)


def prediction_words(result: xr.Dataset) -> str:
    """From which depth on the states hold the model's prediction, in one sentence; empty where that is not known."""
    found = estimate(result["prediction_depth"].isel(stream=0).mean("token").values)
    if not math.isfinite(found.mean):
        return ""
    last = int(result["depth"].max())
    return f"by the logit lens the prediction no longer changes from depth {found.mean:.1f} of {last} on"


def patch_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """One row for each cell that was patched; None for what is not known, and for a token or stream that is all at once.

    ``result``: of `depthscope.interventions.patch`.
    Returns: The largest change of the measure first.
    """
    change = result["change"].transpose(*CELLS)
    rows = []
    for at in zip(*np.nonzero(np.isfinite(change.values)), strict=True):
        cell = dict(zip(CELLS, map(int, at), strict=True))
        row: dict[str, Any] = {dim: result[dim].values[cell[dim]].item() for dim in CELLS}
        row["block"] = int(result["layer"].values[cell["depth"]])
        row |= {name: None for name in ("token", "stream", "block") if row[name] < 0}
        row |= _estimates(result, ("effect", "change"), at)
        if "token_text" in result and row["token"] is not None:
            texts = result["token_text"].values[:, cell["token"]]
            row["token_text"] = " / ".join(dict.fromkeys(str(text) for text in texts if str(text)))
        rows.append(row)
    return sorted(rows, key=lambda row: -abs(row["change"]))
