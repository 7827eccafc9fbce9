"""What is wrong with a run, and what to try? Every verdict, and `judge`, which asks them all."""

from __future__ import annotations

from dataclasses import replace

import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.verdicts import learning, representation, signal, streams, training
from depthscope.diagnostics.verdicts.causes import traced
from depthscope.diagnostics.verdicts.finding import Finding, Severity
from depthscope.diagnostics.verdicts.verdict import Limits, Profile, Verdict, verdict

__all__ = ["VERDICTS", "Finding", "Limits", "Profile", "Severity", "Verdict", "judge", "verdict"]

VERDICTS: dict[str, Verdict] = {
    each.name: each
    for each in (
        signal.residual_not_finite,
        signal.mixing_not_finite,
        signal.dead_state,
        signal.exploding_state,
        signal.vanishing_state,
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

    Raises
    ------
    ValueError
        For what is no analysis, such as a run.
    """
    found = [
        replace(each, chain=chain) if chain else each
        for chain, part in _parts(analysis).items()
        for each in _judge(part)
    ]
    kept = [finding for finding in found if passed or finding.severity > Severity.PASS]
    return sorted(kept, key=_order)


def _parts(analysis: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """The analyses of an analysis, by chain."""
    if isinstance(analysis, xr.Dataset):
        parts = {"": analysis}
    elif not isinstance(analysis, xr.DataTree):
        raise _no_analysis(f"a {type(analysis).__name__}")
    elif set(schema.GROUPS) & set(analysis.children):
        raise _no_analysis("a run")
    elif analysis.children:
        parts = {chain: node.to_dataset() for chain, node in analysis.children.items()}
    else:
        parts = {"": analysis.to_dataset()}
    for chain, part in parts.items():
        if "not_computed" not in part.attrs and not set(CATALOGUE) & set(part.data_vars):
            raise _no_analysis(f"a dataset without any metric{f' at {chain}' if chain else ''}")
    return parts


def _no_analysis(came: str) -> ValueError:
    return ValueError(f"came {came}; expected what diagnostics.analyze gives: judge(analyze(run))")


def _order(finding: Finding) -> tuple[float, bool, float]:
    """The worst first, those that follow from another one after the rest, passed ones as they came."""
    return -finding.severity, bool(finding.because), -finding.excess if finding.severity else 0.0


def _judge(analysis: xr.Dataset) -> list[Finding]:
    last = analysis.isel(step=-1) if "step" in analysis.dims else analysis
    return traced([finding for each in VERDICTS.values() for finding in each.findings(last)], last)
