"""What is the answer of a page, before its figures? One sentence a run from numbers that the figures show too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from depthscope.app.figures.build.values import names_of, pick
from depthscope.app.figures.specification import NOISE_BASELINE, Selection
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

FADED = 0.1
"""Of the gradient at the last state: below it the gradient at the first has faded. A heuristic of ours."""


def answer_to(question: str, analysis: xr.Dataset, results: Mapping[str, xr.Dataset]) -> str:
    """The answer that a run gives to a question of the register of figures; empty where it has none.

    ``results``: of the experiments on the run, by command.
    """
    answer = _ANSWERS.get(question)
    return answer(analysis, results) if answer is not None else ""


def _least_needed(analysis: xr.Dataset, results: Mapping[str, xr.Dataset]) -> str:
    """The blocks that turn the state least, and the loss without them."""
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


def _collapse(analysis: xr.Dataset, results: Mapping[str, xr.Dataset]) -> str:
    """How far the rank is from that of noise where it is lowest, and how similar the tokens are where they are most so."""
    return " ".join(filter(None, (_lowest_rank(analysis), _most_similar_tokens(analysis))))


def _lowest_rank(analysis: xr.Dataset) -> str:
    ranks = _profile(analysis, "effective_rank")
    null = pick(analysis, "effective_rank_null", Selection())
    if ranks is None or not np.isfinite(ranks).any():
        return ""
    low = int(np.nanargmin(ranks))
    lowest = (
        f"Effective rank is lowest {_place(analysis, 'effective_rank', low)}: {number(float(ranks[low]))}"
    )
    known = np.ravel(np.nan if null is None else null.values)
    # One baseline for all depths, or one for each.
    baseline = float(known[low] if known.size == ranks.size else known[0])
    if 0 < baseline <= 1:  # the rank of one token is 1 whatever the network does
        return (
            "Sequences have one token each: no rank within a sequence can fall. See the ranks over all data."
        )
    return (
        f"{lowest}, {100 * ranks[low] / baseline:.0f} % of the {NOISE_BASELINE}."
        if baseline > 0
        else f"{lowest}."
    )


def _most_similar_tokens(analysis: xr.Dataset) -> str:
    cosines = _profile(analysis, "token_cosine")
    if cosines is None or not np.isfinite(cosines).any():
        return ""
    high = int(np.nanargmax(cosines))
    return f"Tokens are most similar {_place(analysis, 'token_cosine', high)}: mean cosine {number(float(cosines[high]))}."


def _streams(analysis: xr.Dataset, results: Mapping[str, xr.Dataset]) -> str:
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


def _gradients(analysis: xr.Dataset, results: Mapping[str, xr.Dataset]) -> str:
    """What becomes of the gradient on its way back through the network, and where it is smallest and largest."""
    norms = _profile(analysis, "gradient_norm")
    if norms is None or not np.isfinite(norms).any():
        return ""
    if not np.isfinite(norms[~np.isnan(norms)]).all():
        return "The gradient is infinite at some depths."
    if np.nanmax(norms) == 0:
        return "There is no gradient at any depth."
    # Depths count from the input, and a gradient goes from the last state to the first.
    end, start = np.flatnonzero(np.isfinite(norms))[[0, -1]]
    low, high = int(np.nanargmin(norms)), int(np.nanargmax(norms))
    smallest, largest = (
        f"{number(float(norms[at]))} {_place(analysis, 'gradient_norm', at)}" for at in (low, high)
    )
    way = f"On its way back, from depth {start} to depth {end}, the gradient {_change(norms[start], norms[end])}"
    return f"{way}; smallest {smallest}, largest {largest}."


def _change(before: float, after: float) -> str:
    """What becomes of a gradient from where it enters the network to where it leaves it."""
    if before == 0:
        return f"grows from 0 to {number(float(after))}" if after else "is 0 at both"
    ratio = float(after / before)
    if ratio >= 1:
        return f"grows {number(ratio)} ×"
    return f"{'fades' if ratio < FADED else 'falls'} to {percent(ratio)}"


def _place(analysis: xr.Dataset, metric: str, position: int) -> str:
    """Where that is, as verdicts name it."""
    values = pick(analysis, metric, Selection())
    assert values is not None  # it has a profile
    return visible(place(values, position), longest=LONGEST_NAME)


def _profile(analysis: xr.Dataset, metric: str, axis: str = "depth") -> np.ndarray | None:
    """A metric along one axis in its usual version; None where the run has it not, or not along that axis alone."""
    values = pick(analysis, metric, Selection())
    return None if values is None or values.dims != (axis,) else np.asarray(values.values, dtype=np.float64)


_ANSWERS: dict[str, Callable[[xr.Dataset, Mapping[str, xr.Dataset]], str]] = {
    "collapse": _collapse,
    "similarity": _least_needed,
    "mixing": _streams,
    "gradients": _gradients,
}
"""Question → its answer."""
