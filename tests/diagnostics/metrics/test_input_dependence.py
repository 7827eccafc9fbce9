"""Does a state depend on the sequence? Against constructions whose shares are known."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from tests.diagnostics.state_runs import run_of, walk


def measured(states, name):
    return diagnostics.analyze(run_of(states), metrics=name)[name].isel(step=0).sel(stream="mean").values


def test_the_share_between_sequences():
    states = walk(4)
    states[3] = states[3][:1]  # one sequence for all
    states[4] = states[4][:, :1]  # one token at every position
    share = measured(states, "sequence_share")
    assert share[1] == pytest.approx(2 / 3, abs=0.1)  # of three independent sequences, about their mean
    assert share[3] == pytest.approx(0.0, abs=1e-12)
    assert share[4] == pytest.approx(1.0)


def test_padding_and_a_huge_token_do_not_count():
    states = walk(2)
    run = run_of(states)
    expected = diagnostics.analyze(run, metrics="sequence_share")["sequence_share"].values
    huge = states.copy()
    huge[:, 0, 0] *= 1e6  # the same directions
    found = diagnostics.analyze(run_of(huge), metrics="sequence_share")["sequence_share"].values
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    padded = run["trace"].to_dataset().load().copy(deep=True)
    padded["mask"].values[:, 20:] = False
    other = padded.copy(deep=True)
    other["residual"].values[:, :, 20:] = 7.0
    values = [
        diagnostics.analyze(diagnostics.create_run(each, attrs=run.attrs), metrics="sequence_share")[
            "sequence_share"
        ].values
        for each in (padded, other)
    ]
    np.testing.assert_allclose(*values)
