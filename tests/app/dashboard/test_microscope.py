"""Does the microscope show the states of the run, and does a link restore what was looked at?"""

import json

import numpy as np
import pytest
from streamlit.util import calc_hash

from depthscope.app.dashboard.state import run_library
from depthscope.diagnostics import save_run
from depthscope.diagnostics.verdicts.causes import worst_depth
from tests.app.dashboard.opening import board, charts, numbers, open_page, parts, words


@pytest.fixture(scope="module")
def runs(tmp_path_factory, residual_run, mhc_run, make_run):
    root = tmp_path_factory.mktemp("runs")
    save_run(residual_run, root / "plain.zarr.zip")
    save_run(mhc_run, root / "mhc.zarr.zip")
    save_run(make_run("residual", seed=1), root / "other.zarr.zip")
    save_run(make_run("residual", seed=2), root / "third.zarr.zip")
    return root


@pytest.fixture
def opened(runs, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])

    def opened_page(page="microscope", **parameters):
        return open_page(page, [runs], **parameters)

    return opened_page


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
    (pane,) = parts(test, "pane")
    assert (pane["pin"], pane["other"]) == (3, 1)
    data = charts(test)
    assert (data["microscope"]["pin"], data["microscope"]["other"]) == (3, 1)
    assert "spectrum" in data
    assert "Product of H_res from depth 1 to depth 3" in words(test)


def test_the_browser_has_the_numbers_tokens_and_matrices_of_every_depth(opened, mhc_run):
    test = opened(runs="mhc", token="0.2")
    (pane,) = parts(test.selectbox(key="whose").set_value("marked").run(), "pane")
    trace = mhc_run["trace"].to_dataset()
    depths = trace.sizes["depth"]
    assert all(len(row["values"]) == len(row["noise"]) == depths for row in pane["numbers"])
    assert len(pane["tokens"]) == len(pane["connections"]) == len(pane["names"]) == depths
    h = trace["h_res"].values[:, 0, 2].astype(np.float64)
    np.testing.assert_allclose([each["h"] for each in pane["matrices"]], h, rtol=1e-5)
    product = np.eye(h.shape[-1])
    for connection, shown in zip(h, pane["products"], strict=True):
        product = connection @ product
        np.testing.assert_allclose(shown["h"], product, rtol=1e-4, atol=1e-9)
        found = np.sort_complex([complex(*each) for each in shown["eigenvalues"]])
        np.testing.assert_allclose(found, np.sort_complex(np.linalg.eigvals(product)), atol=1e-5)
    norms = np.linalg.norm(trace["residual"].values.mean(axis=3), axis=-1)
    norms[:, ~trace["mask"].values] = -1
    for depth, shown in enumerate(pane["tokens"]):
        _, sequence, position, *_ = shown["tokens"][0]
        assert norms[depth, sequence, position] == pytest.approx(norms[depth].max())
    assert len(json.dumps(pane)) < 100_000
    assert pane["token"] == [0, 2]


def test_a_run_of_one_stream_has_no_matrices(opened):
    (pane,) = parts(opened(runs="plain"), "pane")
    assert "matrices" not in pane
    assert pane["tokens"]


@pytest.mark.parametrize("token", ["99.0", "0.999", "1", "-1.0", "٣.٣", "<b>", "9" * 40 + ".0"])
def test_a_token_that_there_is_not_is_none(opened, token):
    (pane,) = parts(opened(runs="mhc", token=token, whose="marked token"), "pane")
    assert pane["token"] is None


def test_without_a_pin_the_worst_finding_is_shown(opened):
    test = opened(runs="mhc")
    (pane,) = parts(test, "pane")
    (reading,) = run_library.read_run("mhc")
    placed = [
        depth for each in reading.findings if (depth := worst_depth(each, reading.analysis)) is not None
    ]
    assert pane["pin"] == (placed[0] if placed else len(pane["names"]) - 1)


@pytest.mark.parametrize("pin", ["99", "-1", "nan", "1e3", "٣", "9" * 30, ""])
def test_a_depth_that_there_is_not_is_none(opened, pin):
    test = opened(runs="plain", pin=pin, against=pin, look="nobody", sequence=pin, measure=pin)
    assert not test.exception
    (pane,) = parts(test, "pane")
    assert 0 <= pane["pin"] < len(pane["names"])


def test_the_table_of_runs_lists_all_and_analyses_none_twice(opened, runs):
    test = opened("")
    assert not test.exception
    assert sorted(board(test)) == ["mhc", "other", "plain", "third"]
    assert all(row["judged"] for row in board(test).values())
    # More than three runs: none is chosen for the visitor, who sees the worst finding of the first row.
    assert test.multiselect(key="runs").value == []
    first = next(iter(board(test).values()))
    assert first["why"] in words(test)
    # A page that shows one run begins with the one that was looked at.
    assert f"this is {first['runs'][0]}" in words(opened_after(test, "collapse"))


def opened_after(test, page):
    test._page_hash = calc_hash(page)
    return test.run()


def test_the_table_finds_runs_by_everything_that_it_shows(opened, mhc_run):
    assert list(board(opened("", find="mhc"))) == ["mhc"]
    rows = board(opened(""))
    some = next(row for row in rows.values() if row["why"])
    word = max(some["why"].split(), key=len)
    assert some["name"] in board(opened("", find=word))
    assert list(board(opened("", find=f"{mhc_run.attrs['model']} mhc"))) == ["mhc"]
    assert "No run has" in words(opened("", find="nothing of this kind"))


def test_a_column_is_named_for_health_and_a_name_is_whole(runs, monkeypatch, tmp_path, residual_run):
    monkeypatch.setattr(run_library, "_roots", [])
    long = "sweep_" + "learning_rate_1e-3_" * 5 + "s1"
    save_run(residual_run, tmp_path / f"{long}.zarr.zip")
    test = open_page("", [tmp_path])
    assert list(board(test)) == [long]
    (sent,) = parts(test, "board")
    assert sent["columns"][0] == "distinct layers"
