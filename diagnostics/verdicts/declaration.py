"""What is a verdict? Numbers along an axis, limits with their source, and a sentence where a limit is crossed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import numbers
from depthscope.diagnostics.numbers import percent
from depthscope.diagnostics.verdicts.age import Age, Inputs, Task, age_of
from depthscope.diagnostics.verdicts.finding import Finding, Severity
from depthscope.diagnostics.verdicts.locations import place, span
from depthscope.diagnostics.verdicts.rule import Grade, Kind, grade, result_of

DEFAULT = "depthscope's default"
"""The source of a limit that no publication states: set by hand."""

# What is smaller is what the rounding of float64, 1e-16, leaves of a share after some connections.
NOTHING = 1e-20

FACTS: dict[str, Callable[[xr.Dataset], Any]] = {
    "attrs": lambda analysis: analysis.attrs,
    "task": lambda analysis: Task.of(analysis.attrs),
    "age": age_of,
    "inputs": lambda analysis: Inputs.of(analysis.attrs),
}
"""What else a verdict can take than variables of an analysis."""

SPOILING = ("not_finite", "dead_state")
"""What is not a number, or zero, explains every statistic of what comes after it."""


@dataclass(frozen=True)
class Limits:
    """From which value on a verdict reports, by severity; None where it does not have it.

    ``above``: whether values above the limits are bad, or values below.
    ``source``: a key of ``references.bib``, or `DEFAULT`.
    ``scale``: ``"ratio"`` or ``"cosine"``: on which scale a number is far from its limit, see `Finding.excess`.
    """

    info: float | None = None
    warn: float | None = None
    fail: float | None = None
    above: bool = True
    source: str = DEFAULT
    scale: str = "ratio"

    @property
    def levels(self) -> list[tuple[Severity, float]]:
        """Severities with their limits, the mildest first."""
        named = ((Severity.INFO, self.info), (Severity.WARN, self.warn), (Severity.FAIL, self.fail))
        return [(severity, limit) for severity, limit in named if limit is not None]

    @property
    def words(self) -> str:
        """From which values on each severity is reported, such as ``WARN above 0.95, FAIL above 0.99``."""
        side = "above" if self.above else "below"
        return ", ".join(f"{severity.name} {side} {exact(limit)}" for severity, limit in self.levels)

    def beyond(self, values: np.ndarray, limit: float) -> np.ndarray:
        """Which values are beyond a limit; NaN is beyond none."""
        return values > limit if self.above else values < limit

    def severity(self, value: float) -> tuple[Severity, float]:
        """How bad a value is, and the limit that it crosses: the mildest one where it crosses none."""
        crossed = [level for level in self.levels if self.beyond(np.asarray(value), level[1])]
        return crossed[-1] if crossed else (Severity.PASS, self.levels[0][1])


@dataclass(frozen=True)
class Profile:
    """What a verdict judges: numbers along depth, along the connections or modules, or one for the run.

    ``values``: one dim, ``depth``, ``connection`` or ``weight``, or none.
    ``words``: what the number is, without an article; empty where it is what the verdict judges.
    ``stream``: the stream that it belongs to.
    ``begins``: whether the sentence has the number with which it begins beside the worst: of what spreads from there on.
    ``note_only``: whether it is a note however far beyond: what is known to be harmless, or may well be meant.
    ``is_sure``: whether no network that begins to train is so far beyond: where its age is not known, nothing is taken off.
    ``note``: a further sentence.
    ``template``: the sentence up to the limit, in place of words, number and place: ``{percent}``, ``{where}``.
    ``sentence``: the complete sentence beyond the limit, in place of the one made of `words`, number and position.
    ``metric``: the metric of which `values` are a slice as it is: its figures show the limits. Empty for numbers that are made
    of several, or compared with another position.
    """

    values: xr.DataArray | float
    words: str = ""
    stream: str | None = None
    begins: bool = False
    note_only: bool = False
    is_sure: bool = False
    note: str = ""
    template: str = ""
    sentence: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Verdict:
    """One question with its limits; the docstring of its function is the title and the advice.

    ``name, title, advice``: the function's name, the first line of its docstring, and the rest of it.
    ``kind``: what it rests on, which decides when it is loud, see `rule`.
    ``metric``: the metric that the number comes from; ``judges`` the number itself, ``formula`` in plain signs, ``range`` the
    values that it can have.
    ``needs, wants``: variables of the analysis, and `FACTS`, that the function takes; those where the analysis has them.
    ``function``: variables in, profiles out; none where the question does not apply.
    ``follows_from``: other verdicts that explain this one, which is then a note.
    ``tried``: whether `depthscope.settle` leaves out what it says is of no use.
    """

    name: str
    title: str
    advice: str
    kind: Kind
    metric: str
    judges: str
    limits: Limits
    needs: tuple[str, ...]
    function: Callable[..., Iterable[Profile]]
    wants: tuple[str, ...] = ()
    formula: str = ""
    range: str = "0 or more"
    follows_from: tuple[str, ...] = ()
    tried: bool = False

    @property
    def judged(self) -> str:
        """What is compared with which limits: name, formula and range of the number, then each severity with its side."""
        formula = f", {self.formula}" if self.formula else ""
        return f"{self.judges}{formula} ({self.range}): {self.limits.words}"

    def findings(self, analysis: xr.Dataset) -> list[Finding]:
        """Judge one chain: an analysis of `diagnostics.analyze` without ``step``.

        Returns: PASS among them; one for each stream of which numbers are beyond; empty where the question does not apply.
        """
        age = cache(partial(age_of, analysis))  # most verdicts pass, and ask for none
        found = [
            self._judge(profile, xr.DataArray(profile.values), age, analysis)
            for profile in self.profiles(analysis)
        ]
        return _merged_by_stream([finding for finding in found if finding is not None])

    def profiles(self, analysis: xr.Dataset) -> list[Profile]:
        """What is judged of one chain; empty where the question does not apply, or its variables are missing."""
        if self.missing(analysis):
            return []
        arguments = {
            name: FACTS[name](analysis) if name in FACTS else analysis[name]
            for name in (*self.needs, *self.wants)
            if name in FACTS or name in analysis
        }
        return list(self.function(**arguments))

    def limits_on(self, metric: str, analysis: xr.Dataset) -> list[Limits]:
        """The limits that one chain's values of a metric are compared with, for its figures."""
        is_taken = metric in (*self.needs, *self.wants)
        is_judged = is_taken and any(each.metric == metric for each in self.profiles(analysis))
        return [self.limits] if is_judged else []

    def missing(self, analysis: xr.Dataset) -> list[str]:
        """Variables without which it cannot judge, and that an analysis does not have."""
        return [name for name in self.needs if name not in FACTS and name not in analysis]

    def _judge(
        self, profile: Profile, judged: xr.DataArray, age: Callable[[], Age], analysis: xr.Dataset
    ) -> Finding | None:
        values = np.atleast_1d(judged.values.astype(float))
        if np.isnan(values).all():  # undefined is neither passed nor failed
            return None
        limits = self.limits
        beyond = np.flatnonzero(limits.beyond(values, limits.levels[0][1]))
        at = int(np.nanargmax(values) if limits.above else np.nanargmin(values))
        by_limits, limit = limits.severity(values[at])
        if not by_limits:  # a passed verdict is at its worst value, for no position is beyond the limits
            beyond = np.array([at])
        axis = str(judged.dims[0]) if judged.dims else "run"
        first, last = (-1, -1) if axis == "run" else (int(beyond[0]), int(beyond[-1]))
        explains = by_limits > Severity.INFO and not profile.note_only
        found = Grade(min(by_limits, Severity.INFO))
        if explains:
            result = result_of(analysis.attrs, self.name, first, last)
            doubts = {"is_tried": self.tried, "is_sure": profile.is_sure}
            found = grade(self.kind, by_limits, age(), analysis.attrs, result, **doubts)
        return Finding(
            verdict=self.name,
            severity=found.severity,
            # It names the limit that was crossed, whatever the severity becomes.
            sentence=self._sentence(profile, judged, by_limits, at, beyond) + found.words,
            metric=profile.metric or self.metric,
            value=float(values[at]),
            threshold=float(limit),
            source=limits.source,
            axis=axis,
            first=first,
            last=last,
            advice=self.advice,
            stream=profile.stream,
            quantity=profile.words or self.judges,
            above=limits.above,
            worst=-1 if axis == "run" else at,
            scale=limits.scale,
            about="reading" if self.kind is Kind.READING else "network",
            settled=found.settled,
            explains=explains,
            profile=tuple(values.tolist()) if judged.dims else (),
        )

    def _sentence(
        self, profile: Profile, values: xr.DataArray, severity: Severity, at: int, beyond: np.ndarray
    ) -> str:
        if severity and profile.sentence:
            return profile.sentence
        value, where = float(values[at] if values.dims else values), place(values, at) if values.dims else ""
        words, written = profile.words or self.judges, exact if self.limits.scale == "cosine" else number
        said = f"the {words}{',' if ', ' in words else ''} is {written(value)} {where}"
        if severity and profile.template:
            written = percent if "{percent}" in profile.template else number
            said = profile.template.format(percent=percent(value), where=where)
        limit, source = self.limits.severity(value)[1], self.limits.source
        sentence = f"{said.rstrip()}, limit {written(limit)} ({source})"
        if severity and len(beyond) > 1:
            begins, first = "", int(beyond[0])
            if profile.begins and first != at:
                begins = f"begins with {written(float(values[first]))} {place(values, first)} and "
            side, mildest = "above" if self.limits.above else "below", written(self.limits.levels[0][1])
            sentence += f"; it {begins}is {side} {mildest} {span(values, beyond)}"
        note = f" {profile.note}" if profile.note and severity else ""
        return f"{sentence[0].upper()}{sentence[1:]}.{note}"


