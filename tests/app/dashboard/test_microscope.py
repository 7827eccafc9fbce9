"""Does the microscope show the states of the run, and does a link restore what was looked at?"""

import base64
import json

import numpy as np
import pytest

from depthscope.app.dashboard.components import verdict_board
from depthscope.app.dashboard.state import run_library
from depthscope.diagnostics import save_run
from tests.app.dashboard.opening import charts, open_page, words


@pytest.fixture(scope="module")
def runs(tmp_path_factory, residual_run, mhc_run, make_run):
    root = tmp_path_factory.mktemp("runs")
    save_run(residual_run, root / "plain.nc")
    save_run(mhc_run, root / "mhc.nc")
    save_run(make_run("residual", seed=1), root / "other.nc")
    save_run(make_run("residual", seed=2), root / "third.nc")
    return root


@pytest.fixture
def opened(runs, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])
    monkeypatch.setattr(verdict_board, "PATIENCE", 120.0)  # all runs in one go, also on a busy machine

    def opened_page(page="microscope", **parameters):
        return open_page(page, [runs], **parameters)

    return opened_page


def numbers(values):
    if isinstance(values, dict):
        found = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
        return (
            found.reshape([int(size) for size in values["shape"].split(",")]) if "shape" in values else found
        )
    return np.asarray(values, dtype=float)


def test_the_map_has_the_norm_of_every_token(opened, residual_run):
    data = charts(opened(runs="plain", sequence="1", measure="norm"))["microscope"]
    (drawn,) = [trace for trace in json.loads(data["figure"])["data"] if trace["type"] == "heatmap"]
    trace = residual_run["trace"].to_dataset()
    expected = np.linalg.norm(trace["residual"].values[:, 1, :, 0], axis=-1).T
    expected[~trace["mask"].values[1]] = np.nan
    shown = numbers(drawn.get("customdata", drawn["z"]))
    np.testing.assert_allclose(shown, expected[: len(shown)], rtol=1e-6)
    assert len(data["names"]) == trace.sizes["depth"]


def test_the_pinned_depth_is_that_of_the_link(opened):
    test = opened(runs="mhc", pin="3", against="1")
    said = words(test)
    assert "Depth 3 against depth 1" in said
    assert "H_res of connection 2" in said
    data = charts(test)
    assert (data["microscope"]["pin"], data["microscope"]["other"]) == (3, 1)
    assert {"spectrum", "eigenvalues_connection2"} <= set(data)


def test_without_a_pin_the_worst_finding_is_shown(opened):
    said = words(opened(runs="mhc"))
    assert "Depth" in said


@pytest.mark.parametrize("pin", ["99", "-1", "nan", "1e3", "٣", "9" * 30, ""])
def test_a_depth_that_there_is_not_is_none(opened, pin):
    test = opened(runs="plain", pin=pin, against=pin, look="nobody", sequence=pin, measure=pin)
    assert not test.exception
    assert "Depth" in words(test)


def test_the_table_of_runs_lists_all_and_analyses_none_twice(opened, runs):
    test = opened("")
    assert not test.exception
    (table,) = [each.value for each in test.dataframe if "run" in each.value.columns]
    assert sorted(table["run"]) == ["mhc", "other", "plain", "third"]
    # More than three runs: none is chosen for the visitor.
    assert test.multiselect(key="runs").value == []
    assert "No run is chosen" in words(test)


def test_the_table_finds_runs_by_their_words(opened):
    test = opened("", find="mhc")
    (table,) = [each.value for each in test.dataframe if "run" in each.value.columns]
    assert table["run"].tolist() == ["mhc"]
    assert "No run has" in words(opened("", find="nothing of this kind"))
