"""What weight decay alone makes of initial logits, against closed forms; kept with a run in every format."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from depthscope import diagnostics
from depthscope.diagnostics import Severity, schema
from depthscope.diagnostics.metrics.replay import initial_distance, replayed_deflated_gain

TWO = np.tile(
    [[3.0, 0.0], [0.0, 3.0]], (4, 1, 1)
)  # both sums of exp are equal: one softmax is doubly stochastic
DISTANCES = ("initial_distance", "replayed_deflated_gain")


def kept(share: float) -> float:
    """|λ₂| of the matrix of ``share`` times `TWO`: (e^x − 1)/(e^x + 1) of x = 3 share."""
    return float(np.tanh(3.0 * share / 2))


@pytest.fixture(scope="module")
def run_of(make_run):
    """A factory of mHC runs of two streams whose matrices are those of ``share`` times `TWO`."""

    def build(share: float, **attrs):
        run = make_run(
            "mhc", layers=2, streams=2, samples=2, tokens=6, features=8, gradients=False, weights=False
        )
        trace = run["trace"].to_dataset().load().drop_vars("initial_logits", errors="ignore")
        low, high = (1 - kept(share)) / 2, (1 + kept(share)) / 2
        trace["h_res"].values[:] = [[high, low], [low, high]]
        return schema.create_run(trace, attrs=dict(run.attrs) | attrs)

    return build


def measured(run, name):
    return diagnostics.analyze(run, metrics=[name])[name].isel(step=0)


# --- what is left of a weight ---


def test_a_decay_is_the_product_of_the_steps():
    assert diagnostics.decay_factor(0.5, weight_decay=0.2, steps=3) == pytest.approx(0.9**3)
    rates = [0.1, 0.2, 0.0]
    assert diagnostics.decay_factor(rates, weight_decay=0.5) == pytest.approx(0.95 * 0.9)
    assert diagnostics.decay_factor(0.1, weight_decay=0.0, steps=10**6) == 1.0
    assert diagnostics.decay_factor(0.1, weight_decay=0.5, steps=0) == 1.0


@pytest.mark.parametrize(
    ("rate", "decay", "steps", "words"),
    [
        (0.1, 0.1, None, "one learning rate"),
        ([0.1, 0.2], 0.1, 2, "a schedule"),
        ([], 0.1, None, r"shape \(0,\) .* expected one rate or a schedule of a step or more"),
        ([[0.1], [0.2]], 0.1, None, r"learning_rate has shape \(2, 1\)"),
        (0.1, [0.1, 0.2], 2, r"weight_decay \(2,\); expected .* one weight decay"),
        (0.1, 0.1, 2.5, r"steps is 2\.5; expected a whole number"),
        (np.nan, 0.1, 2, "learning_rate is nan; expected a finite number"),
        (0.1, np.nan, 2, "weight_decay is nan; expected a finite number"),
        (0.1j, 0.1, 2, "learning_rate has dtype complex128; expected real numbers"),
        (0.1, "0.1", 2, "weight_decay has dtype .*; expected real numbers: give numbers only"),
        (0.1, 0.1, -1, "steps is -1"),
        (2.0, 0.5, 1, "share of 1"),
        (0.1, -0.5, 1, "share of -0.05"),
    ],
)
def test_a_decay_that_is_none_is_refused(rate, decay, steps, words):
    with pytest.raises(ValueError, match=words):
        diagnostics.decay_factor(rate, weight_decay=decay, steps=steps)


# --- the metrics ---


def test_the_replay_against_closed_forms(run_of):
    run = diagnostics.with_replay(run_of(0.5), TWO, decay=0.25)
    left = measured(run, "replayed_deflated_gain")
    np.testing.assert_allclose(left, kept(0.25) ** np.arange(1, 5), rtol=1e-12)
    # H = ½(1 + k) I + ½(1 − k) swap: ‖H − H'‖_F/√2 = |k − k'|/√2
    apart = measured(run, "initial_distance").sel(reduction="median")
    np.testing.assert_allclose(apart, abs(kept(0.5) - kept(1.0)) / 2**0.5, rtol=1e-6)


def test_constants_in_rows_and_columns_change_nothing(run_of):
    rng = np.random.default_rng(0)
    moved = TWO + 5 * rng.standard_normal((4, 2, 1)) + 5 * rng.standard_normal((4, 1, 2))
    plain, shifted = (
        diagnostics.with_replay(run_of(0.5), logits, decay=0.5, sinkhorn_steps=50) for logits in (TWO, moved)
    )
    for name in DISTANCES:
        np.testing.assert_allclose(measured(shifted, name), measured(plain, name), atol=1e-7)


def test_few_rounds_are_exact_on_the_last_side_only(run_of):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 2, 2))
    run = run_of(0.5)
    found = {
        last: replayed_deflated_gain(
            diagnostics.with_replay(run, logits, decay=1.0, sinkhorn_steps=1, last=last)
        )
        for last in ("row", "column")
    }
    assert not np.allclose(found["row"], found["column"], rtol=1e-3)
    turned = diagnostics.with_replay(run, logits.swapaxes(1, 2), decay=1.0, sinkhorn_steps=1, last="column")
    # of two streams the norm off the mean is a number, the same for a matrix and its transpose
    np.testing.assert_allclose(replayed_deflated_gain(turned), found["row"], rtol=1e-12)


def test_a_floor_is_added_to_the_softmax(run_of):
    run = diagnostics.with_replay(run_of(0.5), 100 * TWO, decay=1.0, floor=0.1)
    # the softmax is the identity; 1.1 and 0.1 over 1.2
    assert float(replayed_deflated_gain(run)[0]) == pytest.approx(1.0 / 1.2)


def test_metrics_on_arrays(run_of):
    run = diagnostics.with_replay(run_of(0.5), TWO, decay=0.25)
    trace = run["trace"].to_dataset()
    assert float(initial_distance(run_of(1.0).trace.h_res, trace.initial_logits).max()) < 1e-6


# --- with the run ---


@pytest.mark.parametrize("suffix", schema.SUFFIXES)
def test_it_stays_with_the_run_on_disk(run_of, tmp_path, suffix):
    run = diagnostics.with_replay(run_of(0.5), TWO, decay=0.25)
    opened = diagnostics.open_run(diagnostics.save_run(run, tmp_path / f"run{suffix}"))
    assert opened["trace"]["initial_logits"].attrs == {
        "sinkhorn_steps": 20, "last": "row", "floor": 0.0, "decay": 0.25,
    }  # fmt: skip
    for name in DISTANCES:
        xr.testing.assert_equal(measured(opened, name), measured(run, name))


def test_the_run_that_came_is_left_alone(run_of):
    run = run_of(0.5)
    diagnostics.with_replay(run, TWO, decay=0.25)
    assert "initial_logits" not in run["trace"]


@pytest.mark.parametrize(
    "how",
    [{"decay": 0.0}, {"decay": 1.5}, {"decay": np.nan}, {"decay": 0.5, "last": "rows"}],
)
def test_a_replay_that_is_none_is_refused(run_of, how):
    with pytest.raises(schema.SchemaError, match=r"initial_logits has decay .* expected a decay in \(0, 1\]"):
        diagnostics.with_replay(run_of(0.5), TWO, **how)


def test_rounds_and_logits_that_are_no_numbers_are_refused(run_of):
    for steps in (0, 2.5, "20"):
        with pytest.raises(ValueError, match=r"sinkhorn_steps is .*; expected a whole number, 1 or more"):
            diagnostics.with_replay(run_of(0.5), TWO, decay=0.5, sinkhorn_steps=steps)
    spoilt = TWO.copy()
    spoilt[2, 0, 1] = np.nan
    dims = ("connection", "stream_out", "stream_in")
    for logits, words in (
        (spoilt, r"contains 1 NaN or infinite values of 16, the first at index \(2, 0, 1\)"),
        (TWO + 1j, "complex128; expected real numbers"),
        (TWO.astype(str), "expected real numbers: give numbers only"),
    ):
        for given in (logits, xr.DataArray(logits, dims=dims)):
            with pytest.raises(ValueError, match=f"initial.* {words}"):
                diagnostics.with_replay(run_of(0.5), given, decay=0.5)


def test_logits_of_another_model_are_refused(run_of, residual_run):
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\), the run's connections \(4, 2, 2\)"):
        diagnostics.with_replay(run_of(0.5), TWO[:3], decay=0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 2\); expected logits"):
        diagnostics.with_replay(run_of(0.5), TWO[0], decay=0.5)
    with pytest.raises(ValueError, match="has no h_res"):
        diagnostics.with_replay(residual_run, TWO, decay=0.5)


def named(logits, *modules):
    coords = {"connection_module": ("connection", np.array(modules, dtype=object))}
    return xr.DataArray(logits, dims=("connection", "stream_out", "stream_in"), coords=coords)


def test_logits_are_matched_by_module(run_of):
    run = run_of(0.5)
    assert list(run.trace.connection_module.values) == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    logits = np.stack([TWO[0], 2 * TWO[0], 0 * TWO[0]])
    given = named(logits, "model.blocks.1", "model.blocks.0", "model.blocks.2")
    found = diagnostics.with_replay(run, given, decay=0.5)
    np.testing.assert_array_equal(found["trace"]["initial_logits"][:, 0, 0], [6.0, 6.0, 3.0, 3.0])
    with pytest.raises(ValueError, match=r"'blocks.1' of the run is not among .*model.blocks.0"):
        diagnostics.with_replay(run, named(logits[:1], "model.blocks.0"), decay=0.5)


def test_chains_get_their_own(run_of):
    part = run_of(0.5)["trace"].to_dataset()
    other = part.assign_coords(connection_module=part.connection_module.str.replace("blocks", "layers"))
    run = schema.create_run({"a": part, "b": other}, attrs=dict(run_of(0.5).attrs))
    logits = np.stack([share * TWO[0] for share in (1.0, 2.0, 3.0, 4.0)])
    given = named(logits, "blocks.0", "blocks.1", "layers.0", "layers.1")
    found = diagnostics.with_replay(run, given, decay=0.5)
    for chain, corners in (("a", [3, 3, 6, 6]), ("b", [9, 9, 12, 12])):
        np.testing.assert_array_equal(found[f"trace/{chain}"]["initial_logits"][:, 0, 0], corners)


# --- the verdict ---


def judged(run, name):
    found = diagnostics.judge(diagnostics.analyze(run), passed=True)
    return next((finding for finding in found if finding.verdict == name), None)


def test_decay_alone_explains_what_it_explains(run_of):
    explained = judged(diagnostics.with_replay(run_of(0.25), TWO, decay=0.25), "decayed_mixing")
    assert explained.severity == Severity.WARN
    left = f"{kept(0.25) ** 4:.3g}"
    assert f"(logits times 0.25) alone leave {left}" in explained.sentence
    moved = judged(diagnostics.with_replay(run_of(0.25), TWO, decay=0.5), "decayed_mixing")
    assert moved.severity == Severity.PASS
    assert moved.value == pytest.approx(1 - np.log(kept(0.5)) / np.log(kept(0.25)), rel=1e-5)


def test_where_nothing_is_lost_there_is_nothing_to_explain(run_of):
    assert kept(2.0) ** 4 > 0.5
    assert judged(diagnostics.with_replay(run_of(2.0), 2 * TWO, decay=1.0), "decayed_mixing") is None


def test_uniform_matrices_lose_everything_and_decay_explains_it(run_of):
    found = judged(diagnostics.with_replay(run_of(0.0), 0 * TWO, decay=0.5), "unmoved_mixing")
    assert found.severity == Severity.WARN
    assert found.value < 1e-6
    assert judged(diagnostics.with_replay(run_of(0.0), 0 * TWO, decay=0.5), "decayed_mixing").value < 0.1