def verdict(
    kind: Kind, *, metric: str, judges: str, limits: Limits, follows_from: tuple[str, ...] = (), **others: Any
) -> Callable[[Callable[..., Iterable[Profile]]], Verdict]:
    """Declare the function below as a verdict; its parameters name variables of an analysis. ``others``: see `Verdict`."""

    def declare(function: Callable[..., Iterable[Profile]]) -> Verdict:
        title, _, advice = (inspect.getdoc(function) or "").partition("\n")
        parameters = inspect.signature(function).parameters.values()
        return Verdict(
            name=function.__name__,
            title=title,
            advice=" ".join(advice.split()),
            kind=kind,
            metric=metric,
            judges=judges,
            limits=limits,
            needs=tuple(each.name for each in parameters if each.default is not None),
            function=function,
            wants=tuple(each.name for each in parameters if each.default is None),
            follows_from=follows_from if kind in (Kind.FACT, Kind.READING) else (*SPOILING, *follows_from),
            **others,
        )

    return declare


def _merged_by_stream(found: list[Finding]) -> list[Finding]:
    """One finding a stream: the worst, its sentence followed by those of the others; passed ones unchanged."""
    merged = [finding for finding in found if finding.severity == Severity.PASS]
    beyond = sorted(
        (finding for finding in found if finding.severity),
        key=lambda finding: (finding.severity, finding.excess),
        reverse=True,
    )
    for stream in dict.fromkeys(finding.stream for finding in beyond):
        worst, *others = (finding for finding in beyond if finding.stream == stream)
        sentences = [worst.sentence]
        sentences += [f"Also: {each.sentence[0].lower()}{each.sentence[1:]}" for each in others]
        merged.append(replace(worst, sentence=" ".join(sentences)))
    return merged


def exact(value: float) -> str:
    """A number in three digits; where these are 1 and it is not, its distance from 1."""
    if value != 1 and number(value) == number(1.0):
        return f"1 {'−' if value < 1 else '+'} {number(abs(1 - value))}"
    return number(value)


def number(value: float) -> str:
    """A number in a sentence, three significant digits."""
    return "nothing (below rounding)" if 0 < abs(value) < NOTHING else numbers.number(value)
