"""Does the Training page show every step of a history, its spikes, and what a link asks for?"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from depthscope.app.dashboard.state import growing_runs, run_library
from depthscope.app.dashboard.state.growing_runs import live_state
from depthscope.app.figures.build.history_figure import MOST_COLUMNS
from depthscope.diagnostics import Severity, analyze, judge, save_run, schema
from depthscope.diagnostics.schema import LiveRows
from depthscope.diagnostics.schema.live_store import LiveStore
from tests.app.dashboard.growing_run import SPIKE, add, begin, with_state
from tests.app.dashboard.opening import charts, depth_map, numbers, open_page, words


@pytest.fixture
def store(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])
    written = begin(tmp_path / "run", make_run("residual", layers=5))
    for step in range(20):
        add(written, step, 6)
    yield written
    written.close()


def opened(store, **parameters):
    return open_page("training", [store.path.parent], **parameters)


def heat_map(test, number=0):
    figure = json.loads(charts(test)["training"]["figure"])
    return [trace for trace in figure["data"] if trace["type"] == "heatmap"][number]


def test_steps_are_followed_and_the_state_is_said(store):
    test = opened(store)
    assert re.search(r"step 19, \d+ s ago", words(test))
    assert numbers(heat_map(test)["z"]).shape == (6, 20)
    add(store, 20, 6)
    test.run()
    assert "Step 20, the last one" in words(test)
    assert numbers(heat_map(test)["z"]).shape == (6, 21)
    store.finish()
    store.close()
    test.run()
    assert "ended at step 20" in words(test)


def test_a_link_restores_step_and_zoom(store):
    test = opened(store, step="3", zoom_training="2.5,9.5", measures="residual_norm")
    assert "Step 3" in words(test)
    data = charts(test)["training"]
    assert data["pin"] == 3.0
    at_steps = json.loads(charts(test)["residual_norm_at_step"]["figure"])["data"]
    assert {"step 3", "step 19"} <= {trace.get("name") for trace in at_steps}
    # One step beyond each end of the zoom.
    np.testing.assert_array_equal(numbers(heat_map(test)["x"]), np.arange(2, 11))


def test_no_spike_is_lost_in_a_long_history(store):
    for step in range(20, 5000):
        add(store, step, 6)
    test = opened(store, measures="residual_norm")
    drawn = heat_map(test)
    values = numbers(drawn.get("customdata", drawn["z"]))
    assert values.shape[1] == MOST_COLUMNS
    assert values[3].max() == pytest.approx(4 * 1.007 * 50.0, rel=1e-5)
    column = int(values[3].argmax())
    assert abs(numbers(drawn["x"])[column] - SPIKE) < 13
    assert "most unusual of 13 steps" in charts(test)["training"]["figure"]


def test_several_runs_are_drawn_on_the_same_axes_and_their_seeds_as_one_band(store, make_run):
    folder = store.path.parent
    store.finish()
    for name in ("second", "third"):
        other = begin(folder / name, make_run("residual", layers=5))
        for step in range(5, 25):
            add(other, step, 6)
        other.finish()
        other.close()
    save_run(make_run("residual", layers=2), folder / "plain.zarr.zip")
    chosen = {"runs": ["run", "second", "third", "plain"], "measures": "residual_norm"}
    test = open_page("training", [folder], **chosen)
    assert "and not shown: plain" in words(test)
    figure = json.loads(charts(test)["training"]["figure"])
    curves = {trace["name"]: trace for trace in figure["data"] if trace.get("name")}
    assert list(curves) == ["run", "second", "third"]
    assert not [trace for trace in figure["data"] if trace["type"] == "heatmap"]
    np.testing.assert_array_equal(numbers(curves["second"]["x"]), np.arange(5, 25))
    # Of six depths of step s with the norms 1 to 6 times (1 + s/1000) the mean.
    expected = 3.5 * (1 + np.arange(5, 25) / 1000)
    expected[SPIKE - 5] += 49 * 4 * (1 + SPIKE / 1000) / 6
    np.testing.assert_allclose(numbers(curves["second"]["y"]), expected, rtol=1e-6)
    assert {"residual_norm_at_step"} == set(charts(test)) - {"training"}
    # One of them alone has its map.
    assert numbers(heat_map(open_page("training", [folder], **chosen, trained="second"))["z"]).shape == (
        6,
        20,
    )


def test_a_page_that_is_opened_before_the_first_step_waits_and_shows_it(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])
    monkeypatch.setitem(growing_runs._rest, "until", 0.0)
    store = LiveStore(tmp_path / "run")
    pages = {
        page: open_page(page, [tmp_path], runs=["run"]) for page in ("training", "microscope", "compare")
    }
    for test in pages.values():
        assert "no step of it was measured yet" in words(test)
        assert "cannot be" not in words(test)
    assert "no step of it" in depth_map(open_page("", [tmp_path]))["run"]["worst"]
    with_state(store, make_run("residual", layers=5))
    add(store, 0, 6)
    for test in pages.values():
        test.run()
        assert "no step of it" not in words(test)
        assert "cannot be" not in words(test)
    assert "one measured step" in words(pages["training"])
    store.close()


def test_findings_are_listed_at_the_step_that_was_stored_with_them(store, make_run):
    finding = replace(judge(analyze(make_run("residual", layers=5)), passed=True)[0], severity=Severity.WARN)
    worse = replace(finding, severity=Severity.FAIL)
    store.note([{"step": step, **found.as_dict()} for step, found in ((4, finding), (9, worse))])
    listed = words(opened(store))
    assert "one finding, from step 4 on" in listed
    assert re.search(r"from step 4\b.*not at the last step", listed)


def test_a_run_without_a_history_says_how_to_record_one(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(run_library, "_roots", [])
    save_run(make_run("residual", layers=2), tmp_path / "plain.zarr.zip")
    test = open_page("training", [tmp_path])
    assert "one measured step" in words(test)
    assert "ds.record" in words(test)


def test_a_saved_copy_shows_the_same_history(store, tmp_path):
    store.finish()
    live = numbers(heat_map(opened(store, measures="residual_norm"))["customdata"])
    (tmp_path / "copies").mkdir()
    with schema.open_run(store.path) as run:
        save_run(run, tmp_path / "copies" / "copy.zarr.zip")
    test = open_page("training", [tmp_path / "copies"], measures="residual_norm")
    np.testing.assert_array_equal(numbers(heat_map(test)["customdata"]), live)
    assert "ended" not in words(test)


def test_silence_is_seen_and_a_store_of_another_machine_ends(store):
    status = LiveRows(store.path).status()
    states = {
        seconds: live_state(replace(status, age_seconds=seconds, state="unknown"))
        for seconds in (2.0, 300.0, 900.0)
    }
    assert states[2.0].words.startswith("step 19, 2 s ago, written on ")
    assert [state.colour for state in states.values()] == ["green", "orange", "orange"]
    assert [state.is_growing for state in states.values()] == [True, True, False]
    assert live_state(replace(status, age_seconds=900.0)).is_growing
    assert live_state(replace(status, age_seconds=1.0, state="killed")).colour == "red"


def test_a_resumed_training_shows_where_and_forgets_what_it_superseded(store):
    store.close()
    resumed = begin(store.path, None, resume=True)
    add(resumed, 10, 6)
    test = opened(resumed)
    assert "resumed at step 10" in words(test)
    assert numbers(heat_map(test)["z"]).shape == (6, 11)
    shapes = json.loads(charts(test)["training"]["figure"])["layout"]["shapes"]
    assert [shape["x0"] for shape in shapes] == [10]
    resumed.close()


def test_the_microscope_follows_the_last_step(store):
    test = open_page("microscope", [store.path.parent])
    assert "Numbers of step 19" in words(test)
    add(store, 20, 6)
    growing_runs._rest["until"] = 0.0
    test.run()
    assert "Numbers of step 20" in words(test)
    store.finish()
    store.close()
    test.run()
    assert "Numbers of step" not in words(test)
