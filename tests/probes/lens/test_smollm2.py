"""A trained model: its first block matters, its massive activations hold the loss, and its head is found and read."""

from __future__ import annotations

import pytest

import depthscope as ds
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text


@pytest.mark.model
def test_smollm2(smollm2):
    batch = encode_text(smollm2, sample_text(), sequences=4, length=24)
    plans = [ds.interventions.plan("skip", blocks=[0, 5]), ds.interventions.plan("massive", depths=14)]
    found = ds.interventions.ablate(smollm2.model, batch, plans)
    first, middle, massive = found.loss_change.values
    assert first > 3
    assert abs(middle) < 1
    assert massive > 5  # one feature of the first token, set to zero
    assert "507" in str(found.experiment.values[2])
    read = ds.lens(smollm2.model, batch)
    agreement = read.agreement.sel(lens="logit", stream="all").values
    assert agreement[30] == 1
    assert agreement[28] > agreement[20] > agreement[1]
    assert 20 < float(read.prediction_depth.mean()) < 30
