"""Do picture, declaration and judge use one limit? What is drawn is what `judge` compares with, in its units."""

import numpy as np
import pytest

from depthscope import CATALOGUE, diagnostics
from depthscope.app.figures import FIGURES, Lines
from depthscope.app.figures.build.curve_figure import judged_limits, passing_range
from depthscope.diagnostics.verdicts import VERDICTS, last_step
from tests.diagnostics.state_runs import run_of, walk


@pytest.fixture(scope="module")
def analyses(whole, hc_run, mhc_run):
    return {**whole, "hc": diagnostics.analyze(hc_run), "small": diagnostics.analyze(mhc_run)}


def test_a_declared_healthy_range_is_what_no_verdict_reports(analyses):
    judged = {
        name: {passing_range({"run": limits}) for limits in judged_limits(name, analyses).values()}
        for name, metric in CATALOGUE.items()
        if metric.healthy is not None
    }
    unjudged = {name for name, ranges in judged.items() if not ranges}
    # Which networks of several claim to be doubly stochastic, or come with updates, is theirs. Of matrices a number made
    # of the metric is judged, by one limit for free and constrained ones, so that the picture of the metric has no line.
    assert unjudged <= {
        "mixing_gain",
        "identity_distance",
        "doubly_stochastic_violation",
        "update_ratio",
        "mixing_singular_value",
        "composite_singular_value",
        "closest_stream_cosine",
    }
    for name in set(judged) - unjudged:
        healthy = CATALOGUE[name].healthy
        low = -np.inf if healthy.low is None else healthy.low
        high = np.inf if healthy.high is None else healthy.high
        assert (low, high) in judged[name], name


def test_a_finding_on_a_drawn_metric_has_its_limit_in_the_figure(analyses):
    compared = 0
    for run, analysis in analyses.items():
        for finding in diagnostics.judge(analysis, passed=True):
            profiles = VERDICTS[finding.verdict].profiles(last_step(analysis))
            if finding.metric not in FIGURES or finding.metric not in {each.metric for each in profiles}:
                continue
            figure = FIGURES[finding.metric].build({run: analysis})
            if isinstance(figure, Lines):
                drawn = {float(line.y[0]) for line in figure.lines if line.role == "threshold"}
                assert finding.threshold in drawn, finding.verdict
                compared += 1
    assert compared > 10


def test_the_picture_of_the_backward_gain_contradicts_no_verdict():
    """A Pre-LN network has 120 × the gradient at its embedding, whose states are as much smaller: nothing explodes."""
    size = np.linspace(1.0, 120.0, 9)[:, None, None, None]
    analysis = diagnostics.analyze(run_of(walk(8) * size, walk(8, seed=1) / size))
    assert float(analysis["backward_gain"].max()) > 30
    assert not {"exploding_gradient", "vanishing_gradient"} & {
        each.verdict for each in diagnostics.judge(analysis)
    }
    figure = FIGURES["backward_gain"].build({"run": analysis})
    assert figure.healthy is None
    assert not [line for line in figure.lines if line.role == "threshold"]
    assert "Pre-LN" in figure.caption


def test_a_network_that_is_judged_by_another_number_has_no_line(make_run):
    """Free matrices are judged relative to what they may leave; a picture said 0.5 of all."""
    free, constrained = (diagnostics.analyze(make_run(kind)) for kind in ("hc", "mhc"))

    def drawn(analysis):
        lines = FIGURES["composite_attenuation"].build({"run": analysis}).lines
        return {float(line.y[0]) for line in lines if line.role == "threshold"}

    assert drawn(constrained) == {0.5, 0.05}
    assert drawn(free) == set()
    both = FIGURES["composite_attenuation"].build({"free": free, "constrained": constrained})
    assert both.healthy is None
