"""Which findings follow from another one? Those that a worse or equal finding explains, further on in the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import xarray as xr

from depthscope.diagnostics.verdicts.finding import Finding, Severity

Span = tuple[int, int]
"""First and last depth of a finding."""

Relation = Callable[[Span, Span], bool]
"""Whether an effect, given its span and that of its cause, is where the cause explains it."""


def from_there_on(effect: Span, cause: Span) -> bool:
    """Whether the effect begins at the cause or deeper: what a depth does, all later ones inherit."""
    return effect[0] >= cause[0]


def deeper(effect: Span, cause: Span) -> bool:
    """Whether the effect begins deeper than the cause, which cannot act on its own input."""
    return effect[0] > cause[0]


def within(effect: Span, cause: Span) -> bool:
    """Whether the effect is nowhere but at the cause."""
    return cause[0] <= effect[0] and effect[1] <= cause[1]


def overlapping(effect: Span, cause: Span) -> bool:
    """Whether they have a depth in common."""
    return effect[0] <= cause[1] and cause[0] <= effect[1]


def anywhere(effect: Span, cause: Span) -> bool:
    """True: the cause reaches every depth, as one NaN spoils all gradients."""
    return True


def explain(
    findings: Sequence[Finding], analysis: xr.Dataset, causes: Mapping[str, Mapping[str, Relation]]
) -> list[Finding]:
    """Findings of one chain, those that follow from another one reduced to INFO.

    ``causes``: by verdict: the verdicts that it may follow from, and where.
    """
    return [_explained(finding, findings, analysis, causes.get(finding.verdict, {})) for finding in findings]


def _explained(
    finding: Finding, findings: Sequence[Finding], analysis: xr.Dataset, causes: Mapping[str, Relation]
) -> Finding:
    if finding.severity <= Severity.INFO:
        return finding
    for cause in findings:
        # A finding worse than its cause needs more than that cause, and is reported as it is.
        if cause.verdict not in causes or cause.severity < finding.severity:
            continue
        if causes[cause.verdict](depths_of(finding, analysis), depths_of(cause, analysis)):
            name = cause.verdict.replace("_", " ")
            sentence = f"{finding.sentence} It follows from another finding: {name}."
            return replace(finding, severity=Severity.INFO, sentence=sentence, because=cause.verdict)
    return finding


def worst_depth(finding: Finding, analysis: xr.Dataset) -> int | None:
    """The depth at which to look at a finding: where it is worst, of a connection the depth that it writes."""
    if finding.axis not in ("depth", "connection") or finding.first < 0:
        return None
    at = finding.worst if finding.worst >= 0 else finding.first
    return depths_of(replace(finding, first=at, last=at), analysis)[0]


def depths_of(finding: Finding, analysis: xr.Dataset) -> Span:
    """Depths of a finding: a connection is at the depth that it writes, a finding about the run at all."""
    if finding.axis == "depth":
        return finding.first, finding.last
    if finding.axis != "connection":
        return 0, analysis.sizes.get("depth", 0)
    if "depth_out" in analysis.coords:
        first, last = analysis["depth_out"].values[[finding.first, finding.last]].tolist()
        return first, last
    # Without that coordinate connection c writes depth c + 1, since depth 0 is the embedding.
    return finding.first + 1, finding.last + 1
