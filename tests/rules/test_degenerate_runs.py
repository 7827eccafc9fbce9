"""A run with a dead layer, one token or a huge offset is analysed: NaN where undefined, a reason, the rest untouched."""

import numpy as np
import pytest

from depthscope import CATALOGUE, diagnostics
from depthscope.diagnostics import schema

# Without statistics of weights, which no state can spoil.
SIZES = {"layers": 3, "samples": 2, "tokens": 16, "features": 6, "weights": False}
FAMILIES = ("residual", "mhc")
SPOILT = 2  # neither the first depth nor the last: those before and after it must stay as they are


def changed(run, change):
    """The run with its residual stream and mask changed in place."""
    trace = run["trace"].to_dataset().load().copy(deep=True)
    change(trace["residual"].values, trace["mask"].values)
    return schema.create_run(trace, attrs=run.attrs)


def of_layer(value):
    def change(x, mask):
        x[SPOILT] = value

    return change


def one_entry(value):
    def change(x, mask):
        x[SPOILT, 0, 5, 0, 3] = value

    return change


def copied_layer(x, mask):
    x[SPOILT] = x[SPOILT - 1]


def identical_tokens(x, mask):
    x[SPOILT] = x[SPOILT, :1, :1]


def far_away(x, mask):
    x += 1e4


def one_token_left(x, mask):
    mask[:] = False
    mask[0, 5] = True


def analysed(run):
    """Every metric of the catalogue, the costly ones too."""
    # By name: without names an analysis leaves the expensive ones out.
    return diagnostics.analyze(run, metrics=CATALOGUE)


def problems(found):
    """What is wrong with an analysis: a metric neither computed nor missing for a reason, or infinite; it can be judged."""
    reasons = found.attrs["not_computed"]
    accounted = {name for name in CATALOGUE if name in found.data_vars} | set(reasons)
    wrong = [f"{name} is neither computed nor missing" for name in sorted(set(CATALOGUE) - accounted)]
    wrong += [f"{name} is no metric" for name in sorted(accounted - set(CATALOGUE))]
    # A reason is a sentence: more than the name of an error.
    wrong += [
        f"{name} is missing because of {reason!r}"
        for name, reason in reasons.items()
        if len(reason.split()) <= 3
    ]
    for name, value in found.data_vars.items():
        may_be_infinite = name in CATALOGUE and CATALOGUE[name].infinite
        if not may_be_infinite and value.dtype.kind == "f" and np.isinf(value).any():
            wrong.append(f"{name} is infinite")
    diagnostics.judge(found, passed=True)  # raises where a verdict cannot take such numbers
    return wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_states_near_the_end_of_float32_are_analysed(make_run, family):
    assert problems(analysed(changed(make_run(family, **SIZES), of_layer(3e38)))) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_spread_and_does_not_pass(make_run, bad):
    found = analysed(changed(make_run("residual", **SIZES), one_entry(bad)))
    for name, value in found.data_vars.items():
        # The number of tokens is known whatever the states are.
        of_states = name in CATALOGUE and CATALOGUE[name].roots == ("residual",) and name != "num_tokens"
        if of_states and "depth" in value.dims:
            assert value.sel(depth=SPOILT).isnull().all(), name
        if of_states and "other_depth" in value.dims:
            assert value.sel(other_depth=SPOILT).isnull().all(), name


def test_a_layer_that_does_nothing(make_run):
    found = analysed(changed(make_run("mhc", **SIZES), copied_layer)).squeeze("step")
    pair = {"depth": SPOILT, "other_depth": SPOILT - 1}
    np.testing.assert_allclose(found["cka"].sel(pair), 1.0, atol=1e-12)
    # A rounding error of 1e-16 in a cosine near 1 is one of 1e-8 in the angle.
    np.testing.assert_allclose(found["angular_distance"].sel(pair), 0.0, atol=1e-7)
    np.testing.assert_allclose(found["block_influence"].sel(depth=SPOILT), 0.0, atol=1e-15)
    np.testing.assert_allclose(found["adjacent_cka"].sel(depth=SPOILT), 1.0, atol=1e-12)


