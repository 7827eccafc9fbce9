"""Where in depth is a finding, and which findings does another one explain? Both are asked of their names and spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import xarray as xr

from depthscope.diagnostics.verdicts.declaration import Verdict
from depthscope.diagnostics.verdicts.finding import Finding, Severity
from depthscope.diagnostics.verdicts.rule import Kind


def explain(
    findings: Sequence[Finding], analysis: xr.Dataset, verdicts: Mapping[str, Verdict]
) -> list[Finding]:
    """Findings of one chain, of which those that another one explains name it.

    An effect is a note where a loud finding that is at least as bad as it explains it: what a depth does, all later ones
    inherit. What the loss shows stays loud, and names where to look: at the repair that lowers it, or else at the statistic
    that is farthest beyond its limit.
    """
    causes = {name: of.follows_from for name, of in verdicts.items()}
    found = [_effect(each, findings, analysis, causes.get(each.verdict, ())) for each in findings]
    on_the_loss = {name for name, of in verdicts.items() if of.kind is Kind.LOSS and of.metric == "loss"}
    notes = [each for each in findings if each.explains and each.verdict not in on_the_loss]
    places = sorted(notes, key=lambda each: (each.axis != "run", each.excess))
    places += [each for each in found if each.verdict == "off_minimum" and each.severity > Severity.INFO]

    def with_place(each: Finding) -> Finding:
        others = [place for place in places if place.verdict != each.verdict]
        if each.verdict not in on_the_loss or each.severity <= Severity.INFO or each.because or not others:
            return each
        sentence = f"{each.sentence} Look first at {_named(others[-1])}."
        return replace(each, because=others[-1].verdict, sentence=sentence)

    return [with_place(each) for each in found]


def _effect(
    finding: Finding, findings: Sequence[Finding], analysis: xr.Dataset, causes: Sequence[str]
) -> Finding:
    if finding.severity <= Severity.INFO:
        return finding
    for cause in findings:
        # A finding worse than its cause needs more than that cause, and is reported as it is.
        if cause.verdict not in causes or cause.severity < finding.severity:
            continue
        # A gradient inherits what deeper blocks do, everything else what earlier ones do.
        if "gradient" in finding.verdict or depths_of(finding, analysis)[1] >= depths_of(cause, analysis)[0]:
            sentence = (
                f"{finding.sentence} It follows from another finding: {cause.verdict.replace('_', ' ')}."
            )
            return replace(finding, severity=Severity.INFO, sentence=sentence, because=cause.verdict)
    return finding


def _named(finding: Finding) -> str:
    name = finding.verdict.replace("_", " ")
    if finding.axis == "run":
        return name
    end = "" if finding.last == finding.first else f" to {finding.last}"
    return f"{name} at {finding.axis} {finding.first}{end}"


def worst_depth(finding: Finding, analysis: xr.Dataset) -> int | None:
    """The depth at which to look at a finding: where it is worst, of a connection the depth that it writes."""
    if finding.axis not in ("depth", "connection") or finding.first < 0:
        return None
    at = finding.worst if finding.worst >= 0 else finding.first
    return depths_of(replace(finding, first=at, last=at), analysis)[0]


def depths_of(finding: Finding, analysis: xr.Dataset) -> tuple[int, int]:
    """First and last depth of a finding: a connection is at the depth that it writes, a finding about the run at all."""
    if finding.axis == "depth":
        return finding.first, finding.last
    if finding.axis != "connection":
        return 0, analysis.sizes.get("depth", 0)
    if "depth_out" in analysis.coords:
        first, last = analysis["depth_out"].values[[finding.first, finding.last]].tolist()
        return first, last
    # Without that coordinate connection c writes depth c + 1, since depth 0 is the embedding.
    return finding.first + 1, finding.last + 1
