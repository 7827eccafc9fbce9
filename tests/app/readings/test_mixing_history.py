"""Are the mixing matrices of every step those that the model had, from a saved run and from a live store?"""

import numpy as np
import pytest
import torch

import depthscope as ds
from depthscope.app.readings.readings import read_paths
from depthscope.app.readings.training_history import CELLS, history_of
from tests.models.sinkhorn_model import SinkhornModel, ids, loss


@pytest.mark.parametrize("store", [False, True], ids=["saved", "live"])
def test_the_means_of_each_step_are_those_of_the_model(store, tmp_path, monkeypatch):
    model, expected = SinkhornModel(), []
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    path = tmp_path / ("run" if store else "run.zarr.zip")
    options = {"store": path} if store else {}
    with ds.record(model, max_sequences=8, **options) as recorder:
        for step in range(3):
            batch = ids(seed=step)
            loss(model(batch), batch).backward()
            recorder.step()
            expected.append([each.matrix.detach().mean((0, 1)).numpy() for each in model.coefficients])
            optimizer.step()
            optimizer.zero_grad()
    if not store:
        ds.save_run(recorder.run, path)
    (reading,) = read_paths([str(path)])[0]
    history = history_of(reading)
    for connection in range(len(expected[0])):
        cells = history.values(CELLS, {"connection": str(connection)})
        n = expected[0][connection].shape[0]
        shown = cells[:, : n * n].reshape(len(cells), n, n)
        np.testing.assert_allclose(shown, [step[connection] for step in expected], rtol=1e-4)