def test_a_layer_of_zeros_has_size_and_rank_zero_and_no_shape(make_run):
    found = analysed(changed(make_run("residual", **SIZES), of_layer(0.0))).sel(depth=SPOILT)
    for name in ("residual_norm", "numerical_rank", "channel_variance"):
        np.testing.assert_array_equal(found[name], 0.0)
    for name in ("effective_rank", "dong_residual", "token_cosine"):
        assert found[name].isnull().all(), name
    assert found["cka"].isnull().all()
    assert found["angular_distance"].isnull().all()


def test_identical_tokens_have_rank_one_and_no_geometry(make_run):
    found = analysed(changed(make_run("residual", **SIZES), identical_tokens)).sel(depth=SPOILT)
    for name in ("effective_rank", "participation_ratio", "numerical_rank"):
        np.testing.assert_allclose(found[name].sel(centering="raw"), 1.0, atol=1e-12)
    np.testing.assert_allclose(found["token_cosine"].sel(centering="raw"), 1.0, atol=1e-12)
    np.testing.assert_array_equal(found["dong_residual"], 0.0)
    np.testing.assert_array_equal(found["numerical_rank"].sel(centering="centred"), 0.0)
    for name in ("effective_rank", "token_cosine"):
        assert found[name].sel(centering="centred").isnull().all()
    assert found["cka"].isnull().all()


def test_one_token_has_a_direction_and_nothing_else(make_run):
    found = analysed(changed(make_run("residual", **SIZES), one_token_left))
    np.testing.assert_allclose(found["effective_rank"].sel(centering="raw"), 1.0)
    assert found["effective_rank"].sel(centering="centred").isnull().all()
    for name in ("token_cosine", "cka"):
        assert found[name].isnull().all(), name
    np.testing.assert_array_equal(found["num_tokens"], 1.0)
    assert found["angular_distance"].notnull().all()


# Metrics with the choice of centring, which here is made.
OFFSET_FREE = ("effective_rank", "participation_ratio", "token_cosine")
# Metrics that do not change with an offset at all: they centre, or are of differences.
OFFSET_FREE_PAIRS = ("cka", "adjacent_cka")


# The mean over streams is stored in float32 like the streams, whose spacing at 1e4 is 1e-3.
@pytest.mark.parametrize(("family", "rtol"), [("residual", 1e-6), ("mhc", 1e-3)])
def test_a_huge_offset_changes_nothing_that_is_centred(make_run, family, rtol):
    """float32 resolves three decimals at 1e4; less the offset, the same numbers give the same values."""
    far = changed(make_run(family, **SIZES), far_away)

    # Compared with the shifted run moved back, not with the run before: the shift itself has rounded it.
    def back(x, mask):
        x -= 1e4

    found, near = analysed(far), analysed(changed(far, back))
    for name in OFFSET_FREE:
        centred = [a[name].sel(centering="centred", tokens="all") for a in (found, near)]
        np.testing.assert_allclose(*centred, rtol=rtol, err_msg=name)
    for name in OFFSET_FREE_PAIRS:
        pair = [a[name].sel(tokens="all") if "tokens" in a[name].dims else a[name] for a in (found, near)]
        np.testing.assert_allclose(*pair, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "change", "names"),
    [
        ({"samples": 1, "tokens": 1}, lambda x, mask: None, ["token_cosine", "cka"]),
        ({}, lambda x, mask: x.__imul__(0), ["effective_rank", "cka", "token_cosine"]),
    ],
)
def test_what_is_undefined_everywhere_says_why(make_run, sizes, change, names):
    found = analysed(changed(make_run("residual", **(SIZES | sizes)), change))
    for name in names:
        assert found[name].isnull().all()
        # The general reason: these functions give none of their own.
        assert found[name].attrs["undefined_because"].startswith("too few tokens")
    assert "undefined_because" not in found["residual_norm"].attrs
