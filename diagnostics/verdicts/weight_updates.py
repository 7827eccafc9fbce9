"""Does a step of the optimiser move every module, and none too far? Verdicts on updates of weights.

Limits without a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import xarray as xr

from depthscope.diagnostics.verdicts.declaration import Limits, Profile, verdict


# The rule of thumb is 1e-3 a step, see the metric. The ratio is to the weights after the step: a step that replaces a
# module completely has 1.
@verdict(metric="update_ratio", limits=Limits(warn=0.1, fail=0.5))
def large_update(update_ratio: xr.DataArray) -> Iterator[Profile]:
    """One step of the optimiser rewrites much of a module.

    Lower its learning rate or warm up longer. In the first steps of Adam it is the learning rate over the size
    of a weight: start such weights larger, or leave those that start near zero to themselves.
    """
    yield Profile(update_ratio, "the change of the weights in one step, relative to the weights, is")


# About the spacing of float32, 1.2e-7: a smaller relative change is rounded away.
@verdict(metric="update_ratio", limits=Limits(warn=1e-7, above=False))
def lost_update(update_ratio: xr.DataArray) -> Iterator[Profile]:
    """A step of the optimiser leaves a module as it was.

    Normal where the learning rate is zero. Else see whether the module gets a gradient, whether the optimiser
    has its parameters, and whether half precision rounds the update away: keep a float32 copy of the weights.
    """
    yield Profile(update_ratio, "the change of the weights in one step, relative to the weights, is")
