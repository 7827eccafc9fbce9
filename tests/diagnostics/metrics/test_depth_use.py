"""Turn of the steps and effective depth: closed forms, and a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from depthscope.diagnostics import Severity
from tests.diagnostics.state_runs import run_of

NAMES = ("relative_turn", "effective_depth")


def measured(run):
    analysis = diagnostics.analyze(run, metrics=NAMES)
    return {name: analysis[name].isel(step=0).sel(stream="mean").values for name in NAMES}, analysis


def orthogonal(count, sizes=None):
    """States that are sums of orthogonal parts, the same for every token."""
    parts = np.eye(count + 1) * np.r_[1.0, np.ones(count) if sizes is None else sizes][:, None]
    return np.broadcast_to(np.cumsum(parts, axis=0)[:, None, None], (count + 1, 2, 3, count + 1))


def test_orthogonal_branches_of_one_size_lie_on_the_law():
    found, _ = measured(run_of(orthogonal(10)))
    np.testing.assert_allclose(found["relative_turn"][1:], 1.0, rtol=1e-6)
    assert np.isnan(found["relative_turn"][0])
    np.testing.assert_allclose(found["effective_depth"], np.arange(11), rtol=1e-6)


def test_states_that_only_grow_have_no_depth():
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 8))
    found, _ = measured(run_of(2.0 ** np.arange(6)[:, None, None, None] * x))
    assert np.isnan(
        found["relative_turn"]
    ).all()  # nothing is added across the state: no size to compare with
    assert (found["effective_depth"] < 1e-6).all()


def test_a_loop_over_tokens_gives_the_same():
    rng = np.random.default_rng(3)
    states = np.cumsum(rng.standard_normal((7, 3, 4, 6)), axis=0).astype(np.float32)
    sites = ["embed", "mid", "post", "pre", "mid", "post", "final"]
    mask = np.ones((3, 4), bool)
    mask[1, 2:] = False
    states[:, 1, 2:] = np.nan  # padding may contain anything
    found, analysis = measured(run_of(states, sites=sites, mask=mask))
    steps = [1, 2, 4, 5]
    turns = np.full((7, 3), np.nan)
    counts = np.zeros((7, 3))
    for sequence in range(3):
        angles, laws = np.zeros(7), np.zeros(7)
        tokens = [token for token in range(4) if mask[sequence, token]]
        for token in tokens:
            x = states[:, sequence, token].astype(float)
            across = []
            for depth in steps:
                b, unit = x[depth] - x[depth - 1], x[depth - 1] / np.linalg.norm(x[depth - 1])
                across.append(np.sum((b - b @ unit * unit) ** 2))
            for number, depth in enumerate(steps):
                cosine = x[depth] @ x[depth - 1] / np.linalg.norm(x[depth]) / np.linalg.norm(x[depth - 1])
                angles[depth] += np.arccos(cosine)
                laws[depth] += np.arctan(np.sqrt(np.mean(across) / (x[0] @ x[0] + number * np.mean(across))))
        turns[steps, sequence] = angles[steps] / laws[steps]
        equal = np.arctan(1 / np.sqrt([1, 2, 3, 4]))
        counts[steps, sequence] = np.minimum(angles[steps] / len(tokens) / equal, 1)
    np.testing.assert_allclose(found["relative_turn"], turns.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found["effective_depth"], np.cumsum(counts, axis=0).mean(1), rtol=1e-5)
    np.testing.assert_allclose(
        analysis["relative_turn_stderr"].isel(step=0, depth=1).item(),
        turns[1].std(ddof=1) / 3**0.5,
        rtol=1e-5,
    )


def independent(sizes):
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((len(sizes), 4, 24, 48)) * np.asarray(sizes)[:, None, None, None]
    return np.cumsum(parts, axis=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_relative_turn_is_of_the_branches_among_themselves(scale):
    """Small branches at the start of training, or large ones, are no curse: other verdicts judge their size."""
    analysis = diagnostics.analyze(run_of(independent([1.0, *[scale] * 12])), metrics=NAMES)
    late = analysis["relative_turn"].isel(step=0, stream=0, depth=slice(2, None))
    assert float(late.min()) > 0.8


def test_a_network_that_hardly_turns_its_state_has_no_effective_depth():
    """14.6 of 16 steps beside a FAIL which says that all layers hold one representation."""
    states = independent([1.0, *[1e-4] * 16])
    analysis = diagnostics.analyze(run_of(states))
    whole = analysis["angular_distance"].sel(tokens="all").isel(step=0, depth=-1, other_depth=0)
    assert 180.0 * float(whole) < 0.05  # degrees
    reached = analysis["effective_depth"].isel(step=0, stream=0)
    assert float(reached[-1]) < 0.01
    found = {each.verdict: each for each in diagnostics.judge(analysis.assign_coords(step=[1000]))}
    assert found["same_representation"].severity is Severity.WARN  # without labels it is suspected
    # The same steps of the size of the first state reach nearly all of the depth, larger ones all but the last of it.
    for size, least in ((1.0, 15.0), (30.0, 14.0)):
        other = diagnostics.analyze(run_of(independent([1.0, *[size] * 16])), metrics=NAMES)
        assert least < float(other["effective_depth"].isel(step=0, stream=0, depth=-1)) <= 16.0
