"""What is a verdict? Numbers along an axis, limits with their source, and a sentence where a limit is crossed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import numbers
from depthscope.diagnostics.numbers import percent
from depthscope.diagnostics.verdicts.age import Age, age_of
from depthscope.diagnostics.verdicts.calibration import DEFAULT, NOT_CONTRADICTED, as_far, source_of
from depthscope.diagnostics.verdicts.causes import Relation
from depthscope.diagnostics.verdicts.finding import Finding, Severity
from depthscope.diagnostics.verdicts.locations import place, span

# What is smaller is what the rounding of float64, 1e-16, leaves of a share after some connections.
NOTHING = 1e-20

# Families of connections for which a verdict has no meaning: streams that never mix by construction are no finding.
MEANINGLESS: dict[str, tuple[str, ...]] = {
    "stuck_at_identity": ("residual", "highway", "independent_hc", "gated"),
}


@dataclass(frozen=True)
class Limits:
    """From which value on a verdict reports, by severity.

    Parameters
    ----------
    info, warn, fail : float, optional
        Where each severity begins; None where the verdict does not have it.
    above : bool
        Whether values above the limits are bad, or values below.
    source : str
        A key of ``references.bib``, `calibration.DEFAULT`, or `calibration.NOT_CONTRADICTED`.
    scale : {"ratio", "cosine"}
        On which scale a number is far from its limit, see `Finding.excess`.
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
        return ", ".join(f"{severity.name} {side} {limit_words(limit)}" for severity, limit in self.levels)

    def beyond(self, values: np.ndarray, limit: float) -> np.ndarray:
        """Which values are beyond a limit; NaN is beyond none."""
        return values > limit if self.above else values < limit

    def severity(self, value: float) -> tuple[Severity, float]:
        """How bad a value is, and the limit that it crosses: the mildest one where it crosses none."""
        crossed = [level for level in self.levels if self.beyond(np.asarray(value), level[1])]
        return crossed[-1] if crossed else (Severity.PASS, self.levels[0][1])


@dataclass(frozen=True)
class Number:
    """The number that a verdict compares with its limits, as every page tells it.

    Parameters
    ----------
    name : str
        In words.
    formula : str
        In plain signs; empty for a count and for what a sentence says.
    range : str
        The values that it can have: ``"0 to 1"``.
    """

    name: str
    formula: str = ""
    range: str = ""


@dataclass(frozen=True)
class Profile:
    """What a verdict judges: numbers along depth, along the connections or modules, or one for the run.

    Parameters
    ----------
    values : DataArray
        One dim, ``depth``, ``connection`` or ``weight``, or none.
    words : str
        What the number is, to be followed by it: ``"the forward gain is"``.
    stream : str, optional
        The stream that it belongs to.
    begins : bool
        Whether the sentence has the number with which it begins beside the worst: of what spreads from there on.
    note_only : bool
        Whether it is a note however far beyond: what is known to be harmless, or may well be meant.
    at_any_age : bool
        Whether no network that begins to train is so far beyond: where its age is not known, nothing is taken off.
    note : str
        A further sentence.
    template : str
        The sentence up to the limit, in place of words, number and place: with ``{value}``, ``{percent}`` and ``{where}``.
    sentence : str
        The complete sentence, in place of the one made of `words`, number and position.
    metric : str
        The metric of which `values` are a slice as it is: its figures show the limits. Empty for numbers that are made of
        several, or compared with another position.
    """

    values: xr.DataArray
    words: str
    stream: str | None = None
    begins: bool = False
    note_only: bool = False
    at_any_age: bool = False
    note: str = ""
    template: str = ""
    sentence: str = ""
    metric: str = ""

    @property
    def quantity(self) -> str:
        """What the number is, without the verb that leads to it in a sentence."""
        words = re.split(r",? (?:is|has the size)\b", self.words)[0]
        return words.removeprefix("the ").rstrip(" ,")


