"""Which findings follow from another one? Those that tell the same fact, further on in the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import xarray as xr

from depthscope.diagnostics.verdicts.finding import Finding, Severity

Span = tuple[int, int]


def _behind(effect: Span, cause: Span) -> bool:
    """It begins where the cause does, or deeper."""
    return effect[0] >= cause[0]


def _after(effect: Span, cause: Span) -> bool:
    """It begins deeper than the cause does."""
    return effect[0] > cause[0]


def _within(effect: Span, cause: Span) -> bool:
    """It holds at no other place than the cause."""
    return cause[0] <= effect[0] and effect[1] <= cause[1]


def _beside(effect: Span, cause: Span) -> bool:
    """They have a place in common."""
    return effect[0] <= cause[1] and cause[0] <= effect[1]


def _anywhere(effect: Span, cause: Span) -> bool:
    """The cause reaches every place, as what is not finite spoils all gradients."""
    return True


# By cause: what it brings about, and where.
CONSEQUENCES: dict[str, tuple[tuple[str, Callable[[Span, Span], bool]], ...]] = {
    "residual_not_finite": (("gradient_not_finite", _anywhere), ("mixing_not_finite", _after)),
    "mixing_not_finite": (("residual_not_finite", _behind), ("gradient_not_finite", _anywhere)),
    "dead_state": (("vanishing_gradient", _anywhere), ("rank_collapse", _behind)),
    "exploding_gradient": (("exploding_state", _anywhere),),
    "vanishing_gradient": (("vanishing_state", _anywhere),),
    "single_gain_explosion": (("gain_explosion", _behind), ("idle_layer", _behind)),
    "gain_explosion": (("idle_layer", _beside), ("exploding_gradient", _anywhere)),
    "uniform_mixing": (("stream_collapse", _behind), ("copied_streams", _behind)),
    "stream_collapse": (("copied_streams", _beside),),
    "sinkhorn_not_converged": (("expansive_mixing", _behind), ("attenuation", _behind)),
    "negative_mixing": (("expansive_mixing", _behind),),
    "unmoved_mixing": (("decayed_mixing", _anywhere),),
    "dominant_stream": (("unread_stream", _anywhere),),
    "wasted_layer": (("idle_layer", _within),),
    "passing_streams": (("copied_streams", _anywhere),),
    "rank_collapse": (("dimensional_collapse", _behind),),
}


def traced(findings: Sequence[Finding], analysis: xr.Dataset) -> list[Finding]:
    """Findings of one chain, those that follow from another one being no more than information.

    Parameters
    ----------
    findings : sequence of Finding
        Of one chain.
    analysis : Dataset
        That they are about.

    Returns
    -------
    list of Finding
        In the same order.
    """
    return [_traced(finding, findings, analysis) for finding in findings]


def _traced(finding: Finding, findings: Sequence[Finding], analysis: xr.Dataset) -> Finding:
    if finding.severity <= Severity.INFO:
        return finding
    for cause in findings:
        # What is worse than its cause is told for itself.
        for effect, where in (
            CONSEQUENCES.get(cause.verdict, ()) if cause.severity >= finding.severity else ()
        ):
            if effect == finding.verdict and where(_depths(finding, analysis), _depths(cause, analysis)):
                told = (
                    f"{finding.sentence} It follows from another finding: {cause.verdict.replace('_', ' ')}."
                )
                return replace(finding, severity=Severity.INFO, sentence=told, because=cause.verdict)
    return finding


def _depths(finding: Finding, analysis: xr.Dataset) -> Span:
    """Where a finding holds, in depths: a connection is at the depth that it writes, a whole run everywhere."""
    if finding.axis == "depth":
        return finding.first, finding.last
    if finding.axis != "connection":
        return 0, analysis.sizes.get("depth", 0)
    if "depth_out" in analysis.coords:
        first, last = analysis["depth_out"].values[[finding.first, finding.last]].tolist()
        return first, last
    return finding.first + 1, finding.last + 1
