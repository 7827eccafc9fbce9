"""What did this process measure in a step, or why could it not? Before the others are asked."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from depthscope.probes.session.forward import Measured
from depthscope.probes.session.reservoir import Sequence
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import WHOLE_TOKENS, TokenSums, merge_sums
from depthscope.probes.structure.model_structure import FINAL
from depthscope.probes.training.ranks.exchange import Measurement
from depthscope.probes.training.ranks.sequence_parts import parts_vector


def measured_here(
    session: Session, loss: float | None, loss_terms: float | None
) -> tuple[Measurement | None, str]:
    """The statistics of the present step of this process, and why they could not be had.

    Returns: None without a reason where the process had no data: an empty batch, only padding, or no forward.
    """
    try:
        session.raise_first_error()
        if not session.pending:
            return None, ""
        parts = session.fold()
        tokens = num_tokens(parts)
        if not tokens:
            return None, ""
        sums: list[TokenSums] = []
        for part in parts:
            sums = merge_sums(sums, part.sums)
        _forget_shared_gradients(session, sums)
        sequences = sum(part.batch_size for part in parts)
        facts, share, vector = site_facts(session), 1.0, None
        if session.scope.shards is not None:
            share = tokens / _whole_tokens(sums)
            vector = parts_vector(partial_sequences(session), session.scope.shards)
            facts.append(f"sequences of which {len(session.scope.shards.ranks)} processes have a part each")
        return Measurement(sums, tokens, sequences, loss, loss_terms, facts, share, vector), ""
    except Exception as error:
        session.drop()
        return None, str(error) or type(error).__name__


def partial_sequences(session: Session) -> list[Sequence]:
    """The sampled sequences of which this process has a part only, in an order that all processes share."""
    stored = session.step.reservoir.stored
    return [stored[slot] for slot in sorted(stored) if stored[slot].part is not None]


def _whole_tokens(sums: Many[TokenSums]) -> float:
    """The number of real tokens of all processes that share the sequences of this one, which is no statistic of a run."""
    total = 0.0
    for chain in sums:
        total += sum(float(count) for count in chain.sums.get(WHOLE_TOKENS, {}).values())
        chain.forget(WHOLE_TOKENS)
    return total


def num_tokens(parts: Many[Measured]) -> float:
    """The number of real tokens of all chains, at their first depths."""
    counts = [chain.sums.get("token_count", {}) for part in parts for chain in part.sums]
    return sum(float(next(iter(count.values()))) for count in counts if count)


def site_facts(session: Session) -> list[str]:
    """Where the states and connections of a model were found, in sentences that its copies in other processes share."""
    structure, observer = session.structure, session.observer
    facts = [
        f"{structure.chains[number].name or 'depth'} {'final' if depth == FINAL else depth}: {point.at} of "
        f"{point.path or 'the model'}"
        for number, depth, point in structure.captured
    ]
    facts += [f"connection {number}: {site.path}" for number, site in enumerate(structure.connections)]
    return [*facts, f"states of type {observer.dtype}, multiplied in {observer.precision}"]


def _forget_shared_gradients(session: Session, sums: Many[TokenSums]) -> None:
    """Make the gradients undefined of matrices that all tokens share: their squares are no sum over processes."""
    logits = session.observer.logits
    for name, number in () if logits is None else logits.of_all_tokens:
        known = sums[0].sums.get(name, {})
        if number in known:
            known[number] = torch.full_like(known[number], torch.nan)
