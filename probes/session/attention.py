"""Between which states does attention lie, and what were its weights? By chain and depth, of the sampled sequences.

The first forward, whose operations are all recorded, shows which calls of which modules attend, and to which state that leads.
Later forwards look at the operations of these modules alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.layout import LayoutError
from depthscope.probes.model.operations import OperationsShown
from depthscope.probes.reading.graph import Graph, TracedValue
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.attention_rows import AttentionWatch, rows_of_calls
from depthscope.probes.session.forward import Forward, Key, Tape
from depthscope.probes.structure.model_structure import Structure

OTHER_TOKENS = "its queries are not the tokens of the state"
OUTSIDE = "it is computed outside of all modules but the model itself, where only a first forward looks"
CHANGED = "a later forward attended another number of times than the first"
# In a training loop: per query, the weights of all heads compared with the D² multiplications of a layer's weights, of which a
# sequence has 12 or more, and three times that with its backward. A few passes over the weights are then about 2 % of a
# measured step. Heuristic.
SHARE_OF_STEP = 1 / 64


@dataclass
class AttentionPlaces:
    """Where a model attends, as its first forward showed.

    ``calls``: by module path and index of the call: for each time that it attends, chain and depth of the state that this
    leads to, or None where it leads to none that is known.
    ``heads``: number of heads by chain and depth; those of several calls between two states follow each other.
    ``keys``: number of queries by chain and depth, which is that of the tokens.
    ``modules``: the path of the module, by chain and depth.
    ``reasons``: why attention was seen and is not measured, and how often.
    ``sequences``: how many of the sampled sequences are looked at in a forward; None for all.
    """

    calls: dict[tuple[str, int], list[Key | None]] = field(default_factory=dict)
    heads: dict[Key, int] = field(default_factory=dict)
    keys: dict[Key, int] = field(default_factory=dict)
    modules: dict[Key, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    seen: Counter[Key] = field(default_factory=Counter)
    sequences: int | None = None

    @property
    def paths(self) -> set[str]:
        """The modules that later forwards look at; all but the model itself."""
        placed = {path for (path, _), keys in self.calls.items() if any(keys)}
        # A module that contains another one of them would see its attention as well.
        return {path for path in placed if path and not any(other.startswith(f"{path}.") for other in placed)}

    def limit_cost(self, structure: Structure, batch_size: int) -> None:
        """Look at so few sequences that a measured step of a training loop costs about 2 % more."""
        if not self.heads:
            return
        most = max(self.heads[key] * self.keys[key] for key in self.heads)
        width = structure.chains[0].shapes[0][-1]
        self.sequences = int(batch_size * width * width * SHARE_OF_STEP / most)
        if self.sequences == 0:
            self.reasons[
                f"{most} attention weights per query, for states of {width} features, would cost more than about 2 % of a "
                'measured step: request the site "attention" in sites= to measure them all the same'
            ] += len(self.heads)


def watch_attention(
    recorder: GraphRecorder, model: nn.Module, forward: Forward, rows: torch.Tensor
) -> AttentionWatch:
    """Look at what the tokens of a recorded forward attend to.

    ``rows``: the sequences of the batch whose weights are looked at; without any, only where attention lies is found.
    """

    def number(tensor: torch.Tensor) -> int:
        return recorder.known(tensor).number

    def heads_follow() -> bool:
        # torch's own module documents how it joins the axes; of another one it would be a guess.
        return isinstance(model.get_submodule(recorder.path), nn.MultiheadAttention)

    watch = AttentionWatch(rows, forward.batch_size, number=number, heads_follow=heads_follow)
    recorder.listeners.append(watch)
    return watch


def placed_attention(tape: Tape, forward: Forward, structure: Structure) -> AttentionPlaces:
    """Tell between which states the attention of a recorded forward lies, and give the forward its numbers."""
    watch, places = tape.attention, AttentionPlaces()
    if watch is None or tape.recorder is None:
        return places
    tape.recorder.listeners.remove(watch)  # it holds tensors of the forward
    tape.attention, graph = None, tape.recorder.graph
    places.reasons.update(watch.reasons)
    states = [[point.value_in(tape.graph) for point in chain.points] for chain in structure.chains]
    depths = [[(d, value) for d, value in enumerate(of) if value is not None] for of in states]
    for seen in watch.found:
        call = graph.calls[graph.values[seen.value].call]
        of_call = places.calls.setdefault((call.path, call.number), [])
        place = first_state_after(seen.value, graph, depths)
        of_call.append(None)  # before the first state, or in what is no chain
        if place is None:
            continue
        number, depth, state = place
        if seen.rows.shape[-1] != num_tokens(structure, number, depth, state, forward.batch_size):
            places.reasons[OTHER_TOKENS] += 1
            continue
        key = of_call[-1] = number, depth
        places.heads[key] = places.heads.get(key, 0) + seen.rows.shape[2]
        places.keys[key], places.modules[key] = seen.rows.shape[-1], call.path
        forward.attending.append((key, seen.rows))
    places.seen.update(places.heads.keys())
    return places


def add_attention(forward: Forward, heads: int, *, sums: bool) -> None:
    """Give a forward what its queries attend to before each state, (3, S, H, T), see `AttentionRows`; and its sums.

    ``heads``: the most before one state.
    """
    waiting, forward.attending = forward.attending, []
    for (key, _), rows in zip(waiting, rows_of_calls([of for _, of in waiting]), strict=True):
        known = forward.attention.get(key)
        forward.attention[key] = rows if known is None else torch.cat([known, rows], dim=2)
    for (number, depth), rows in forward.attention.items() if sums else ():
        mask = forward.masks.get(number)
        of_rows = None if mask is None else mask[forward.rows[: rows.shape[1]].to(mask.device)]
        forward.chain_sums(number).add_values(depth, attention_sums(rows, of_rows, heads))


def later_attention(
    places: AttentionPlaces, forward: Forward, path: str, module: nn.Module
) -> tuple[OperationsShown, Callable[[Any], None]] | None:
    """What looks at one call of a module that attends, and what is to be done when it has ended.

    Returns: None where the call is not to be looked at.
    """
    expected = places.calls.get((path, forward.next_index("attention", path)))
    rows = forward.rows[: places.sequences]
    if expected is None or not any(expected) or not len(rows):
        return None
    follow = isinstance(module, nn.MultiheadAttention)
    # Of the operations of one call the order is enough.
    watch = AttentionWatch(rows, forward.batch_size, number=lambda tensor: 0, heads_follow=lambda: follow)

    def done(result: Any) -> None:
        if len(watch.found) != len(expected):
            places.reasons[next(iter(watch.reasons), CHANGED)] += 1
            return
        for seen, key in zip(watch.found, expected, strict=True):
            if key is not None:
                forward.attending.append((key, seen.rows))
                places.seen[key] += 1

    return OperationsShown(watch), done


def attention_sums(
    rows_3SHT: torch.Tensor, mask_ST: torch.Tensor | None, heads: int
) -> dict[str, torch.Tensor]:
    """Sums over the real queries that see two keys or more.

    ``heads``: to how many heads, with NaN, the sums are padded.
    Returns: (heads): ``attention_query_count``, ``attention_entropy_sum`` (a share of that of uniform weights) and
    ``sink_mass_sum``.
    """
    entropy, keys, first = rows_3SHT.double()
    chosen = (keys >= 2) & entropy.isfinite()
    if mask_ST is not None:
        chosen &= mask_ST[:, None].to(chosen.device)
    share = entropy / keys.clamp_min(2).log()
    sums = {
        "attention_query_count": chosen.double(),
        "attention_entropy_sum": share.where(chosen, 0.0),
        "sink_mass_sum": first.where(chosen, 0.0),
    }
    missing = heads - rows_3SHT.shape[2]
    return {
        name: nn.functional.pad(values.sum((0, 2)), (0, missing), value=math.nan)
        for name, values in sums.items()
    }


def first_state_after(
    made: int, graph: Graph, depths: list[list[tuple[int, TracedValue]]]
) -> tuple[int, int, TracedValue] | None:
    """Chain, depth and value of the first state that was computed from a value, after another one.

    ``made``: the number of the value, such as what an attention gives.
    ``depths``: of each chain, its states.
    """
    origin = graph.values[made]
    for number, of_chain in enumerate(depths):
        later = ((depth, value) for depth, value in of_chain if value.number > origin.number)
        depth, value = next(later, (0, origin))
        if depth > 0 and graph.depends(value, origin):
            return number, depth, value
    return None


def num_tokens(
    structure: Structure, number: int, depth: int, state: TracedValue, batch_size: int
) -> int | None:
    """How many tokens a state has; None where its shape does not tell them."""
    try:
        return structure.canonical(number, torch.empty(state.shape, device="meta"), batch_size, depth).shape[
            1
        ]
    except LayoutError:  # where attention cannot be placed, the states are read all the same
        return None
