"""The depth kernel is the same object for every connection: what a change of one output changes of each branch's input."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope import diagnostics
from depthscope.diagnostics import schema
from depthscope.diagnostics.kernels import mixing as kernel
from tests.models.linear_runs import MODELS, over_depth, plain, streams

PATHS = ("depth_kernel", "effective_streams")


def analyzed(run, metrics=PATHS):
    return diagnostics.analyze(run, metrics=metrics).isel(step=0)


def reasons(run, metrics=PATHS):
    return diagnostics.analyze(run, metrics=metrics).attrs["not_computed"]


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_is_what_a_change_of_an_output_changes(name):
    mean, _ = MODELS[name].by_differences()
    found = analyzed(MODELS[name].run())["depth_kernel"].values
    # The root mean square over features is the mean magnitude, except where each feature has its own gate.
    if name == "gated":
        assert np.all(found[mean > 0] <= mean[mean > 0] + 1e-12)
        np.testing.assert_allclose(found, mean, rtol=0.2)
    else:
        np.testing.assert_allclose(found, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_metrics_built_on_the_kernel_follow_from_it(name):
    found = analyzed(MODELS[name].run())
    each = MODELS[name].by_differences()[1]
    # One matrix a feature, or a block a pair: not this magnitude's singular values. Between parallel branches is no state.
    if name in ("gated", "views", "parallel"):
        return
    # All weights of these models are positive, so that magnitudes are the weights themselves.
    cuts = kernel.effective_streams(each).mean(axis=(0, 1))
    np.testing.assert_allclose(found["effective_streams"].sel(reduction="mean")[1:], cuts, rtol=1e-7)


def test_views_pass_as_many_streams_as_there_are():
    found = analyzed(streams("views", n=3).run())["effective_streams"].sel(reduction="max")
    assert np.isnan(found[0])
    assert 1.0 < float(found[2]) <= 2.0 + 1e-9  # two outputs are before this cut


def test_gates_are_multiplied_before_they_are_averaged():
    model = plain("gated")
    keep, write = model.variables["residual_gate"], model.variables["branch_gate"]
    expected = (keep[2] * keep[1] * write[0]).mean()
    assert float(analyzed(model.run())["depth_kernel"][3, 0]) == pytest.approx(expected)
    assert abs(keep[2].mean() * keep[1].mean() * write[0].mean() - expected) > 1e-4


def test_parallel_branches_do_not_read_each_other():
    found = analyzed(plain("parallel", count=4).run())["depth_kernel"].values
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    passing = analyzed(plain("parallel", count=4).run())["effective_streams"].sel(reduction="max")
    np.testing.assert_array_equal(passing, [np.nan, np.nan, 1.0, 1.0])


def test_metrics_of_mixing_say_that_they_need_more_streams():
    missing = reasons(
        plain().run(), ["mixing_gain", "stream_cosine", "read_share", "composite_singular_value"]
    )
    assert set(missing.values()) == {"needs more than one stream; this run has one"}
    assert len(missing) == 4


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (plain(), {"proof": None}, "not stated to be proven"),
        (plain(), {"proof": "unproven: a branch was not seen"}, "is unproven: a branch was not seen"),
        (plain(), {"family": "depth_history"}, "family depth_history are not plain"),
    ],
)
def test_a_plain_chain_that_is_not_proven_has_no_kernel(model, options, expected):
    assert all(expected in reason for reason in reasons(model.run(**options)).values())


def changed(model, **coords):
    return model.run()["trace"].to_dataset().assign_coords({k: ("connection", v) for k, v in coords.items()})


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        (changed(plain(), after_sum=["", "norm", "", "", ""]), "a norm of the sum, whose factor"),
        (changed(plain(), proof=["proven"] * 4 + ["unproven: why"]), "connection 4 is unproven: why"),
        (
            changed(plain(), depth_in=[0, 1, 3, 3, 4], depth_out=[1, 2, 4, 4, 5]),
            "ends at depth 2 and the next begins at",
        ),
        (changed(streams()).isel(connection=[0, 1, 3]), "left out by sites="),
        (changed(over_depth("attention")).isel(connection=[0, 1, 3]), "left out by sites="),
    ],
)
def test_what_is_not_known_of_the_paths_is_said(trace, expected):
    attrs = {"family": "residual", "proof": "proven"}
    found = diagnostics.analyze(schema.create_run(trace, attrs=attrs), metrics=PATHS)
    for name in PATHS:
        assert expected in found.attrs["not_computed"][name]


def test_a_weight_on_a_later_source_is_refused():
    model = over_depth("attention")
    model.variables["depth_read"][1, ..., 3] = 0.1
    assert (
        "depth_read of connection 1 has a weight on source 2 or later" in reasons(model.run())["depth_kernel"]
    )


def test_arrays_by_name_give_the_kernel_of_a_run():
    run = over_depth("attention").run()
    found = diagnostics.depth_kernel(depth_read=run.trace.depth_read)
    np.testing.assert_array_equal(found, analyzed(run)["depth_kernel"])
