"""What does the output of a model under test predict? The targets of its batch, asked of the model itself."""

from __future__ import annotations

import torch

from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.predictions import Pick, Targets, find_targets


def targets_of(model: ModelUnderTest, logits: torch.Tensor, pick: Pick | None = None) -> Targets:
    """What the output of a model is compared with: see `find_targets`.

    ``logits``: (B, T, V) of its unchanged output.
    """
    return find_targets(
        model.batch,
        model.base.output,
        logits,
        mask=model.mask,
        width=model.base.states[max(model.base.states)].shape[-1],
        again=lambda batch: model.values_again(batch, pick),
        picked=pick is not None,
    )