@dataclass(frozen=True)
class Verdict:
    """One question with its limits; the docstring of its function is the title and the advice.

    Parameters
    ----------
    name, title, advice : str
        The function's name, the first line of its docstring, and the rest of it.
    metric : str
        The metric that the number comes from.
    judges : Number
        The number itself: it may be made of several metrics, or compared with another position.
    limits : Limits
        Stated here and nowhere else.
    needs : tuple of str
        Variables of the analysis, and ``attrs``, that the function takes.
    function : function
        Variables in, profiles out; None where the question does not apply.
    wants : tuple of str
        Variables that it takes where the analysis has them: its parameters that are None by default.
    follows_from : mapping of str to function
        Other verdicts that explain this one, and where, see `causes`; it is then no more than INFO.
    about : {"network", "reading"}
        What it is about, see `Finding`.
    drawn_on : tuple of str
        Metrics that are judged as they are, see `Profile.metric`: their figures show the limits.
    before_training : bool
        Whether such a number is normal in a network that is not trained: it is then a note, and where the age of the network
        is not known it warns, with both readings.
    suspicion : bool
        Whether its number alone is a suspicion, of which the experiment of `SETTLED_BY` shows whether it does harm; of the
        others the number is the harm.
    """

    name: str
    title: str
    advice: str
    metric: str
    judges: Number
    limits: Limits
    needs: tuple[str, ...]
    function: Callable[..., Iterable[Profile] | None]
    wants: tuple[str, ...] = ()
    follows_from: Mapping[str, Relation] = field(default_factory=dict)
    about: str = "network"
    drawn_on: tuple[str, ...] = ()
    before_training: bool = False
    suspicion: bool = False

    @property
    def judged(self) -> str:
        """What is compared with which limits: name, formula and range of the number, then each severity with its side."""
        formula = f", {self.judges.formula}" if self.judges.formula else ""
        return f"{self.judges.name}{formula} ({self.judges.range}): {self.limits.words}"

    @property
    def not_for(self) -> tuple[str, ...]:
        """Families of connections for which the question has no meaning."""
        return MEANINGLESS.get(self.name, ())

    def findings(self, analysis: xr.Dataset) -> list[Finding]:
        """Judge one chain.

        Parameters
        ----------
        analysis : Dataset
            What `diagnostics.analyze` gives, without ``step``.

        Returns
        -------
        list of Finding
            PASS among them; one for each stream where several numbers are beyond; empty where the question
            does not apply.
        """
        age = cache(partial(age_of, analysis))  # most verdicts pass, and ask for none
        found = [self._judge(profile, age) for profile in self.profiles(analysis)]
        merged = _merged_by_stream([finding for finding in found if finding is not None])
        return [self._with_reference(finding) for finding in merged]

    def _with_reference(self, finding: Finding) -> Finding:
        """A finding about the network with how many healthy ones have such a number."""
        # Their numbers along an axis are others than one of the run.
        if not finding.severity or self.about != "network" or (self.drawn_on and finding.axis == "run"):
            return finding
        told = as_far(self.name, finding.value, above=finding.above)
        return replace(finding, sentence=f"{finding.sentence}{told}")

    def profiles(self, analysis: xr.Dataset) -> list[Profile]:
        """What is judged of one chain; empty where the question does not apply, or its variables are missing."""
        if self.missing(analysis) or analysis.attrs.get("family") in self.not_for:
            return []
        arguments: dict[str, Any] = {}
        for name in (*self.needs, *self.wants):
            if name == "attrs":
                arguments[name] = analysis.attrs
            elif name in analysis:
                arguments[name] = analysis[name]
        return list(self.function(**arguments) or ())

    def limits_on(self, metric: str, analysis: xr.Dataset) -> list[Limits]:
        """The limits that one chain's values of a metric are compared with, for its figures."""
        is_judged = metric in self.drawn_on and any(each.metric == metric for each in self.profiles(analysis))
        return [self.limits] if is_judged else []

    def missing(self, analysis: xr.Dataset) -> list[str]:
        """Variables without which it cannot judge, and that an analysis does not have."""
        return [name for name in self.needs if name != "attrs" and name not in analysis]

    def _judge(self, profile: Profile, age: Callable[[], Age]) -> Finding | None:
        values = np.atleast_1d(profile.values.values.astype(float))
        if np.isnan(values).all():  # undefined is neither passed nor failed
            return None
        limits = self.limits
        mildest = limits.levels[0][1]
        beyond = np.flatnonzero(limits.beyond(values, mildest))
        at = int(np.nanargmax(values) if limits.above else np.nanargmin(values))
        severity, limit = limits.severity(values[at])
        # After the limit is known: the sentence names the limit that was crossed, whatever the severity becomes.
        readings = ""
        if severity > Severity.INFO and profile.note_only:
            severity = Severity.INFO
        if severity > Severity.INFO and self.before_training and not age().trained:
            is_fresh = age().trained is False
            if is_fresh or not profile.at_any_age:
                severity = Severity.INFO if is_fresh else Severity.WARN
                readings = _both_readings(age())
        if not severity:  # a passed verdict is at its worst value, for no position is beyond the limits
            beyond = np.array([at])
        axis = str(profile.values.dims[0]) if profile.values.dims else "run"
        first, last = (-1, -1) if axis == "run" else (int(beyond[0]), int(beyond[-1]))
        return Finding(
            verdict=self.name,
            severity=severity,
            sentence=f"{self._sentence(profile, values[at], limit, severity, at, beyond)}{readings}",
            metric=profile.metric or self.metric,
            value=float(values[at]),
            threshold=float(limit),
            source=self.limits.source,
            axis=axis,
            first=first,
            last=last,
            advice=self.advice,
            stream=profile.stream,
            quantity=profile.quantity,
            above=limits.above,
            worst=-1 if axis == "run" else at,
            scale=limits.scale,
            about=self.about,
            profile=tuple(values.tolist()) if profile.values.dims else (),
        )

    def _sentence(
        self, profile: Profile, value: float, limit: float, severity: Severity, at: int, beyond: np.ndarray
    ) -> str:
        if profile.sentence:
            return profile.sentence
        limits = self.limits
        side = "above" if limits.above else "below"
        where = place(profile.values, at) if profile.values.dims else ""
        written = number
        said = f"{profile.words} {number(value)} {where}"
        if severity and profile.template:
            written = percent if "{percent}" in profile.template else number
            said = profile.template.format(value=number(value), percent=percent(value), where=where)
        sentence = f"{said.rstrip()}, limit {written(limit)} ({self.limits.source})"
        if severity and len(beyond) > 1:
            begins = ""
            if profile.begins and beyond[0] != at:
                first = int(beyond[0])
                begins = (
                    f"begins with {written(float(profile.values[first]))} {place(profile.values, first)} and "
                )
            mildest = written(limits.levels[0][1])
            sentence += f"; it {begins}is {side} {mildest} {span(profile.values, beyond)}"
        note = f" {profile.note}" if profile.note and severity else ""
        return f"{sentence[0].upper()}{sentence[1:]}.{note}"


