"""What is wrong while the training runs? Each finding is reported once, and again when it becomes more severe."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import Finding, Severity, judge
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.verdicts.finding import News
from depthscope.probes.training.notices import TrainingStopped

OnFinding = Callable[[int, Finding], Any]
Attributes = Mapping[str, Mapping[str, Any]]
"""Those of the groups of a row, by chain."""
Say = Callable[[str, Exception | None], None]
"""Called with a sentence for the user, and the error that is behind it."""

SHARE_OF_TIME = 0.01  # that judging may take, where nobody waits for it


Number = tuple[tuple[Any, ...], np.ndarray, Mapping[str, Any]]
Numbers = Mapping[str, Number]
"""Dims, values and attributes by name."""


@dataclass(frozen=True)
class LiveRow:
    """The metrics of one measured step."""

    step: int  # of the training
    # by ``metrics/NAME`` or ``metrics/CHAIN/NAME``; float64, of the same shapes at every step, dims without
    # ``step``
    numbers: Numbers
    coords: Numbers  # coordinates by the same kind of path, and nulls, which have no step
    # why metrics have no value, by chain and metric
    not_computed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def findings_of(row: LiveRow, attrs: Attributes) -> list[Finding]:
    """Findings about one row, the worst first; ``attrs`` are those of its groups."""
    by_chain = datasets_of(row, attrs)
    if list(by_chain) == [""]:
        return judge(by_chain[""])
    return judge(xr.DataTree.from_dict({"/": xr.Dataset(), **by_chain}))


class Watched:
    """Judges rows, and reports what is new in them.

    ``on_finding``: ``on_finding(step, finding)``.
    ``stop_on``: ``"warn"`` or ``"fail"``: the severity that ends the training.
    ``name``: of the run, printed before its steps; empty for none.
    """

    def __init__(self, on_finding: OnFinding | None, stop_on: str | None, name: str) -> None:
        levels = {severity.name.lower(): severity for severity in (Severity.WARN, Severity.FAIL)}
        if stop_on is not None and stop_on not in levels:
            raise InputError(
                f"stop_on is {stop_on!r}; expected one of {', '.join(map(repr, levels))}, or None"
            )
        if on_finding is not None and not callable(on_finding):
            raise InputError(
                f"on_finding is of type {type(on_finding).__name__}; expected a function of the step and a finding"
            )
        self._on_finding = on_finding
        self._of = f"{name}, " if name else ""
        self._stop_on = None if stop_on is None else levels[stop_on]
        self.found: list[dict[str, Any]] = []  # what was new, with the step that showed it
        self._news = News()
        self._last: tuple[float, float] | None = None  # when rows were last judged, and how long that took
        self._unjudged: LiveRow | None = None
        self._severe: tuple[int, tuple[Finding, ...]] | None = None  # what is to stop the training

    def take(self, row: LiveRow, attrs: Attributes, say: Say) -> None:
        """Judge a row, where that is due: every one where the user waits for findings.

        Else, where rows follow each other within seconds, as many as take one percent of the time; a finding is then printed
        some rows later.
        """
        self._unjudged = row
        waits = self._on_finding is not None or self._stop_on is not None
        if waits or self._last is None or time.perf_counter() - self._last[0] > self._last[1] / SHARE_OF_TIME:
            self.judge(attrs, say)

    def judge(self, attrs: Attributes, say: Say) -> None:
        """Judge the last row, where that was not done yet."""
        row, self._unjudged = self._unjudged, None
        if row is None:
            return
        began = time.perf_counter()
        try:
            findings = findings_of(row, attrs)
        except Exception as error:
            say(f"step {row.step} was not judged: {error}", error)
            return
        ended = time.perf_counter()
        self._last = ended, ended - began
        self.report(row.step, findings, say)

    def report(self, step: int, findings: Iterable[Finding], say: Say) -> None:
        """Print what is new in a step and a warning or worse, and tell the user's function all that is new."""
        new = self._news.among(findings)
        self.found += [{"step": step, **finding.as_dict()} for finding in new]
        if self._stop_on is not None and (severe := [of for of in new if of.severity >= self._stop_on]):
            self._severe = step, tuple(severe)
        failed = None
        for finding in new:
            if finding.severity >= Severity.WARN:
                severity = finding.severity.name
                sys.stderr.write(f"depthscope: {self._of}step {step}: {severity}: {finding.sentence}\n")
            try:
                if self._on_finding is not None:
                    self._on_finding(step, finding)
            except Exception as error:  # the other findings are still to be reported
                failed = failed or error
        if failed is not None:
            say(f"on_finding failed at step {step}: {type(failed).__name__}: {failed}", failed)

    def stop_if_severe(self) -> None:
        """Raise `TrainingStopped` where a row has a new finding as severe as was asked for."""
        severe, self._severe = self._severe, None
        if severe is not None:
            raise TrainingStopped(*severe)

    def say_too_late(self, say: Say) -> None:
        """Say what would have stopped a training that has ended by now."""
        severe, self._severe = self._severe, None
        if severe is not None:
            say(
                f"step {severe[0]} has a finding that stop_on ends a training for, and the training had ended: "
                f"{severe[1][0].sentence}",
                None,
            )


