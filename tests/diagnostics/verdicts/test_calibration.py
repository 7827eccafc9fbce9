"""Do limits that cite the healthy networks lie by the margin beyond what 99 % of them have?"""

from __future__ import annotations

import math

import pytest

from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.calibration import (
    DEFAULT,
    FEWEST,
    MARGIN,
    as_far,
    healthy_networks,
    healthy_values,
    limit_with_margin,
    source_of,
)

CITING = [
    name
    for name, verdict in VERDICTS.items()
    if verdict.limits.source.startswith("set by hand, not contradicted by")
]


@pytest.mark.parametrize("name", CITING)
def test_a_limit_that_cites_the_networks_is_beyond_their_quantile(name):
    limits, values = VERDICTS[name].limits, healthy_values(name)
    beyond = [
        value
        for value in values
        if limits.beyond(value * (1 / MARGIN if limits.above else MARGIN), limits.levels[0][1])
    ]
    assert len(beyond) <= 0.01 * len(values)
    assert len(values) >= FEWEST
    assert f"not contradicted by {len(values)} healthy networks of" in limits.source


def test_a_limit_that_healthy_networks_cross_does_not_cite_them():
    limit = limit_with_margin(healthy_values("exploding_state"), above=True)
    assert source_of("exploding_state", mildest=limit, above=True) != DEFAULT
    assert source_of("exploding_state", mildest=0.99 * limit, above=True) == DEFAULT
    assert source_of("of no network", mildest=0.0, above=True) == DEFAULT


def test_the_margin_is_on_the_side_of_the_limit():
    values = tuple(float(n) for n in range(1, 101))
    assert limit_with_margin(values, above=True) == 99 * MARGIN
    assert limit_with_margin(values, above=False) == 2 / MARGIN
    assert math.isnan(limit_with_margin(values[: FEWEST - 1], above=True))


def test_only_trained_networks_count_and_a_kind_can_be_left_out():
    assert all(int(row["steps"]) > 0 for row in healthy_networks())
    kind = healthy_networks()[0]["kind"]
    of_kind = [row for row in healthy_networks() if row["kind"] == kind]
    assert len(healthy_values("exploding_state", without=kind)) == len(
        healthy_values("exploding_state")
    ) - len(of_kind)


def test_a_finding_says_how_many_healthy_networks_look_like_it():
    values = healthy_values("exploding_state")
    if len(values) >= FEWEST:
        assert (
            as_far("exploding_state", 2 * values[-1], above=True)
            == f" None of {len(values)} healthy networks look like this."
        )
        assert (
            as_far("exploding_state", values[-1], above=True)
            == f" 1 of {len(values)} healthy networks looks like this."
        )
    assert as_far("of no network", 1.0, above=True) == ""
