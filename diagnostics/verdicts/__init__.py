"""What is wrong with a run, and what to try? Every verdict, and `judge`, which asks them all."""

from __future__ import annotations

from dataclasses import replace

import xarray as xr

from diagnostics.finding import Finding, Severity
from diagnostics.verdicts import learning, representation, signal, streams, training
from diagnostics.verdicts.causes import traced
from diagnostics.verdicts.verdict import Limits, Profile, Verdict, verdict

__all__ = ["VERDICTS", "Finding", "Limits", "Profile", "Severity", "Verdict", "judge", "verdict"]

VERDICTS: dict[str, Verdict] = {
    each.name: each
    for each in (
        signal.residual_not_finite,
        signal.gradient_not_finite,
        signal.gain_explosion,
        signal.single_gain_explosion,
        signal.attenuation,
        signal.exploding_gradient,
        signal.vanishing_gradient,
        streams.sinkhorn_not_converged,
        streams.negative_mixing,
        streams.expansive_mixing,
        streams.uniform_mixing,
        streams.stream_collapse,
        streams.stuck_at_identity,
        streams.some_connections_stuck,
        learning.unmoved_mixing,
        learning.decayed_mixing,
        streams.unread_stream,
        streams.unwritten_stream,
        streams.dominant_stream,
        streams.copied_streams,
        streams.passing_streams,
        streams.wasted_layer,
        streams.ambiguous_orientation,
        representation.rank_collapse,
        representation.dimensional_collapse,
        representation.idle_layer,
        representation.massive_activations,
        representation.few_tokens_for_cka,
        representation.small_sample,
        training.large_update,
        training.lost_update,
    )
}


def judge(analysis: xr.Dataset | xr.DataTree, *, passed: bool = False) -> list[Finding]:
    """Findings about a run, the worst first.

    Parameters
    ----------
    analysis : Dataset or DataTree
        What `diagnostics.analyze` gives; of several training steps the last is judged.
    passed : bool
        Give the verdicts that were met too, as PASS.

    Returns
    -------
    list of Finding
        Within a severity the furthest beyond its threshold first. What follows from another finding is INFO and
        names it.
    """
    if isinstance(analysis, xr.DataTree):
        found = [
            replace(each, chain=chain)
            for chain, node in analysis.children.items()
            for each in _judge(node.to_dataset())
        ]
        found += _judge(analysis.to_dataset())
    else:
        found = _judge(analysis)
    kept = [finding for finding in found if passed or finding.severity > Severity.PASS]
    return sorted(kept, key=_order)


def _order(finding: Finding) -> tuple[float, bool, float]:
    """The worst first, those that follow from another one after the rest, passed ones as they came."""
    return -finding.severity, bool(finding.because), -finding.excess if finding.severity else 0.0


def _judge(analysis: xr.Dataset) -> list[Finding]:
    last = analysis.isel(step=-1) if "step" in analysis.dims else analysis
    return traced([finding for each in VERDICTS.values() for finding in each.findings(last)], last)
