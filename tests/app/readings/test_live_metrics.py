"""What is read of a run whose metrics were computed while it trained, and whose last sequences were stored?"""

from __future__ import annotations

import numpy as np
import torch

from depthscope import probes
from depthscope.app.readings.readings import read_runs
from depthscope.app.readings.run_arrays import renewed
from depthscope.diagnostics import analyze, schema
from tests.models.small_models import llama


def test_an_analysis_of_the_stored_sequences_joins_the_recorded_steps():
    torch.manual_seed(0)
    model, ids = llama(), torch.randint(1, 64, (3, 11))
    with probes.record(model, metrics="live", live_tokens=16, every=2) as recorder:
        for _ in range(4):
            model(ids)
            recorder.step()
    run = recorder.run
    live = schema.chain_dataset(run, "metrics")
    fresh = analyze(run)
    (reading,) = read_runs({"a": run})
    for joined in (reading.analysis, renewed(fresh, live, complete=True)):
        assert joined["step"].values.tolist() == [0, 2]
        # What was recorded stays; what only whole sequences give is at the last step.
        np.testing.assert_array_equal(
            joined["effective_rank"].sel(scope="data"), live["effective_rank"].sel(scope="data")
        )
        assert np.isnan(joined["dong_residual"].isel(step=0)).all()
        np.testing.assert_array_equal(
            joined["dong_residual"].isel(step=-1), fresh["dong_residual"].isel(step=0)
        )
        within = joined["effective_rank"].sel(scope="sequence")
        np.testing.assert_array_equal(
            within.isel(step=-1), fresh["effective_rank"].sel(scope="sequence").isel(step=0)
        )
        assert "16 sampled tokens" in joined["effective_rank"].attrs["estimator"]
        assert "stored sequences" in joined["effective_rank"].attrs["estimator"]
