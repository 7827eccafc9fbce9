"""What is wrong with a run, and what to try? Every verdict, and `judge`, which applies them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.registry import with_row_facts
from depthscope.diagnostics.schema import GROUPS, by_chain
from depthscope.diagnostics.verdicts import (
    magnitude,
    reading,
    representation,
    same_representation,
    streams,
    training,
    uncertainty,
    wiring,
)
from depthscope.diagnostics.verdicts.causes import explain
from depthscope.diagnostics.verdicts.declaration import Limits, Profile, Verdict, verdict
from depthscope.diagnostics.verdicts.finding import Finding, Findings, Severity
from depthscope.diagnostics.verdicts.reading import with_proof
from depthscope.diagnostics.verdicts.rule import CONSEQUENCES, Kind

__all__ = [
    "VERDICTS",
    "Finding",
    "Findings",
    "Kind",
    "Limits",
    "Profile",
    "Severity",
    "Verdict",
    "judge",
    "verdict",
]

ROOMS = (same_representation, reading, training, wiring, magnitude, streams, representation)
# In the order in which passed verdicts are listed; findings are ordered by `judge`.
VERDICTS: dict[str, Verdict] = {
    each.name: each for room in ROOMS for each in vars(room).values() if isinstance(each, Verdict)
}
ABOUT_THE_RUN = {reading.nothing_measured.name} | {
    each.name for each in VERDICTS.values() if each.kind is Kind.READING
}
"""Verdicts that say how far a run can be trusted, and nothing about its network."""


def judge(analysis: xr.Dataset | xr.DataTree, *, passed: bool = False) -> Findings:
    """Findings about a run, the worst first.

    Parameters
    ----------
    analysis : Dataset or DataTree
        What `diagnostics.analyze` returns; of several training steps the last is judged.
    passed : bool
        Return the verdicts without a finding too, as PASS.

    Returns
    -------
    Findings
        A list of Finding. Within a severity the furthest beyond its threshold first; those about the reading after all about
        the network. What follows from another finding is INFO and names it.

    Raises
    ------
    InputError
        For what is no analysis, such as a run.
    """
    chains: dict[Finding, list[str]] = {}  # what is said of the run alone, such as of its code, is said once
    for chain, part in magnitude.with_joined_stages(_analysis_by_chain(analysis)).items():
        for finding in _judge_chain(part, chain):
            of_run = finding if finding.axis == "run" else replace(finding, chain=chain)
            chains.setdefault(of_run, []).append(chain)
    found = []
    for finding, of in chains.items():
        names = ", ".join(dict.fromkeys(of))
        which = f" {'These are chains' if ', ' in names else 'This is chain'} {names}." if names else ""
        if passed or finding.severity > Severity.PASS:
            found.append(replace(finding, chain=of[0], sentence=f"{finding.sentence}{which}"))
    return Findings(sorted(found, key=_severity_order))


@cache
def judged_metrics() -> tuple[str, ...]:
    """The metrics that verdicts, and the age of a network, are read off."""
    taken = {name for verdict in VERDICTS.values() for name in (*verdict.needs, *verdict.wants)}
    taken.add("first_weight_distance")
    return tuple(name for name in CATALOGUE if taken & {name, f"{name}_null"})


def last_step(analysis: xr.Dataset) -> xr.Dataset:
    """What verdicts judge: arrays without steps. The earlier ones are for the curves."""
    return analysis.isel(step=-1) if "step" in analysis.dims else analysis


def suspected(analysis: xr.Dataset) -> list[Finding]:
    """What statistics and the loss of one chain suspect, the worst first: what `depthscope.settle` tries is among it."""
    last = with_row_facts(last_step(analysis))
    found = [each for verdict in VERDICTS.values() for each in verdict.findings(last) if each.explains]
    return sorted(
        explain(found, last, VERDICTS),
        key=lambda each: (bool(each.because), *_severity_order(each)),
    )


def _judge_chain(analysis: xr.Dataset, chain: str) -> list[Finding]:
    last = _without_overflow(with_row_facts(last_step(analysis)))
    results = last.attrs.get(CONSEQUENCES)
    results = results if isinstance(results, (list, tuple)) else ()
    of_chain = [each for each in results if isinstance(each, Mapping) and each.get("chain", "") == chain]
    last = last.assign_attrs({CONSEQUENCES: of_chain})
    found = [finding for each in VERDICTS.values() for finding in uncertainty.findings(each, last)]
    judged = {finding.verdict for finding in found} - ABOUT_THE_RUN
    found += reading.nothing_measured.findings(last.assign_attrs({reading.JUDGED: len(judged)}))
    explained = explain(found, last, VERDICTS)
    return [with_proof(each, analysis.attrs) for each in explained]


def _without_overflow(analysis: xr.Dataset) -> xr.Dataset:
    """An analysis of one step without its gradients, where a scaler that looked for its scale skipped that step."""
    overflowed = np.atleast_1d(np.asarray(analysis.attrs.get("overflowed_steps", ()), dtype=float))
    if "step" not in analysis.coords or float(analysis["step"]) not in overflowed:
        return analysis
    of_gradients = [
        name
        for name in map(str, analysis.data_vars)
        if name in CATALOGUE and any("gradient" in root for root in CATALOGUE[name].roots)
    ]
    return analysis.drop_vars(of_gradients)


def _severity_order(finding: Finding) -> tuple[bool, float, bool, float]:
    """Sort key: the worst first, those that follow from another one last, passed ones in the order of VERDICTS."""
    if not finding.severity:
        return True, 0.0, False, 0.0
    return finding.about == "reading", -finding.severity, bool(finding.because), -finding.excess


def _analysis_by_chain(analysis: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """The analysis of each chain, by its name; "" where there is one."""
    if not isinstance(analysis, xr.Dataset | xr.DataTree):
        raise _no_analysis(f"a {type(analysis).__name__}")
    if isinstance(analysis, xr.DataTree) and set(GROUPS) & set(analysis.children):
        raise _no_analysis("a run")
    found = by_chain(analysis)
    for chain, part in found.items():
        # An analysis of a run that can feed no metric has reasons only.
        if "not_computed" not in part.attrs and not set(CATALOGUE) & set(part.data_vars):
            raise _no_analysis(f"a dataset without any metric{f' at {chain}' if chain else ''}")
    return found


def _no_analysis(given: str) -> InputError:
    return InputError(f"got {given}; expected what ds.analyze returns: ds.judge(ds.analyze(run))")
