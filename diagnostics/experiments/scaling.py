"""How do states scale with the size of a model? Exponents over widths or depths, with their error, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from depthscope.diagnostics.experiments.variables import ESTIMATES
from depthscope.diagnostics.metrics.declaration import OURS
from depthscope.diagnostics.metrics.intervals import factor
from depthscope.diagnostics.schema import Variable

# Of a fit of two parameters three sizes leave one degree of freedom, whose interval is 12.7 standard errors to each side; of
# five it is 3.2.
ADVISED_SIZES = 5
# An exponent of 0.25 is a factor of two over sixteenfold sizes; what μP leaves at widths of some tens is below it.
STABLE = 0.25
OUTPUT = "output"
"""The place after the last state: what the model returns."""


class Exponent(NamedTuple):
    """A power law y ∝ size^mean with the standard error of its exponent and 95 % interval; NaN where it is not known."""

    mean: float
    error: float
    low: float
    high: float


def fit_exponent(sizes: Sequence[float], values: np.ndarray) -> Exponent:
    r"""The exponent of a power law by least squares in logarithms, with Student's t interval.

    .. math:: \ln y_s = a + b \ln s + \varepsilon, \quad b \pm t_{0.975}(S - 2)\, \mathrm{se}(b)

    Seeds are averaged first: the misfit of the law is the same in all of them, so that they are no independent points.

    Returns: NaN where a value is zero or not finite; no error for fewer than three sizes.

    Examples
    --------
    >>> found = fit_exponent([1, 2, 4], np.array([[3.0], [6.0], [12.0]]))
    >>> round(found.mean, 9), abs(found.error) < 1e-9
    (1.0, True)
    """
    if not np.all(np.isfinite(values) & (values > 0)) or len(set(sizes)) < 2:
        return Exponent(math.nan, math.nan, math.nan, math.nan)
    x = np.log(np.asarray(sizes, dtype=float))
    y = np.log(values).mean(axis=1)
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    degrees = len(x) - 2
    if degrees < 1:
        return Exponent(slope, math.nan, math.nan, math.nan)
    misfit = y - y.mean() - slope * away
    error = float(np.sqrt(misfit @ misfit / degrees / (away @ away)))
    reach = factor(degrees) * error
    return Exponent(slope, error, slope - reach, slope + reach)


def _fitted(name: str, meaning: str) -> dict[str, Variable]:
    words = ("exponent", "standard error", "lower end of 95 %", "upper end of 95 %")
    return {
        f"{name}_exponent{ending}": Variable(("place",), "f", f"{meaning} against the size: {word}")
        for ending, word in zip(ESTIMATES, words, strict=True)
    }


POINTS = ("size", "seed", "place")
SCALING: dict[str, Variable] = {
    "start": Variable(POINTS, "f", "root mean square entry of the state before training"),
    "change": Variable(POINTS, "f", "root mean square entry of what training has added to the state"),
    "loss": Variable(("size", "seed", "step"), "f", "training loss before each step"),
    **_fitted("start", "size of the state before training"),
    **_fitted("change", "change of the state"),
    "place": Variable(("place",), "OTU", "which state"),
}
"""Variables of the result of `depthscope.coordinate_check`."""


def with_exponents(points: xr.Dataset) -> xr.Dataset:
    """A result with the exponents of its points.

    ``points``: ``start`` and ``change`` by size, seed and place.
    """
    sizes = points["size"].values.tolist()
    found: dict[str, Any] = {}
    for name in ("start", "change"):
        values = points[name].transpose("place", "size", "seed").values
        fits = np.array([fit_exponent(sizes, of_place) for of_place in values])
        found |= {f"{name}_exponent{ending}": ("place", fits[:, at]) for at, ending in enumerate(ESTIMATES)}
    return points.assign(found)


def scaling_rows(result: xr.Dataset) -> list[dict[str, Any]]:
    """One row a place, with plain values: None for what is not known."""
    rows = []
    for at, place in enumerate(result["place"].values):
        row: dict[str, Any] = {"place": str(place)}
        for name in ("start", "change"):
            for ending in ESTIMATES:
                value = float(result[f"{name}_exponent{ending}"].values[at])
                row[f"{name}_exponent{ending}"] = value if math.isfinite(value) else None
        rows.append(row)
    return rows


def scaling_sentence(result: xr.Dataset) -> str:
    """Whether the change of the states is stable over the sizes, where it is least, and what that asks for."""
    over = str(result.attrs["over"])
    sizes = result["size"].values.tolist()
    spoilt = [size for size in sizes if not np.isfinite(result["change"].sel(size=size)).all()]
    if spoilt:
        return f"The states are not finite after training at {over} {', '.join(map(str, spoilt))}: lower the learning rate."
    known = [row for row in scaling_rows(result) if row["change_exponent"] is not None]
    if not known:
        return f"No state changes at every {over}: nothing is learnt, or the first state is a constant."
    worst = max(known, key=lambda row: abs(row["change_exponent"]))
    if worst["change_exponent_low"] is None:
        return f"{_grows(worst, over)}; {len(sizes)} {over}s give no error, take {ADVISED_SIZES} or more."
    certain = [
        row for row in known if row["change_exponent_low"] > STABLE or row["change_exponent_high"] < -STABLE
    ]
    if certain:
        least = max(certain, key=lambda row: abs(row["change_exponent"]))
        return f"{_grows(least, over)}: not {over}-stable. {_advice(least['change_exponent'], over)}"
    if all(row["change_exponent_low"] >= -STABLE and row["change_exponent_high"] <= STABLE for row in known):
        return f"{_grows(worst, over)}: {over}-stable within {STABLE} ({OURS}) at every depth."
    more = (
        f"take {ADVISED_SIZES} {over}s or more"
        if len(sizes) < ADVISED_SIZES
        else f"take more {over}s or a wider range"
    )
    return f"{_grows(worst, over)}: not decided whether it is {over}-stable within {STABLE} ({OURS}); {more}."


def _grows(row: dict[str, Any], over: str) -> str:
    place = "the output" if row["place"] == OUTPUT else f"the states at {row['place']}"
    interval = (
        ""
        if row["change_exponent_low"] is None
        else f" (95 %: {row['change_exponent_low']:.2f} to {row['change_exponent_high']:.2f})"
    )
    return f"Training changes {place} by {over}^{row['change_exponent']:.2f}{interval}"


def _advice(exponent: float, over: str) -> str:
    # μP for Adam: Yang et al. 2022 (2203.03466), and by the spectral condition of Yang, Simon & Bernstein 2023 (2310.17813);
    # CompleteP: Dey et al. 2025 (2505.01618).
    if exponent < 0:
        return f"The larger the {over}, the less is learnt there: a learning rate or a multiplier falls too fast with it."
    if over == "width":
        return "Give hidden matrices a learning rate, and the head a multiplier, of one over the width (μP)."
    return "Multiply each branch by one over the depth (CompleteP)."
