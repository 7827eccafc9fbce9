"""Do limits that cite the calibration lie beyond what 99 % of its healthy networks have?"""

from __future__ import annotations

import pytest

from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.calibration import DEFAULT, FEWEST, calibration, source_of

MEASURED = calibration()["verdicts"]
CITING = [name for name, verdict in VERDICTS.items() if verdict.limits.source.startswith("calibrated on")]


@pytest.mark.parametrize("name", CITING)
def test_a_limit_that_cites_the_calibration_is_beyond_its_quantile(name):
    limits, row = VERDICTS[name].limits, MEASURED[name]
    mildest, quantile = limits.levels[0][1], row["shares"]["0.99"]
    assert row["bad"] == ("above" if limits.above else "below")
    assert mildest > quantile if limits.above else mildest < quantile
    assert row["networks"] >= FEWEST
    assert f"on {row['networks']} healthy networks of {row['of_kinds']} kinds" in limits.source


def test_limits_that_the_calibration_supports_cite_it():
    assert {"exploding_gradient", "rank_collapse", "common_vector"} <= set(CITING)


def test_a_limit_that_healthy_networks_cross_does_not_cite_it():
    quantile = MEASURED["common_vector"]["shares"]["0.99"]
    assert source_of("common_vector", mildest=quantile, above=True) == DEFAULT
    assert source_of("of no network", mildest=0.0, above=True) == DEFAULT
