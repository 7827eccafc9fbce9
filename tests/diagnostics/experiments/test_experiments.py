"""Kinds, intervals and the table from verdict to experiment, without torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import typer
import xarray as xr

from depthscope import Finding, Severity
from depthscope.app.cli.main import application
from depthscope.diagnostics.experiments import (
    KINDS,
    estimate,
    experiment_for,
    kind_named,
    open_result,
    result_for,
    save_result,
)
from depthscope.diagnostics.experiments.kinds import SETTLED_BY
from depthscope.diagnostics.verdicts import VERDICTS

FINDING = Finding(
    verdict="idle_layer",
    severity=Severity.WARN,
    sentence="",
    metric="depth_kernel",
    value=0.0,
    threshold=0.01,
    source="heuristic",
    axis="connection",
    first=3,
    last=5,
    advice="",
)


def test_the_interval_is_students_and_covers_as_it_says():
    draws = np.random.default_rng(0).standard_normal((2000, 4))
    found = [estimate(row) for row in draws]
    assert found[0].low == pytest.approx(
        scipy.stats.t.interval(0.95, 3, draws[0].mean(), scipy.stats.sem(draws[0]))[0]
    )
    assert 0.93 < np.mean([each.low <= 0 <= each.high for each in found]) < 0.97


def test_one_sequence_has_a_mean_and_no_interval():
    found = estimate(np.array([2.0, np.nan]))
    assert (found.mean, found.sequences) == (2.0, 1)
    assert np.isnan([found.error, found.low, found.high]).all()
    assert np.isnan(estimate(np.array([np.nan])).mean)


def test_every_verdict_of_the_table_names_a_kind_of_experiment():
    assert set(SETTLED_BY.values()) <= set(KINDS)


@pytest.mark.parametrize("axis", ["connection", "depth", "run"])
def test_the_command_that_settles_a_finding_can_be_given(axis):
    for verdict in sorted(set(SETTLED_BY) & set(VERDICTS)):
        command = experiment_for(
            replace(FINDING, verdict=verdict, axis=axis, stream="2"), "some.module:factory"
        )
        assert command is not None
        _, name, *words = command.split()
        parsed = typer.main.get_command(application()).commands[name].make_context(name, words).params
        assert name == "ablate"
        assert parsed.get(f"{axis}s") == (None if axis == "run" else "3-5")


def test_a_finding_that_no_change_of_the_forward_settles_has_none():
    assert experiment_for(replace(FINDING, verdict="small_sample")) is None


def test_hyphens_are_underscores_and_unknown_kinds_are_named():
    assert kind_named("drop-stream") is KINDS["drop_stream"]
    with pytest.raises(ValueError, match="no experiment 'unform'; closest: 'uniform'"):
        kind_named("unform")


def _result() -> xr.Dataset:
    """Two experiments of a kind at two connections, and one of another kind."""
    names = ["skip block 1", "skip block 2", "identity at 1"]
    numbers = {"loss_change": [0.0, 0.5, 2.0], "kl": [0.0, 0.5, 2.0], "output_change": [0.0, 0.1, 0.4]}
    variables = {
        name + ending: ("experiment", np.array(values) + shift)
        for name, values in numbers.items()
        for ending, shift in (("", 0.0), ("_error", 0.1), ("_low", -0.2), ("_high", 0.2))
    }
    places = {"block": [1, 2, -1], "depth": [2, 4, 2], "connection": [-1, -1, 1], "stream": [-1, -1, -1]}
    coords = {name: ("experiment", np.array(values)) for name, values in places.items()}
    coords["kind"] = ("experiment", np.array(["skip", "skip", "identity"], dtype=object))
    return xr.Dataset(
        variables, {"experiment": np.array(names, dtype=object), **coords}, {"left_out": ["a: b"]}
    )


def test_what_the_experiment_of_a_finding_gave_is_found_by_kind_and_place():
    finding = replace(FINDING, verdict="idle_layer", axis="depth", first=2, last=4)
    assert result_for(finding, _result()) == "skip block 2: loss +0.5 nats (95 %: +0.3 to +0.7)"
    # At another place, or of another kind, nothing was tried.
    assert result_for(replace(finding, first=3, last=3), _result()) == ""
    other = replace(finding, verdict="idle_layer", first=2, last=2)
    assert result_for(other, _result()).endswith("0 is possible)")
    assert result_for(replace(finding, verdict="small_sample"), _result()) == ""


def test_a_result_is_kept_whole_and_only_as_it_was_saved(tmp_path):
    place = save_result(_result(), tmp_path / "a.ablate.zip")
    again = open_result(place)
    assert again.attrs["left_out"] == ["a: b"]
    xr.testing.assert_equal(again, _result())
    place.write_bytes(place.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cannot be read"):
        open_result(place)
    with pytest.raises(FileNotFoundError, match="make one with `depthscope ablate`"):
        open_result(tmp_path / "b.zip")
