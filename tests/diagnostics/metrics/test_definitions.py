"""Numbers that an earlier version stored under another definition are not read as today's."""

import numpy as np

from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import analyze, judge, schema
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.schema import COMPLETE


def stored_by_an_earlier_version(run):
    """A run whose stored deflated gains are logarithms, as before."""
    analysis = analyze(run)
    with np.errstate(divide="ignore"):
        logarithm = np.log10(analysis["deflated_gain"])
    earlier = analysis.assign(
        deflated_gain=logarithm.assign_attrs(
            analysis["deflated_gain"].attrs | {"symbol": r"\log_{10} \sigma_1(P|_{1^\perp})"}
        )
    )
    earlier = earlier.assign_attrs({COMPLETE: True})
    return analysis, schema.create_run(run["trace"].to_dataset(), metrics=earlier, attrs=run.attrs)


def test_another_definition_is_computed_again_where_there_are_states(mhc_run):
    analysis, run = stored_by_an_earlier_version(mhc_run)
    (reading,) = read_runs({"a": run})
    np.testing.assert_allclose(reading.analysis["deflated_gain"], analysis["deflated_gain"])
    assert reading.analysis["deflated_gain"].attrs["symbol"] == CATALOGUE["deflated_gain"].symbol


def test_without_states_it_is_left_out_with_the_reason(mhc_run):
    _, run = stored_by_an_earlier_version(mhc_run)
    run = schema.create_run(metrics=run["metrics"].to_dataset(), attrs=run.attrs)
    (reading,) = read_runs({"a": run})
    assert "deflated_gain" not in reading.analysis
    assert "earlier version" in reading.analysis.attrs["not_computed"]["deflated_gain"]
    assert "composite_gain" in reading.analysis


def test_judge_takes_no_logarithm_for_a_share(mhc_run):
    """A gain of −0.5 was «below 0.01» at the first connection: FAIL of a network that passes."""
    analysis, run = stored_by_an_earlier_version(mhc_run)
    stored = run["metrics"].to_dataset()
    earlier = stored["deflated_gain"].attrs
    stored["relative_deflated_gain"] = stored["deflated_gain"].assign_attrs(earlier)
    assert not {"stream_collapse"} & {each.verdict for each in judge(stored, passed=True)}
    assert "stream_collapse" in {each.verdict for each in judge(analysis, passed=True)}
