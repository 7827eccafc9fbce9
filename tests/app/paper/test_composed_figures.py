"""The composed figures: every panel that the runs can feed, lettered, one colour a run, on axes of one's own too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure as Canvas

import depthscope
from depthscope.app.drawing.matplotlib import Width, write_figure
from depthscope.app.figures import FIGURES
from depthscope.app.figures.composed import QUESTIONS, compose
from depthscope.app.paper import figures
from depthscope.app.readings.readings import judged, read_runs
from tests.app.drawing.test_fitting import problems_of

STREAMS = ("gains", "mixing", "kernel")
LONG = {"plain": "plain", "hc": "hc-1e-3", "mhc": "mhc-seed-0-with-a-long-name"}


@pytest.fixture(scope="module")
def runs(make_run):
    return {
        "plain": make_run("residual", layers=2),
        "hc": make_run("hc", layers=2),
        "mhc": make_run("mhc", layers=2),
    }


@pytest.fixture(scope="module")
def readings(runs):
    return read_runs(runs)


def test_every_figure_has_a_function_and_a_name_of_its_own():
    assert set(QUESTIONS) == set(figures.__all__) - {"measure", "numbers", "panels", "table"}
    assert not set(QUESTIONS) & set(FIGURES)
    assert depthscope.figures is figures


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name != "training"])
def test_panels_are_lettered_and_no_text_lies_over_another_one(runs, readings, name, monkeypatch):
    # Matrices are in the runs themselves; the other figures need no second analysis.
    alone = {LONG["mhc"]: runs["mhc"]}
    named = [replace(reading, name=LONG[reading.name]) for reading in readings]
    shown = alone if name in ("mixing", "spectra") else named
    canvas = getattr(figures, name)(shown, venue="neurips")  # the narrowest
    keys = list(figures.panels(name, shown))
    panels = [axes for axes in canvas.axes if axes.get_label() in keys]
    assert [axes.get_label() for axes in panels] == keys
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [title[:3] for title in titles] == [f"({chr(97 + i)})" for i in range(len(keys))]
    assert problems_of(canvas, monkeypatch) == ([], [])
    lowest = min(axes.get_tightbbox().y0 for axes in panels)
    for legend in canvas.legends:
        assert legend.get_window_extent().y1 <= lowest + 1
    assert all(axes.get_legend() is None for axes in panels)
    sizes = [
        text.get_fontsize() for axes in canvas.axes for text in axes.findobj(lambda a: hasattr(a, "get_text"))
    ]
    assert min(sizes) >= 7


def test_what_a_run_lacks_is_left_out_with_a_reason(readings):
    plain = readings[:1]
    assert list(figures.panels("collapse", plain))[-1] == "dong_residual"
    figure = compose("collapse", plain)
    assert set(figure.left_out) == {"cosine between streams"}
    assert all(figure.left_out.values())
    for name in STREAMS:
        with pytest.raises(ValueError, match=f"{name} has no panel of plain"):
            getattr(figures, name)(plain)


def test_own_axes_are_filled_and_returned(readings):
    mhc = readings[2]
    canvas = Canvas()
    first, second = canvas.subplots(1, 2)
    given = figures.gains([mhc], axes={"composite_forward": first, "single_forward": second})
    assert given == {"composite_forward": first, "single_forward": second}
    assert second.get_title(loc="left") == "(a) single, forward"
    assert first.get_title(loc="left") == "(b) composite, forward"
    gain = mhc.analysis["composite_gain"].sel(direction="forward", reduction="mean").isel(step=0)
    drawn = next(line for line in first.lines if line.get_label() == "mhc")
    np.testing.assert_array_equal(drawn.get_ydata(), gain)
    assert next(text.get_text() for text in first.get_legend().get_texts()) == "mhc"
    grid = Canvas().subplots(2, 3)
    assert list(figures.collapse([mhc], axes=grid)) == list(figures.panels("collapse", [mhc]))


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"nothing": 0}, "no panel 'nothing'"),
        ([0, 1], "2 axes for the 4 panels"),
        (list(range(9)), "9 axes for"),
    ],
)
def test_axes_that_do_not_fit_are_refused(readings, axes, words):
    with pytest.raises(ValueError, match=words):
        figures.gains(readings[2:], axes=axes)


def test_matrices_have_the_sums_of_rows_and_columns(runs):
    canvas = figures.mixing(runs["hc"])
    axes = next(axes for axes in canvas.axes if axes.get_label() == "h0")
    h = runs["hc"]["trace"].to_dataset()["h_res"].isel(connection=0)
    mean = h.values[runs["hc"]["trace"]["mask"].values].astype(float).mean(axis=0)
    canvas.draw_without_rendering()
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{v:.2f}" for v in mean.sum(axis=0)]
    right = axes.child_axes[0]
    assert [text.get_text() for text in right.get_yticklabels()] == [f"{v:.2f}" for v in mean.sum(axis=1)]
    cells = [text.get_text() for text in axes.texts]
    assert cells == [f"{v:.2f}".replace("-0.00", "0.00").replace("-", "−") for v in mean.ravel()]


def _measured(family, run, seed):
    """A reading of the one metric that is needed."""
    analysis = depthscope.analyze(run, metrics=["stream_cosine"])
    name = f"{family}{seed}"
    return judged(name, {"family": family}, analysis, chain="", path="", results={})


def test_groups_are_means_with_bands(make_run):
    readings = [
        _measured(family, make_run(family, layers=2, seed=seed), seed)
        for family in ("hc", "mhc")
        for seed in range(4)
    ]
    figure = compose("collapse", readings, by="family")
    assert list(figure.runs) == ["hc", "mhc"]
    assert len(set(figure.runs.values())) == 2
    panel = next(panel for panel in figure.panels if panel.key == "streams")
    line = next(line for line in panel.content.lines if line.role == "measured" and line.group == "hc")
    values = np.stack([r.analysis["stream_cosine"].values[0] for r in readings if r.name.startswith("hc")])
    np.testing.assert_allclose(line.y, values.mean(axis=0))
    half = 3.182446 * values.std(axis=0, ddof=1) / 2  # Student's t with 3 degrees
    np.testing.assert_allclose(line.error, half, rtol=1e-6, atol=1e-15)
    with pytest.raises(ValueError, match="has no attribute 'colour'"):
        compose("collapse", readings, by="colour")


def test_training_has_steps_and_marks(make_run):
    analysis = depthscope.analyze(make_run("mhc", layers=2))
    later = analysis.assign_coords(step=[10])
    later["composite_gain"] = (1e3 * later["composite_gain"]).assign_attrs(analysis["composite_gain"].attrs)
    history = xr.concat(
        [analysis, later], "step", data_vars="different", coords="different", compat="equals", join="exact"
    ).assign_attrs(analysis.attrs)
    history["loss"] = ("step", [2.0, 1.0])
    history.attrs["findings"] = [{"step": 10, **found.as_dict()} for found in depthscope.judge(later)]
    canvas = figures.training(history)
    keys = [axes.get_label() for axes in canvas.axes]
    assert {"loss", "residual_norm", "gradient_norm"} <= set(keys)
    loss = canvas.axes[keys.index("loss")]
    marked = [tuple(line.get_xydata()[0]) for line in loss.lines if line.get_marker() == "v"]
    assert (10.0, 1.0) in marked


def test_bytes_are_the_same_again(readings, tmp_path):
    figure = compose("gains", readings)
    for name in ("a", "b"):
        write_figure(figure, tmp_path / f"{name}.pdf", width=Width(6.75, 8))
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