def verdict(
    *,
    metric: str,
    judges: Number,
    limits: Limits,
    follows_from: Mapping[str, Relation] | None = None,
    about: str = "network",
    drawn_on: tuple[str, ...] = (),
    before_training: bool = False,
    suspicion: bool = False,
) -> Callable[[Callable[..., Iterable[Profile] | None]], Verdict]:
    """Declare the function below as a verdict; its parameters name variables of an analysis.

    Parameters
    ----------
    metric : str
        The metric that the number comes from.
    judges : Number
        What is compared with the limits.
    limits : Limits
        From which value on it reports.
    follows_from : mapping of str to function, optional
        See `Verdict`.
    about, drawn_on, before_training, suspicion
        See `Verdict`.

    Returns
    -------
    function
        A decorator that makes a `Verdict`.
    """

    def declare(function: Callable[..., Iterable[Profile] | None]) -> Verdict:
        title, _, advice = (inspect.getdoc(function) or "").partition("\n")
        parameters = inspect.signature(function).parameters.values()
        return Verdict(
            name=function.__name__,
            title=title,
            advice=" ".join(advice.split()),
            metric=metric,
            judges=judges,
            limits=_sourced(function.__name__, limits),
            needs=tuple(each.name for each in parameters if each.default is not None),
            function=function,
            wants=tuple(each.name for each in parameters if each.default is None),
            follows_from=follows_from or {},
            about=about,
            drawn_on=drawn_on,
            before_training=before_training,
            suspicion=suspicion,
        )

    return declare


def _both_readings(age: Age) -> str:
    """How a number that is normal before training reads in a network that is not trained, or may not be."""
    if age.trained is False:
        return f" Normal before training: {age.words}."
    return f" If the network is trained, this is a fault; before training it is normal, and {age.words}."


def _sourced(name: str, limits: Limits) -> Limits:
    """The limits with the source as it is told: how many networks do not contradict them."""
    if limits.source != NOT_CONTRADICTED:
        return limits
    return replace(limits, source=source_of(name, mildest=limits.levels[0][1], above=limits.above))


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


def limit_words(value: float) -> str:
    """A limit in three digits; where these are 1 and it is not, its distance from 1."""
    if value != 1 and number(value) == number(1.0):
        return f"1 {'−' if value < 1 else '+'} {number(abs(1 - value))}"
    return number(value)


def number(value: float) -> str:
    """A number in a sentence, three significant digits.

    Examples
    --------
    >>> number(3012.7), number(0.05), number(1e-7)
    ('3013', '0.05', '1e-7')
    """
    if 0 < abs(value) < NOTHING:
        return "nothing (below rounding)"
    return numbers.number(value)
