"""Do heads still choose among tokens? What attention looks like."""

from __future__ import annotations

from collections.abc import Iterator

import xarray as xr

from depthscope.diagnostics.verdicts.calibration import CALIBRATED
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, verdict


# Beside the calibration set: the 30 layers of SmolLM2-135M have at least 0.41, where single heads are near 0. A layer whose
# queries and keys are 60 × too large has at most 0.015.
@verdict(metric="attention_entropy", limits=Limits(warn=0.1, above=False, source=CALIBRATED), suspicion=True)
def attention_entropy_collapse(attention_entropy: xr.DataArray) -> Iterator[Profile]:
    """Attention entropy collapse: in every head each query attends to a single token.

    Normalise queries and keys before their product, cap the logits, or lower the learning rate or the scale of the query and
    key weights: a softmax that is saturated passes no gradient to them.
    """
    # The head that spreads most: heads that copy the token before, or rest on a sink, are common in trained models.
    most = attention_entropy.max("head")
    yield Profile(
        most,
        "the largest entropy of attention over the heads, as a share of uniform attention, is",
        begins=True,
    )
