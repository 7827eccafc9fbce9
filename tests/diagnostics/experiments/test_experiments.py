"""Kinds, intervals and the table from verdict to experiment, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from depthscope.app.cli import parser
from depthscope.diagnostics.experiments import KINDS, SETTLED_BY, estimate, experiment_for, kind_named
from depthscope.diagnostics.verdicts import VERDICTS, Finding, Severity

FINDING = Finding(
    verdict="wasted_layer",
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


@pytest.mark.parametrize("verdict", sorted(set(SETTLED_BY) & set(VERDICTS)))
@pytest.mark.parametrize("axis", ["connection", "depth", "run"])
def test_the_command_that_settles_a_finding_can_be_given(verdict, axis):
    command = experiment_for(replace(FINDING, verdict=verdict, axis=axis, stream="2"), "some.module:factory")
    assert command is not None
    args = parser.parse([*command.split()[1:], "--text", "notes.txt"])
    assert args.command == "ablate"
    assert getattr(args, f"{axis}s", None) == (None if axis == "run" else [3, 4, 5])


def test_a_finding_that_no_change_of_the_forward_settles_has_none():
    assert experiment_for(replace(FINDING, verdict="small_sample")) is None


def test_hyphens_are_underscores_and_unknown_kinds_are_named():
    assert kind_named("freeze-stream") is KINDS["freeze_stream"]
    with pytest.raises(ValueError, match="no experiment 'unform'; closest: 'uniform'"):
        kind_named("unform")


def test_none_of_it_needs_torch():
    code = "import sys; import depthscope.diagnostics.experiments; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
