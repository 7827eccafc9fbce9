"""To which experts do tokens go? What routers choose, by chain and depth, seen where the choice is made.

A router chooses columns of scores, one row for each token, by the largest ones. It is recognised by its operations, never by a
name: its scores were made by a layer with as many outputs, and what it chose leads to a state. The first forward, whose
operations are all recorded, shows in which calls of which modules that is; later ones look at the operations of these modules
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.operations import OperationsShown
from depthscope.probes.reading.graph import Graph, TracedValue, walk
from depthscope.probes.reading.operations import LAYERS
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.attention import first_state_after, num_tokens
from depthscope.probes.session.forward import Forward, Key, Routed, Tape
from depthscope.probes.structure.model_structure import Structure

aten = torch.ops.aten

# Where the axis is among the arguments, and which result has the indices.
CHOICES = {aten.topk.default: (2, 1), aten.max.dim: (1, 1), aten.argmax.default: (1, None)}
MOST_EXPERTS = 4096  # of more columns an argmax is over a vocabulary


@dataclass(frozen=True)
class _Choice:
    """One choice: the numbers of the values that it took and gave in the recorded graph, and its numbers by row."""

    taken: int
    given: tuple[int, ...]
    routed: Routed


class RoutingWatch:
    """The choices among columns of scores in one forward, or in one call; a listener of operations.

    ``number``: the number of the value that a tensor has in the recorded graph.
    """

    def __init__(self, number: Callable[[torch.Tensor], int] = id):
        self.found: list[_Choice] = []
        self._number = number

    def __call__(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Look at an operation that has run."""
        if func not in CHOICES:
            return
        scores, (axis, item) = args[0], CHOICES[func]
        dim = args[axis] if len(args) > axis else kwargs.get("dim", -1 if func is aten.topk.default else None)
        experts = scores.shape[-1] if scores.ndim else 0
        if (
            dim not in (-1, scores.ndim - 1)
            or not scores.is_floating_point()
            or not 1 < experts <= MOST_EXPERTS
        ):
            return
        chosen = result if item is None else result[item]
        rows = scores.numel() // experts
        routed = Routed(
            chosen.detach().reshape(rows, -1).clone(),
            _entropy_share(scores.detach().reshape(rows, -1)),
            experts,
        )
        given = (chosen,) if item is None else tuple(result)
        self.found.append(_Choice(self._number(scores), tuple(map(self._number, given)), routed))


def _entropy_share(scores: torch.Tensor) -> torch.Tensor:
    """Entropy of the scores of each row as a distribution, as a share of that of a uniform one.

    Scores that are not negative, as those of a softmax or a sigmoid, are divided by their sum; of others the softmax is taken.
    """
    scores = scores.float()
    is_weight = (scores >= 0).all() & (scores.sum(-1) > 0).all()
    weights = torch.where(is_weight, scores / scores.sum(-1, keepdim=True), scores.softmax(-1))
    return -torch.xlogy(weights, weights).sum(-1) / math.log(scores.shape[-1])


@dataclass
class RoutingPlaces:
    """Where a model routes: by module path and index of the call, the state that each choice in it leads to, or None."""

    calls: dict[tuple[str, int], list[Key | None]] = field(default_factory=dict)

    @property
    def paths(self) -> set[str]:
        """The modules that later forwards look at."""
        return {path for path, _ in self.calls}


def watch_routing(recorder: GraphRecorder) -> RoutingWatch:
    """Look at the choices of a recorded forward."""
    watch = RoutingWatch(lambda tensor: recorder.known(tensor).number)
    recorder.listeners.append(watch)
    return watch


