"""What is a verdict? A profile of numbers, limits with their source, a sentence when one is crossed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from depthscope.diagnostics.verdicts.finding import Finding, Severity
from depthscope.diagnostics.verdicts.locations import place, span

# AltUp's branch output holds the active stream itself: its matrix gives that stream up, and products of matrices tell
# nothing; it always reads the active stream alone.
ALTUP = ("altup",)


@dataclass(frozen=True)
class Limits:
    """From which value on a verdict speaks, and how loudly.

    Parameters
    ----------
    info, warn, fail : float, optional
        Where each severity begins; None where the verdict does not have it.
    above : bool
        Whether values above the limits are bad, or values below.
    source : str
        A key of ``references.bib``, or ``"heuristic"``.
    """

    info: float | None = None
    warn: float | None = None
    fail: float | None = None
    above: bool = True
    source: str = "heuristic"

    @property
    def levels(self) -> list[tuple[Severity, float]]:
        """Severities with their limits, the mildest first."""
        named = ((Severity.INFO, self.info), (Severity.WARN, self.warn), (Severity.FAIL, self.fail))
        return [(severity, limit) for severity, limit in named if limit is not None]

    def beyond(self, values: np.ndarray, limit: float) -> np.ndarray:
        """Which values are beyond a limit; NaN is beyond none."""
        return values > limit if self.above else values < limit

    def severity(self, value: float) -> tuple[Severity, float]:
        """How bad a value is, and the limit that says so: the mildest one where the value is within."""
        crossed = [level for level in self.levels if self.beyond(np.asarray(value), level[1])]
        return crossed[-1] if crossed else (Severity.PASS, self.levels[0][1])


@dataclass(frozen=True)
class Profile:
    """What a verdict looks at: numbers along depth, along the connections, or one for the run.

    Parameters
    ----------
    values : DataArray
        One dim, ``depth``, ``connection`` or ``weight``, or none.
    words : str
        What the number is, to be followed by it: ``"the forward gain is"``.
    stream : str, optional
        The stream that it belongs to.
    first : bool
        Tell the first place beyond the limits, not the worst.
    ceiling : Severity
        The worst that it may be called.
    more : str
        A sentence that follows.
    shown : function, optional
        The number as people read it, where the profile holds another form of it.
    told : str
        The whole sentence, where place and number would say nothing.
    """

    values: xr.DataArray
    words: str
    stream: str | None = None
    first: bool = False
    ceiling: Severity = Severity.FAIL
    more: str = ""
    shown: Callable[[float], float] | None = None
    told: str = ""


@dataclass(frozen=True)
class Verdict:
    """One question with its limits; the docstring of its function is the title and the advice.

    Parameters
    ----------
    name, title, advice : str
        The function's name, the first line of its docstring, and the rest of it.
    metric : str
        The metric that the number comes from.
    limits : Limits
        Stated here and nowhere else.
    needs : tuple of str
        Variables of the analysis, and ``attrs``, that the function takes.
    function : function
        Variables in, profiles out; None where the question does not apply.
    wants : tuple of str
        Variables that it takes where they are there: its parameters that are None by default.
    not_for : tuple of str
        Families of connections for which the question has no meaning.
    """

    name: str
    title: str
    advice: str
    metric: str
    limits: Limits
    needs: tuple[str, ...]
    function: Callable[..., Iterable[Profile] | None]
    wants: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()

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
        missing = [name for name in self.needs if name != "attrs" and name not in analysis]
        if missing or analysis.attrs.get("family") in self.not_for:
            return []
        known = [name for name in self.wants if name in analysis]
        given = {
            name: analysis.attrs if name == "attrs" else analysis[name] for name in (*self.needs, *known)
        }
        found = [self._judge(profile) for profile in self.function(**given) or ()]
        return _folded([finding for finding in found if finding is not None])

    def _judge(self, profile: Profile) -> Finding | None:
        values = np.atleast_1d(profile.values.values.astype(float))
        if np.isnan(values).all():
            return None
        at = self._told(values, profile.first)
        severity, limit = self.limits.severity(values[at])
        severity = min(severity, profile.ceiling)
        mildest = self.limits.levels[0][1]
        beyond = np.flatnonzero(self.limits.beyond(values, mildest)) if severity else np.array([at])
        axis = str(profile.values.dims[0]) if profile.values.dims else "run"
        first, last = (-1, -1) if axis == "run" else (int(beyond[0]), int(beyond[-1]))
        return Finding(
            verdict=self.name,
            severity=severity,
            sentence=self._sentence(profile, values[at], limit, severity, at, beyond),
            metric=self.metric,
            value=_shown(profile, values[at]),
            threshold=_shown(profile, limit),
            source=self.limits.source,
            axis=axis,
            first=first,
            last=last,
            advice=self.advice,
            stream=profile.stream,
        )

    def _told(self, values: np.ndarray, first: bool) -> int:
        """The position to tell: the worst, or the first beyond the mildest limit."""
        beyond = np.flatnonzero(self.limits.beyond(values, self.limits.levels[0][1]))
        if first and len(beyond):
            return int(beyond[0])
        return int(np.nanargmax(values) if self.limits.above else np.nanargmin(values))

    def _sentence(
        self, profile: Profile, value: float, limit: float, severity: Severity, at: int, beyond: np.ndarray
    ) -> str:
        if profile.told:
            return profile.told
        side = "above" if self.limits.above else "below"
        held = f"{'' if severity else 'not '}{side} {number(_shown(profile, limit))}"
        where = f" {place(profile.values, at)}" if profile.values.dims else ""
        sentence = f"{profile.words} {number(_shown(profile, value))}{where}, {held} ({self.limits.source})"
        if severity and len(beyond) > 1:
            mildest = number(_shown(profile, self.limits.levels[0][1]))
            sentence += f"; it is {side} {mildest} {span(profile.values, beyond)}"
        more = f" {profile.more}" if profile.more and severity else ""
        return f"{sentence[0].upper()}{sentence[1:]}.{more}"


def verdict(
    *, metric: str, limits: Limits, not_for: tuple[str, ...] = ()
) -> Callable[[Callable[..., Iterable[Profile] | None]], Verdict]:
    """Declare the function below as a verdict; its parameters name variables of an analysis.

    Parameters
    ----------
    metric : str
        The metric that the number comes from.
    limits : Limits
        Where it begins to speak.
    not_for : tuple of str
        Families of connections that it does not judge.

    Returns
    -------
    function
        A decorator that makes a `Verdict`.
    """

    def declare(function: Callable[..., Iterable[Profile] | None]) -> Verdict:
        title, _, advice = (inspect.getdoc(function) or "").partition("\n")
        parameters = inspect.signature(function).parameters.values()
        needs, wants = (
            tuple(each.name for each in parameters if (each.default is None) is optional)
            for optional in (False, True)
        )
        words = " ".join(advice.split())
        return Verdict(function.__name__, title, words, metric, limits, needs, function, wants, not_for)

    return declare


def _folded(found: list[Finding]) -> list[Finding]:
    """The worst of the findings about a stream, its sentence followed by those of the others; passed ones stay."""
    kept = [finding for finding in found if finding.severity == Severity.PASS]
    beyond = sorted(
        (finding for finding in found if finding.severity),
        key=lambda finding: (finding.severity, finding.excess),
        reverse=True,
    )
    for stream in dict.fromkeys(finding.stream for finding in beyond):
        worst, *others = (finding for finding in beyond if finding.stream == stream)
        sentences = [
            worst.sentence,
            *(f"Also: {each.sentence[0].lower()}{each.sentence[1:]}" for each in others),
        ]
        kept.append(replace(worst, sentence=" ".join(sentences)))
    return kept


def _shown(profile: Profile, value: float) -> float:
    return float(value if profile.shown is None else profile.shown(value))


def number(value: float) -> str:
    """A number in a sentence, three significant digits.

    Parameters
    ----------
    value : float
        Any.

    Returns
    -------
    str

    Examples
    --------
    >>> number(3012.7), number(0.05), number(1e-7)
    ('3013', '0.05', '1e-07')
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
