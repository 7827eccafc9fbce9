"""Tokens, entries and matrices of a run are those of its trace, found by loops."""

from contextlib import closing

import numpy as np
import pytest

from depthscope.app.readings import close_up as reading
from depthscope.app.readings.close_up import read_close_up
from depthscope.diagnostics import save_run, schema
from depthscope.diagnostics.errors import AbsentError
from tests.app.dashboard.growing_run import add, begin


@pytest.fixture(scope="module")
def trace(mhc_run):
    return mhc_run["trace"].to_dataset().load()


@pytest.fixture(scope="module", params=[".zarr.zip", ".zarr"])
def close_up(request, tmp_path_factory, mhc_run):
    path = tmp_path_factory.mktemp("runs") / f"a{request.param}"
    save_run(mhc_run, path)
    return read_close_up(path)


def real_tokens(trace):
    return [(int(s), int(t)) for s, t in np.argwhere(trace["mask"].values)]


def test_a_map_has_the_number_of_every_token(close_up, trace):
    x = trace["residual"].values.astype(np.float64)
    mask = trace["mask"].values
    for sequence in range(x.shape[1]):
        maps = {name: close_up.token_map(name, sequence, "1") for name in reading.TOKEN_MEASURES}
        real = [t for s, t in real_tokens(trace) if s == sequence]
        for depth in range(x.shape[0]):
            mean = sum(x[depth, sequence, t, 1] for t in real) / len(real)
            for token in range(x.shape[2]):
                state, last = x[depth, sequence, token, 1], x[-1, sequence, token, 1]
                norm = np.sqrt(np.dot(state, state))
                expected = {
                    "norm": norm,
                    "distance": np.sqrt(np.dot(state - mean, state - mean)) / norm,
                    "last": np.dot(state, last) / norm / np.sqrt(np.dot(last, last)),
                }
                for name, value in expected.items():
                    found = maps[name][token, depth]
                    assert np.isnan(found) if not mask[sequence, token] else found == pytest.approx(value)


def test_a_state_that_is_not_finite_is_the_largest(make_run, tmp_path):
    run = make_run("residual")
    data = run["trace"].to_dataset().load().copy(deep=True)
    sequence, position = real_tokens(data)[-1]
    data["residual"].values[2, sequence, position, 0, 4] = np.inf
    save_run(schema.create_run(data, attrs=run.attrs), tmp_path / "a.zarr.zip")
    found = read_close_up(tmp_path / "a.zarr.zip")
    largest = found.largest(2)[0]
    assert (largest.sequence, largest.position) == (sequence, position)
    assert found.largest(2, entries=True)[0].feature == 4


def test_of_a_run_that_is_too_large_the_first_sequences_are_read(mhc_run, tmp_path, monkeypatch):
    save_run(mhc_run, tmp_path / "a.zarr.zip")
    monkeypatch.setattr(reading, "MOST_BYTES", 1)
    found = read_close_up(tmp_path / "a.zarr.zip")
    assert (found.num_sequences, found.sequences) == (1, 2)


def test_a_live_store_has_the_states_of_its_newest_step(make_run, tmp_path):
    run = make_run("residual", layers=5)
    with closing(begin(tmp_path / "live", run)) as store:
        add(store, 0, 6)
        found = read_close_up(tmp_path / "live")
    expected = run["trace"].to_dataset()["residual"]
    assert (found.num_depths, found.num_sequences) == (expected.sizes["depth"], expected.sizes["sample"])
    with pytest.raises(AbsentError, match="no group coverage"):
        schema.open_group(tmp_path / "live", "coverage")
