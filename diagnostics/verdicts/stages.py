"""How large is a stage's first state beside that of the whole network? Stages of one chain are joined, not judged alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

import xarray as xr

from depthscope.diagnostics.metrics.gradients import NUM_FEATURES
from depthscope.diagnostics.verdicts.magnitude import SCALE_BEFORE, one_view

# As the capture names the stages of one chain, whose states have other widths or numbers of tokens.
_STAGE = re.compile(r"(?P<chain>.*?)_?stage(?P<number>\d+)$")


def with_joined_stages(analyses: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Analyses of which each later stage of a chain has the attribute ``scale_before``.

    ``analyses``: by the name of the chain or stage.
    """
    found = dict(analyses)
    first: dict[str, float] = {}
    for name, analysis in analyses.items():
        stage = _STAGE.match(name)
        size = _size_of_a_feature(analysis)
        if stage is None or size is None:
            continue
        if stage["number"] == "0":
            first[stage["chain"]] = size
        elif first.get(stage["chain"], 0.0) > 0:
            found[name] = analysis.assign_attrs({SCALE_BEFORE: size / first[stage["chain"]]})
    return found


def _size_of_a_feature(analysis: xr.Dataset) -> float | None:
    """Root mean square of a feature of the first state, which does not change with the width; None where unknown."""
    if "residual_norm" not in analysis or NUM_FEATURES not in analysis["residual_norm"].attrs:
        return None
    norm = analysis["residual_norm"]
    first = norm.isel(step=-1) if "step" in norm.dims else norm
    return float(one_view(first.isel(depth=0))) / float(norm.attrs[NUM_FEATURES]) ** 0.5
