"""Is the network what the run says that it is? The verdict on its proof, and the words that every other finding carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import xarray as xr

from depthscope.diagnostics.schema import PROVEN, UNPROVEN
from depthscope.diagnostics.verdicts.age import FEWEST, Inputs
from depthscope.diagnostics.verdicts.declaration import DEFAULT, Limits, Profile, verdict
from depthscope.diagnostics.verdicts.finding import Finding
from depthscope.diagnostics.verdicts.representation import EQUAL
from depthscope.diagnostics.verdicts.rule import Kind


@verdict(
    Kind.READING,
    metric="num_tokens",
    judges="number of questions that the sample is small for",
    limits=Limits(info=0.0),
)
def small_sample(
    attrs: Mapping[str, Any],
    inputs: Inputs,
    dong_residual: xr.DataArray | None = None,
    sequence_share: xr.DataArray | None = None,
    num_tokens: xr.DataArray | None = None,
) -> Iterator[Profile]:
    """The sample is small for some of the questions.

    These numbers say more about the sample than about the network: capture more sequences, or longer ones, with different
    tokens in every sequence.
    """
    # The rank of gradients is at most the number of sequences, a handful in every run: its null is the comparison.
    notes = {name: note for name, note in attrs.get("notes", {}).items() if name != "gradient_rank"}
    errors = notes.pop("standard errors", "")
    sentences = [f"{errors[0].upper()}{errors[1:]}."] if errors else []
    sentences += [
        f"The sample is small for {name.replace('_', ' ')}: {note}." for name, note in notes.items()
    ]
    # Data without tokens has no sequences to collapse.
    if dong_residual is not None and (
        num_tokens is None or float(num_tokens.sel(scope="sequence", tokens="all").max()) > 1.0
    ):
        sentences += _without_differences(dong_residual, inputs, sequence_share)
    yield Profile(float(len(sentences)), sentence=" ".join(sentences))


def _without_differences(
    dong_residual: xr.DataArray, inputs: Inputs, share: xr.DataArray | None
) -> Iterable[str]:
    """What a batch whose tokens or sequences are all the same cannot show."""
    tokens = inputs.per_sequence
    first = dong_residual.sel(tokens="ordinary", stream="mean").isel(depth=0)
    if (tokens is None and float(first) < EQUAL) or tokens == 1:
        yield "All tokens of each sequence are identical at the embedding: this batch cannot show rank collapse."
    elif tokens is not None and tokens < FEWEST:
        yield f"The sequences have {tokens:.2g} different tokens each: this batch cannot show rank collapse."
    elif share is None or tokens is None or inputs.in_all != tokens:
        return
    elif float(share.sel(stream="mean").isel(depth=0)) < EQUAL:
        yield "All sequences of this batch are the same: it cannot show whether the network tells them apart."


@verdict(
    Kind.READING,
    metric="residual_norm",
    judges="number of readings that are not proven",
    limits=Limits(info=0.0),
)
def unproven_reading(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """The reported connections could not be verified against the forward pass.

    The states are those of the model; that they are joined as reported is not recomputed. Name the blocks with layers=, or
    read the reason: what it names is in no finding and no figure.
    """
    proof = str(attrs.get("proof", ""))
    if proof.startswith((PROVEN, UNPROVEN)):  # a run of an earlier version has no such attribute
        sentence = f"{unproven_sentence(proof)} Every reading should be proven ({DEFAULT})."
        yield Profile(float(proof != PROVEN), sentence=sentence)


JUDGED = "verdicts_judged"
"""Attribute that `judge` gives to an analysis: how many verdicts about the network could be judged."""


@verdict(
    Kind.FACT,
    metric="num_tokens",
    judges="number of verdicts that could be judged",
    limits=Limits(fail=1.0, above=False),
)
def nothing_measured(attrs: Mapping[str, Any]) -> Iterator[Profile]:
    """Nothing was measured: no verdict could be judged.

    That nothing else was found says nothing. Read the reason; where the mask leaves no token, true or 1 is a real token.
    """
    reasons = Counter(map(str, attrs.get("not_computed", {}).values()))
    # Where all that was asked for has numbers, as in an analysis of a few metrics, the question does not arise.
    if not attrs.get(JUDGED, 1) and reasons:
        why = reasons.most_common(1)[0][0]
        sentence = f"No verdict about the network could be judged; one is the least ({DEFAULT}): {why}."
        yield Profile(0.0, sentence=sentence)


def unproven_sentence(proof: str) -> str:
    """The sentence that every finding of an unproven reading carries."""
    return f"This reading is unproven: {proof.removeprefix(UNPROVEN)}."


def with_proof(finding: Finding, attrs: Mapping[str, Any]) -> Finding:
    """A finding with where the reading that it is about is unproven."""
    proof, sentence = str(attrs.get("proof", "")), finding.sentence
    if proof.startswith(UNPROVEN) and unproven_sentence(proof) not in sentence:
        sentence = f"{sentence} {unproven_sentence(proof)}"
    return replace(finding, proof=proof, sentence=sentence)
