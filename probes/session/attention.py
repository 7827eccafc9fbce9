"""Between which states does attention lie? What its weights were, by chain and depth, of the sampled sequences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from depthscope.probes.dataflow.attention import AttentionRows, AttentionWatch
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.session.forward import Forward
from depthscope.probes.structure.model_structure import Structure
from depthscope.probes.structure.plain_proof import states_of
from depthscope.probes.structure.tape import Tape

OTHER_TOKENS = "its queries are not the tokens of the state"


@dataclass
class Attention:
    """Attention of a model's first forward.

    Parameters
    ----------
    rows : dict
        By the sequence's index, and by chain and depth of the state that the attention leads to: (3, H, T), see
        `AttentionRows`. The heads of several calls between two states follow each other.
    reasons : dict of str to int
        Why attention was seen and is not here, and how often.
    """

    rows: dict[int, dict[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)


def watch_attention(tape: Tape, trace: Trace, forward: Forward) -> None:
    """Let a trace tell what the tokens of its forward attend to.

    Parameters
    ----------
    tape, trace, forward
        Of the forward that begins.
    """

    def number(tensor: torch.Tensor) -> int | None:
        value = trace.value(tensor)
        return None if value is None else value.number

    def heads_follow() -> bool:
        # torch's own module documents how it joins the axes; of another one it would be a guess.
        return trace.call >= 0 and isinstance(tape.calls[trace.call].module, nn.MultiheadAttention)

    trace.on_operation = tape.attention = AttentionWatch(
        forward.rows, forward.batch_size, number=number, heads_follow=heads_follow
    )


def placed_attention(tape: Tape, forward: Forward, structure: Structure) -> Attention:
    """Tell between which states the attention of a forward lies.

    Parameters
    ----------
    tape : Tape
        Of the forward, with its trace.
    forward : Forward
        The forward.
    structure : Structure
        What it showed.

    Returns
    -------
    Attention
    """
    watch, found = tape.attention, Attention()
    if watch is None or tape.trace is None:
        return found
    tape.attention = tape.trace.on_operation = None  # it holds tensors of the forward
    found.reasons.update(watch.reasons)
    states = [states_of(tape, chain.points) for chain in structure.chains]
    depths = [[(d, value) for d, value in enumerate(of) if value is not None] for of in states]
    at: dict[tuple[int, int], list[torch.Tensor]] = {}
    left_out: Counter[str] = Counter()
    for call in watch.found:
        place = _place(call, tape.trace, depths)
        if place is None:  # before the first state, or in what is no chain
            continue
        number, depth, state = place
        if call.rows.shape[-1] != _num_tokens(structure, number, state, forward.batch_size):
            left_out[OTHER_TOKENS] += 1
            continue
        at.setdefault((number, depth), []).append(call.rows)
    found.reasons.update(left_out)
    for position, row in enumerate(forward.rows.tolist()):
        found.rows[forward.first_index + row] = {
            place: torch.cat([rows[:, position] for rows in calls], dim=1) for place, calls in at.items()
        }
    return found


def _place(
    call: AttentionRows, trace: Trace, depths: list[list[tuple[int, Value]]]
) -> tuple[int, int, Value] | None:
    """Chain, depth and value of the first state that was computed from an attention's output, after another one."""
    for number, of_chain in enumerate(depths):
        after = [(depth, value) for depth, value in of_chain if value.number > call.value]
        if after and after[0][0] > 0 and trace.depends(after[0][1].number, call.value):
            return number, *after[0]
    return None


def _num_tokens(structure: Structure, number: int, state: Value, batch_size: int) -> int | None:
    """How many tokens a state has; None where its shape does not tell them."""
    try:
        return structure.canonical(number, torch.empty(state.shape, device="meta"), batch_size).shape[1]
    except (
        LayoutError
    ):  # attention is looked at beside the states: where it cannot be placed, these are read all the same
        return None
