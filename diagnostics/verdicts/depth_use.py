"""Do the later blocks still do anything beside the size of what the earlier ones wrote? The curse of depth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.causes import from_there_on, overlapping
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, number, verdict

# Half of fewer steps than this is no depth to speak of.
FEWEST_STEPS = 8


# Of healthy networks (two of each kind of the zoo, whatever their norms, age and connections) the later half has 0.43 or more,
# SmolLM2-135M 0.99; the study's networks after a few dozen steps, when all that they know is one common vector, have 0.17.
@verdict(
    metric="relative_turn",
    limits=Limits(warn=0.2, above=False),
    follows_from={
        **dict.fromkeys(("same_representation", "idle_layer", "wasted_layer", "common_vector"), overlapping),
        **dict.fromkeys(("gain_explosion", "exploding_state", "dead_state"), overlapping),
        "single_gain_explosion": from_there_on,
    },
    suspicion=True,
)
def curse_of_depth(
    relative_turn: xr.DataArray,
    variance_growth: xr.DataArray | None = None,
    effective_depth: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """Later blocks barely change the residual stream; its norm is already large.

    Scale the input of each branch by one over the root of its depth (LayerNorm scaling, Sun et al. 2025), start what writes to
    the stream smaller, or look for an early block that writes much more than the others; or take fewer layers.
    """
    turned = relative_turn.sel(stream="mean", drop=True)
    steps = np.flatnonzero(turned.notnull().values)
    if len(steps) < FEWEST_STEPS:
        return
    late = steps[len(steps) // 2 :]
    counted = np.minimum(turned.values, 1.0)
    values = np.full(turned.sizes["depth"], np.nan)
    values[late] = counted[late].mean()
    yield Profile(
        turned.copy(data=values),
        "the turn of the later half of the steps, as a share of that of independent branches, is",
        template=f"{_steps(turned, late)} turn the state {{percent}} as far as independent branches of the same size would",
        note=f"{_effective(effective_depth, len(steps))}{_growth(variance_growth)}",
        start="the first blocks learn first",
    )


def _steps(turned: xr.DataArray, late: np.ndarray) -> str:
    """The steps of the later half: as blocks, where these are known."""
    if "layer" not in turned.coords:
        return f"the steps from depth {late[0]} to {late[-1]}"
    first, last = (turned["layer"].values[at] for at in (late[0], late[-1]))
    return f"blocks {first} to {last}"


def _effective(effective_depth: xr.DataArray | None, steps: int) -> str:
    if effective_depth is None:
        return ""
    reached = float(effective_depth.sel(stream="mean").isel(depth=-1))
    return f"The effective depth is {number(reached)} of {steps} steps."


def _growth(variance_growth: xr.DataArray | None) -> str:
    """By how much the branches add up at the depth where they do most."""
    if variance_growth is None:
        return ""
    grown = variance_growth.sel(stream="mean", drop=True)
    if grown.isnull().all() or float(grown.max()) < 2.0:
        return ""
    at = int(grown.argmax("depth"))
    return f" At depth {at} the square of the state is {number(float(grown[at]))} times that of independent branches."