def placed_routing(tape: Tape, forward: Forward, structure: Structure) -> RoutingPlaces:
    """Tell which choices of a recorded forward are those of routers, and give the forward their numbers."""
    places, watch = RoutingPlaces(), tape.routing
    if watch is None or tape.recorder is None:
        return places
    tape.recorder.listeners.remove(watch)
    tape.routing, graph = None, tape.recorder.graph
    if not watch.found:
        return places
    states = [[point.value_in(tape.graph) for point in chain.points] for chain in structure.chains]
    depths = [[(d, value) for d, value in enumerate(of) if value is not None] for of in states]
    keys: list[Key | None] = []
    for seen in watch.found:
        key = _place(seen, graph, structure, depths, forward.batch_size)
        keys.append(key)
        if key is not None:
            forward.routed.setdefault(key, []).append(seen.routed)
    stacks = [graph.stack(graph.values[seen.given[0]]) for seen in watch.found]
    routes = {
        graph.calls[stack[-1]].path for stack, key in zip(stacks, keys, strict=True) if key and stack
    } - {""}
    for stack, key in zip(stacks, keys, strict=True):
        # The outermost one: what is chosen in modules inside of it is seen with it.
        call = next((graph.calls[n] for n in stack if graph.calls[n].path in routes), None)
        if call is not None:
            places.calls.setdefault((call.path, call.number), []).append(key)
    return places


def _place(seen: _Choice, graph: Graph, structure: Structure, depths: Any, batch_size: int) -> Key | None:
    """Chain and depth of the state that a router's choice leads to; None where it is no choice of experts for each token."""
    if not _is_made_by_layer(graph, graph.values[seen.taken], seen.routed.experts):
        return None
    for number in seen.given:
        place = first_state_after(number, graph, depths)
        tokens = None if place is None else num_tokens(structure, *place, batch_size)
        if place is not None and tokens is not None and len(seen.routed.chosen) == tokens * batch_size:
            return place[:2]
    return None


def _is_made_by_layer(graph: Graph, scores: TracedValue, experts: int) -> bool:
    """Whether scores were made by a layer with as many outputs, whatever was done to each number since."""
    for value in walk([scores], lambda of: (p for p in of.parents if p.shape[-1:] == (experts,))):
        if value.name in LAYERS and any(w.of_parameter and experts in w.shape for w in value.parents):
            return graph.depends_on_input(value)
    return False


def later_routing(
    places: RoutingPlaces, forward: Forward, path: str, module: nn.Module
) -> tuple[OperationsShown, Callable[[Any], None]] | None:
    """What looks at one call of a module that routes, and what is done when it has ended; None where it does not route."""
    expected = places.calls.get((path, forward.next_index("routing", path)))
    if expected is None:
        return None
    watch = RoutingWatch()

    def done(result: Any) -> None:
        if len(watch.found) != len(expected):
            forward.unrouted = True  # as where another number of experts was looked for
            return
        for seen, key in zip(watch.found, expected, strict=True):
            if key is not None:
                forward.routed.setdefault(key, []).append(seen.routed)

    return OperationsShown(watch), done


def add_routing(forward: Forward) -> None:
    """Add what the routers of a forward chose to its sums, where they chose as often as in the first one."""
    routed, forward.routed = forward.routed, {}
    if forward.unrouted or not routed:
        return
    most = max(sum(of.experts for of in each) for each in routed.values())
    for (number, depth), each in routed.items():
        sums = routing_sums(each, forward.masks.get(number), forward.batch_axis, most)
        forward.chain_sums(number).add_values(depth, sums)


def routing_sums(
    routed: list[Routed], mask_BT: torch.Tensor | None, batch_axis: int, experts: int
) -> dict[str, torch.Tensor]:
    """Sums over the real tokens of a step; the experts of several routers between two states follow each other.

    ``experts``: to how many experts, with NaN, the counts are padded.
    Returns: ``expert_token_count`` (experts), ``router_entropy_sum`` and ``routed_token_count``.
    """
    counts, entropy, tokens = [], torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    real = None if mask_BT is None else (mask_BT.mT if batch_axis else mask_BT).flatten()
    for of in routed:
        chosen, shares = of.chosen, of.entropy.double()
        weights = torch.ones(len(chosen), dtype=torch.float64, device=chosen.device)
        if real is not None:
            weights = real.to(chosen.device).double()
            shares = shares.where(weights > 0, 0.0)
        each = torch.zeros(of.experts, dtype=torch.float64, device=chosen.device)
        counts.append(each.index_add(0, chosen.flatten(), weights.repeat_interleave(chosen.shape[1])))
        entropy, tokens = entropy.to(chosen.device) + shares.sum(), tokens.to(chosen.device) + weights.sum()
    count = torch.cat(counts)
    return {
        "expert_token_count": nn.functional.pad(count, (0, experts - len(count)), value=math.nan),
        "router_entropy_sum": entropy,
        "routed_token_count": tokens,
    }
