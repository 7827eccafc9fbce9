"""Which blocks are needed least, and what becomes of the streams? A sentence a run, from numbers that figures show too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import names_of, pick
from depthscope.app.figures.specification import Selection
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import LONGEST_NAME, visible
from depthscope.diagnostics.experiments.results import sentence, table_rows
from depthscope.diagnostics.numbers import percent
from depthscope.diagnostics.verdicts.locations import place

MOST_BLOCKS = 3
"""Blocks that are named."""

HALVES = {"mid": "first half of ", "post": "second half of "}
"""Site of a state → what of a block wrote it, where the run shows a state inside the block."""

HARDLY = 0.1
"""Of the share that each of n streams would have: below it a stream hardly takes part. A heuristic of ours."""


def least_needed(analysis: xr.Dataset, results: Mapping[str, xr.Dataset]) -> str:
    """The blocks that turn the state least, and the loss without them; empty where that was not measured."""
    influence = _profile(analysis, "block_influence")
    if influence is None or not np.isfinite(influence).any():
        return ""
    # NaN comes last: of a step that is undefined nothing can be said.
    least = [int(each) for each in np.argsort(influence) if np.isfinite(influence[each])][:MOST_BLOCKS]
    names = _sublayers(analysis["block_influence"])
    turns = ", ".join(f"{names[each]} ({number(float(influence[each]))})" for each in least)
    words = f"Least needed, by how far they turn the state (1 − cos): {turns}."
    skips = (
        [row for row in table_rows(results["ablate"]) if row["kind"] == "skip"] if "ablate" in results else []
    )
    tried = [row for row in skips if row["depth"] in least]
    if tried:
        return f"{words} Tried: {'; '.join(map(sentence, tried))}."
    return (
        f"{words} The loss without them was not measured (depthscope ablate CHECKPOINT --run RUN --do skip)."
    )


def _sublayers(along: xr.DataArray) -> list[str]:
    """What writes each depth: a block, or half of one where the run shows states inside blocks."""
    if not {"site", "layer"} <= set(along.coords):
        return names_of(along, "depth")
    sites, layers = along["site"].values, along["layer"].values
    halved = {int(layer) for site, layer in zip(sites, layers, strict=True) if site == "mid"}
    return [
        f"{HALVES.get(str(site), '') if layer in halved else ''}block {layer}" if site in HALVES else name
        for name, site, layer in zip(names_of(along, "depth"), sites, layers, strict=True)
    ]


def streams_answer(analysis: xr.Dataset) -> str:
    """Which streams carry what the connections read, whether they mix, and what of their differences is left."""
    return " ".join(filter(None, (_carriers(analysis), _mixers(analysis), _survivors(analysis))))


def _carriers(analysis: xr.Dataset) -> str:
    if "signal_share" not in analysis:
        return ""
    shares = analysis["signal_share"].isel(step=-1).mean("connection")
    known = {
        str(label): float(value)
        for label, value in zip(shares["stream"].values, shares.values, strict=True)
        if np.isfinite(value) and str(label).isdigit()
    }
    if not known:
        return ""
    most = max(known, key=lambda each: known[each])
    idle = [each for each, share in known.items() if share < HARDLY / len(known)]
    carried = f"Stream {most} carries most of what is read ({100 * known[most]:.0f} %)"
    if max(known.values()) < 1.5 / len(known):
        carried = f"All {len(known)} streams carry a similar share of what is read"
    hardly = f"; hardly read: stream {', '.join(idle)}" if idle else ""
    return f"{carried}{hardly}."


def _mixers(analysis: xr.Dataset) -> str:
    distance = _profile(analysis, "identity_distance", "connection")
    if distance is None or not np.isfinite(distance).any():
        return ""
    most = int(np.nanargmax(distance))
    if distance[most] < 1e-3:
        return "No connection mixes the streams."
    where = _place(analysis, "identity_distance", most)
    return f"They mix most {where}: distance from the identity {number(float(distance[most]))}."


def _survivors(analysis: xr.Dataset) -> str:
    left = _profile(analysis, "deflated_gain", "connection")
    if left is None or not np.isfinite(left).any():
        return ""
    last = int(np.flatnonzero(np.isfinite(left))[-1])
    share = float(left[last])
    where = _place(analysis, "deflated_gain", last)
    if share > 1.5:
        return f"The initial differences between streams have grown {number(share)} × {where}."
    written = percent(share)
    # "Only 4 %", and "Less than 0.001 %".
    written = f"Only {written}" if share < 0.5 and written[0].isdigit() else written.capitalize()
    return f"{written} of the initial differences between streams survive {where}."


def _place(analysis: xr.Dataset, metric: str, position: int) -> str:
    """Where that is, as verdicts name it."""
    values = pick(analysis, metric, Selection())
    assert values is not None  # it has a profile
    return visible(place(values, position), longest=LONGEST_NAME)


def _profile(analysis: xr.Dataset, metric: str, axis: str = "depth") -> np.ndarray | None:
    """A metric along one axis in its usual version; None where the run has it not, or not along that axis alone."""
    values = pick(analysis, metric, Selection())
    return None if values is None or values.dims != (axis,) else np.asarray(values.values, dtype=np.float64)
