"""Every figure of `app/figures/catalogue.py` is defined once; every other metric has a default one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from depthscope.app.figures import DEFINED, DRAWN, FIGURES, NOT_DRAWN, Heatmap, Lines, catalogue
from depthscope.app.figures.build.curve_figure import default_figure, default_figures, undrawn_dims
from depthscope.diagnostics import CATALOGUE
from depthscope.diagnostics.verdicts import VERDICTS

# Of every metric, also of those with a figure of their own, which FIGURES has in its place.
DEFAULTS = {
    kind.name: kind
    for kind in default_figures(
        [metric for name, metric in CATALOGUE.items() if name not in NOT_DRAWN], tuple(DEFINED.values())
    )
}


def test_every_figure_has_the_name_that_it_is_defined_under():
    assert all(getattr(catalogue, name) is kind for name, kind in DEFINED.items())
    assert all(name == kind.name for name, kind in FIGURES.items())
    assert list(FIGURES)[: len(DEFINED)] == list(DEFINED)


def test_a_figure_draws_metrics_of_the_catalogue():
    unknown = {kind.name: {*kind.needs, *kind.also} - set(CATALOGUE) for kind in FIGURES.values()}
    assert not {name: names for name, names in unknown.items() if names}


def undrawn(metrics):
    """The advice of `default_figure` for each metric that it can't draw."""
    advice = []
    for metric in metrics:
        if undrawn_dims(metric):
            with pytest.raises(ValueError, match=metric.name) as refused:
                default_figure(metric, "")
            advice.append(str(refused.value))
    return advice


def test_every_metric_without_a_defined_figure_can_have_a_default_one():
    advice = undrawn(metric for name, metric in CATALOGUE.items() if name not in DRAWN | set(NOT_DRAWN))
    assert not advice, "\n".join(advice)


def test_every_metric_is_drawn_by_a_defined_figure_or_by_a_default_one_or_has_a_reason():
    drawn = {name for kind in FIGURES.values() for name in (*kind.needs, *kind.also)}
    assert set(CATALOGUE) - drawn == set(NOT_DRAWN)
    assert set(FIGURES) - set(DEFINED) == set(CATALOGUE) - DRAWN - set(NOT_DRAWN)


def test_a_declaration_is_enough_for_a_figure(whole):
    """Metrics that have a figure of their own would be drawn without it too."""
    for name in DEFAULTS:
        kind, metric = DEFAULTS[name], CATALOGUE[name]
        figure = kind.build(whole)
        assert figure.metric == figure.name == name
        assert metric.title in figure.title
        assert any(character.isdigit() for character in figure.alt)
        assert isinstance(figure, Heatmap) == (metric.pairwise or bool({"order", "head"} & set(metric.dims)))
        measured = [figure.z] if isinstance(figure, Heatmap) else [line.y for line in figure.lines]
        assert any(np.isfinite(values).any() for values in measured)


@pytest.mark.parametrize("name", sorted(set(DEFINED) & set(DEFAULTS)))
def test_a_default_figure_shows_the_numbers_of_the_defined_one(name, whole):
    mine, default = DEFINED[name].build(whole), DEFAULTS[name].build(whole)
    if isinstance(mine, Heatmap):
        assert isinstance(default, Heatmap)
        # A definition may put the other axis across.
        assert default.z.shape in (mine.z.shape, mine.z.shape[::-1])
        return
    assert isinstance(default, Lines)
    # Lines that a definition adds to the metric: the default figure shows its numbers only.
    added = ("initialisation and weight decay alone",)
    mine_y, default_y = (
        [line.y for line in of.lines if line.role == "measured" and not line.label.endswith(added)]
        for of in (mine, default)
    )
    for values, expected in zip(default_y, mine_y, strict=True):
        np.testing.assert_array_equal(values, expected)
    assert default.log_y == mine.log_y


def test_a_metric_that_no_figure_can_draw_is_left_out_of_the_default_ones():
    """FIGURES is built when the app is imported: one such metric must not take the command line down."""
    undrawable = replace(CATALOGUE["composite_operator_gain"], dims=("kind", "norm", "connection"))
    kinds = default_figures([undrawable, CATALOGUE["mixing_gain"]], tuple(DEFINED.values()))
    assert [kind.name for kind in kinds] == ["mixing_gain"]
    (advice,) = undrawn([undrawable, CATALOGUE["mixing_gain"]])
    assert advice.endswith("define one in app/figures/catalogue.py")


@pytest.mark.parametrize("name", [name for name, kind in DEFINED.items() if getattr(kind, "thresholds", ())])
def test_thresholds_are_the_limits_of_the_verdicts_on_the_metric(name):
    """Where a verdict judges the metric; 1 is the reference of gains."""
    limits = [verdict.limits for verdict in VERDICTS.values() if verdict.metric == DEFINED[name].metric]
    levels = {level for limit in limits for _, level in limit.levels}
    drawn = {value for value, _ in DEFINED[name].thresholds}
    assert not levels or drawn - {1.0} <= levels
