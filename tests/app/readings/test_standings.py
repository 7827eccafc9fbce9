"""What was not judged has not passed, and a run in which nothing could be judged fails."""

import re

from depthscope.app.readings.readings import read_runs
from depthscope.app.readings.standings import DOES_NOT_APPLY, NOT_JUDGED, by_reason, counts_words, standings
from depthscope.diagnostics.verdicts import VERDICTS


def test_every_verdict_has_a_state_and_one_that_could_not_look_says_why(make_run):
    (reading,) = read_runs({"a": make_run("residual", gradients=False)})
    found = standings(reading)
    assert list(found) == list(VERDICTS)
    assert found["same_representation"].state == "PASS"
    assert found["vanishing_gradient"].state == NOT_JUDGED
    assert "gradient" in found["vanishing_gradient"].reason
    assert "one" in found["stream_collapse"].reason
    assert sorted(name for names in by_reason(found, NOT_JUDGED).values() for name in names) == sorted(
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
        assert sum(map(int, re.findall(r"\d+", counts_words(found)))) == len(VERDICTS)
