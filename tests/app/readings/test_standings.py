"""What was not judged has not passed, and a run in which nothing could be judged fails."""

import numpy as np
import pytest

from depthscope.app.readings.readings import read_runs
from depthscope.app.readings.standings import DOES_NOT_APPLY, NOT_JUDGED, counts_of, not_judged, standings
from depthscope.diagnostics import analyze, judge, schema
from depthscope.diagnostics.verdicts import VERDICTS


def with_states(run, change):
    trace = run["trace"].to_dataset().load().copy(deep=True)
    change(trace)
    return schema.create_run(trace, attrs=run.attrs)


def test_every_verdict_has_a_state_and_one_that_could_not_look_says_why(make_run):
    (reading,) = read_runs({"a": make_run("residual", gradients=False)})
    found = standings(reading)
    assert list(found) == list(VERDICTS)
    assert found["same_representation"].state == "PASS"
    assert found["vanishing_gradient"].state == NOT_JUDGED
    assert "gradient" in found["vanishing_gradient"].reason
    assert "one" in found["stream_collapse"].reason
    assert sorted(name for names in not_judged(found).values() for name in names) == sorted(
        name for name, standing in found.items() if standing.state == NOT_JUDGED
    )


def test_what_has_no_meaning_for_a_network_does_not_apply_and_is_not_called_not_judged(make_run):
    plain, free, mhc = (
        standings(reading)
        for reading in read_runs({name: make_run(name) for name in ("residual", "hc", "mhc")})
    )
    for name in ("stream_collapse", "gain_explosion", "transposed_mixing", "copied_streams", "unused_stream"):
        assert plain[name].state == DOES_NOT_APPLY, name
        assert mhc[name].state != DOES_NOT_APPLY, name
    # Free matrices claim no sums.
    assert free["sinkhorn_not_converged"].state == DOES_NOT_APPLY
    assert mhc["sinkhorn_not_converged"].state not in (DOES_NOT_APPLY, NOT_JUDGED)
    for found in (plain, free, mhc):
        assert sum(counts_of(found.values()).values()) == len(VERDICTS)


def test_a_finding_stands_with_its_severity(make_run):
    (reading,) = read_runs({"a": make_run("mhc")})
    found = standings(reading)
    for finding in reading.findings:
        assert found[finding.verdict].finding.severity >= finding.severity


@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_without_a_real_token_nothing_was_measured_and_the_run_fails(make_run, family):
    def no_token(trace):
        trace["mask"].values[:] = False

    findings = judge(analyze(with_states(make_run(family), no_token)))
    assert [(finding.verdict, finding.severity.name) for finding in findings] == [
        ("nothing_measured", "FAIL")
    ]
    assert "leaves no token" in findings[0].sentence


@pytest.mark.parametrize("family", ["residual", "mhc"])
def test_states_that_are_not_numbers_fail(make_run, family):
    def not_a_number(trace):
        trace["residual"].values[:] = np.nan

    findings = judge(analyze(with_states(make_run(family), not_a_number)))
    assert "FAIL" in {finding.severity.name for finding in findings}


def test_a_healthy_run_has_been_measured(make_run):
    assert "nothing_measured" not in {finding.verdict for finding in judge(analyze(make_run("residual")))}
