"""Is the network what the run says that it is? The verdict on its proof, and the words that every other finding carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import xarray as xr

from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.schema import PROVEN, UNPROVEN
from depthscope.diagnostics.verdicts.calibration import DEFAULT
from depthscope.diagnostics.verdicts.declaration import Limits, Number, Profile, verdict
from depthscope.diagnostics.verdicts.finding import Finding


@verdict(
    metric="residual_norm",
    judges=Number("number of readings that are not proven", range="0 or more"),
    limits=Limits(info=0.0),
    about="reading",
)
def unproven_reading(attrs: Mapping[str, Any]) -> Iterable[Profile] | None:
    """The reported connections could not be verified against the forward pass.

    The states are those of the model; that they are joined as reported is not recomputed. Name the blocks with layers=, or
    read the reason: what it names is in no finding and no figure.
    """
    proof = str(attrs.get("proof", ""))
    if not proof.startswith((PROVEN, UNPROVEN)):  # a run of an earlier version has no such attribute
        return None
    sentence = (
        "" if proof == PROVEN else f"{unproven_sentence(proof)} Every reading should be proven ({DEFAULT})."
    )
    return [
        Profile(
            xr.DataArray(float(proof != PROVEN)),
            "the number of readings that are not proven is",
            sentence=sentence,
        )
    ]


JUDGED = "verdicts_judged"
"""Attribute that `judge` gives to an analysis: how many verdicts about the network could be judged."""


@verdict(
    metric="num_tokens",
    judges=Number("number of verdicts that could be judged", range="0 or more"),
    limits=Limits(fail=1.0, above=False),
)
def nothing_measured(attrs: Mapping[str, Any]) -> Iterable[Profile] | None:
    """Nothing was measured: no verdict could be judged.

    That nothing else was found says nothing. Read the reason; where the mask leaves no token, true or 1 is a real token.
    """
    reasons = Counter(map(str, attrs.get("not_computed", {}).values()))
    # Where all that was asked for has numbers, as in an analysis of a few metrics, the question does not arise.
    if attrs.get(JUDGED, 1) or not reasons:
        return None
    why = reasons.most_common(1)[0][0]
    sentence = f"No verdict about the network could be judged; one is the least ({DEFAULT}): {why}."
    return [Profile(xr.DataArray(0.0), "the number of verdicts is", sentence=sentence)]


def unproven_sentence(proof: str) -> str:
    """The sentence that every finding of an unproven reading carries."""
    return f"This reading is unproven: {proof.removeprefix(UNPROVEN)}."


def with_proof(finding: Finding, attrs: Mapping[str, Any]) -> Finding:
    """A finding with where the reading that it is about is unproven."""
    proof = str(attrs.get("proof", ""))
    if not proof.startswith(UNPROVEN):
        return replace(finding, proof=proof)
    sentence = finding.sentence
    if unproven_sentence(proof) not in sentence:
        sentence = f"{sentence} {unproven_sentence(proof)}"
    return replace(finding, proof=proof, sentence=sentence)


def with_inferred_reads(finding: Finding, attrs: Mapping[str, Any]) -> Finding:
    """A finding with where it rests on read weights that no module gives, and how well they fit what was read."""
    metric = CATALOGUE.get(finding.metric)
    inferred = attrs.get("inferred_reads")
    if not inferred or metric is None or not {"h_pre", "read"} & set(metric.roots):
        return finding
    return replace(finding, sentence=f"{finding.sentence} {inferred}")