SAMPLED_TOKENS = "sampled_tokens"
"""Attribute of a history: how many tokens of each step its ranks and similarities are of."""


def datasets_of(row: LiveRow, attrs: Attributes) -> dict[str, xr.Dataset]:
    """The metrics of one step by chain, with the dims of an analysis, ``step`` first; nulls have no step."""
    found: dict[str, dict[str, Any]] = {}
    coords: dict[str, dict[str, Any]] = {}
    for path, (dims, values, of_variable) in row.numbers.items():
        chain, name = _chain_and_name(path)
        found.setdefault(chain, {})[name] = (("step", *dims), values[None], dict(of_variable))
    for path, value in row.coords.items():
        chain, name = _chain_and_name(path)
        (found if name.endswith("_null") else coords).setdefault(chain, {})[name] = value
    return {
        chain: xr.Dataset(
            variables,
            {**coords.get(chain, {}), "step": [row.step]},
            attrs={**attrs.get(chain, {}), "not_computed": dict(row.not_computed.get(chain, {}))},
        )
        for chain, variables in found.items()
    }


def _chain_and_name(path: str) -> tuple[str, str]:
    """Of ``metrics/NAME`` or ``metrics/CHAIN/NAME``."""
    group, _, name = path.rpartition("/")
    return group.partition("/")[2], name


# As the mHC paper calls them; every other metric has the catalogue's name.
KNOWN_AS = {"mixing_gain": "amax_gain", "composite_gain": "composite_amax_gain"}
SIDES = {"forward": "fwd", "backward": "bwd"}
# One variant of each metric: pooled tokens, as they are; the typical token, and for gains the paper's mean and the worst one.
VARIANT = {"scope": "data", "tokens": "all", "centering": "raw", "estimator": "unbiased"}
REDUCED = ("median",)
GAINS_REDUCED = ("mean", "max")
POINTS = ("depth", "connection", "weight")


def scalars(row: LiveRow) -> dict[str, float]:
    """A row as single finite numbers.

    Returns: ``NAME`` for one number a step, ``NAME/depth_3`` for curves by depth (in the mean over streams), such as
    ``amax_gain_fwd/connection_3`` (mean over tokens) and ``amax_gain_fwd_max/connection_3``; shares of streams end in
    ``/stream_0``. Tables of all pairs of depths, and singular values, are left out.
    """
    found: dict[str, float] = {}
    for path, (dims, values, _) in row.numbers.items():
        group, (chain, name) = path.rpartition("/")[0], _chain_and_name(path)
        labels = {
            dim: row.coords[f"{group}/{dim}"][1].tolist() for dim in dims if f"{group}/{dim}" in row.coords
        }
        for shown, value in _points(name, dims, values, labels):
            if math.isfinite(value):
                found[f"{chain}/{shown}" if chain else shown] = value
    return found


def _points(
    name: str, dims: tuple[str, ...], values: np.ndarray, labels: Mapping[str, list[object]]
) -> Iterator[tuple[str, float]]:
    """The numbers of one metric, each with its name."""
    if any(dim not in labels for dim in dims) or {"other_depth", "other_connection"} & set(dims):
        return
    shown = KNOWN_AS.get(name, name)
    reductions = GAINS_REDUCED if name in KNOWN_AS else REDUCED
    for index in np.ndindex(values.shape):
        at = {dim: labels[dim][i] for dim, i in zip(dims, index, strict=True)}
        if any(at.get(dim, label) != label for dim, label in VARIANT.items()):
            continue
        if at.get("reduction", reductions[0]) not in reductions:
            continue
        if "stream" in at and (at["stream"] == "mean") == name.endswith("_share"):
            continue
        # The first reduction is what the name alone means.
        words = [shown, SIDES.get(str(at.get("direction")), ""), str(at.get("kind", ""))]
        words += [str(at["reduction"])] if at.get("reduction", reductions[0]) != reductions[0] else []
        places = [f"{dim}_{at[dim]}" if dim != "weight" else str(at[dim]) for dim in POINTS if dim in at]
        places += [f"stream_{at['stream']}"] if name.endswith("_share") else []
        yield "/".join(["_".join(word for word in words if word), *places]), float(values[index])
