"""Is a finding certain? Whether it would still be one anywhere in the interval of the numbers that it is made of."""

from __future__ import annotations

from dataclasses import replace

import xarray as xr

from depthscope.diagnostics.metrics.intervals import DEGREES, LEVEL, half_width
from depthscope.diagnostics.verdicts.declaration import Verdict
from depthscope.diagnostics.verdicts.finding import Finding, Severity


def findings(verdict: Verdict, analysis: xr.Dataset) -> list[Finding]:
    """The findings of a verdict, those that lie within the uncertainty of their numbers marked as not decided.

    Every number that the verdict takes and that has a standard error over sequences is moved to both ends of its 95 %
    interval, together and one by one, and the verdict is asked again. What passes at one of the ends is not decided: the
    same network may pass with other sequences. It becomes a note.
    """
    found = verdict.findings(analysis)
    errors = {
        name: analysis[f"{name}_stderr"]
        for name in (*verdict.needs, *verdict.wants)
        if f"{name}_stderr" in analysis
    }
    errors = {name: error for name, error in errors.items() if DEGREES in error.attrs}
    if not errors or not any(finding.severity > Severity.INFO for finding in found):
        return found
    together = [list(errors)] if len(errors) == 1 else [list(errors), *([name] for name in errors)]
    ends = [
        verdict.findings(analysis.assign({name: _end(analysis[name], errors[name], sign) for name in moved}))
        for sign in (-1.0, 1.0)
        for moved in together
    ]
    sequences = min(int(error.attrs[DEGREES]) for error in errors.values()) + 1
    return [
        _undecided(finding, sequences)
        if finding.severity > Severity.INFO and any(_passes(end, finding) for end in ends)
        else finding
        for finding in found
    ]


def _end(values: xr.DataArray, error: xr.DataArray, sign: float) -> xr.DataArray:
    # Where there is no error, as for pooled tokens, the number stays.
    moved = values + sign * half_width(error).fillna(0.0)
    return moved.transpose(*values.dims).assign_attrs(values.attrs)


def _passes(end: list[Finding], finding: Finding) -> bool:
    """Whether a verdict passes for the stream of a finding."""
    return all(not other.severity for other in end if other.stream == finding.stream)


def _undecided(finding: Finding, sequences: int) -> Finding:
    advice = "capture more sequences to decide it"
    return replace(
        finding,
        severity=Severity.INFO,
        undecided=f"not decided: {advice}",
        explains=False,
        sentence=(
            f"{finding.sentence} Not decided: within the {100 * LEVEL:g} % interval over {sequences} sequences it may be "
            f"on the other side of its limit; {advice}."
        ),
    )
