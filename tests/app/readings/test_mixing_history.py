"""Are the mixing matrices of every step those that the model had, from a saved run and from a live store?"""

import numpy as np
import pytest
import torch

import depthscope as ds
from depthscope.app.dashboard.state import run_library
from depthscope.app.readings.readings import read_paths
from depthscope.app.readings.run_arrays import mixing_by_step
from tests.app.dashboard.opening import charts, open_page
from tests.models.logit_models import LogitModel, ids, loss


@pytest.mark.parametrize("store", [False, True], ids=["saved", "live"])
def test_the_means_of_each_step_are_those_of_the_model(store, tmp_path, monkeypatch):
    model, expected = LogitModel(), []
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
    history = mixing_by_step(reading)
    assert history.dims == ("step", "connection", "stream_out", "stream_in")
    np.testing.assert_allclose(history.values, expected, rtol=1e-4)
    if not store:
        monkeypatch.setattr(run_library, "_roots", [])
        shown = charts(open_page("streams", [path], from_connection="1"))
        assert "h_res_steps" in shown


def test_a_run_of_one_step_has_no_history(tmp_path, mhc_run):
    ds.save_run(mhc_run, tmp_path / "one.zarr.zip")
    assert (
        run_library.mixing_history_of(run_library.read_run("one", {"one": tmp_path / "one.zarr.zip"})[0])
        is None
    )
