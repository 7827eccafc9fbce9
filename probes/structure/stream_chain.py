"""The chain of a model with stream connections: the states before, between and after them, and what lies outside of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from depthscope.probes.structure.chain import Chain, Link, Place, layer_numbers
from depthscope.probes.structure.tape import Call, ChainError, Tape, same_tensor


@dataclass(frozen=True)
class Seen:
    """One state where it was seen: taken by the next connection, given by a block, or by what closed the connection."""

    call: Call
    kind: str  # "taken", "given" or "closed"

    @property
    def at(self) -> str:
        """The side of the call that shows it."""
        return "input" if self.kind == "taken" else "output"

    @property
    def written(self) -> int | None:
        """How often the state had been written in place when it was seen."""
        return self.call.versions[0 if self.kind == "taken" else 1]

    def same(self, other: Seen) -> bool:
        """Whether both show one and the same value: one tensor, not rewritten between.

        Equal values in two tensors do not count, since what is added between them may be zero in a fresh model only.
        """
        own = self.call.x if self.kind == "taken" else self.call.y
        others = other.call.x if other.kind == "taken" else other.call.y
        return same_tensor(own, others) and self.written == other.written


State = list[Seen]  # the places that show one and the same value, in order


def stream_chain(tape: Tape, connections: list[Call]) -> Chain:
    """A chain with streams: the input of every connection, and each state that differs from it before the next one.

    A state that changes outside of the connections, by a per-layer embedding for one, is seen before and after that change.

    Parameters
    ----------
    tape : Tape
        The calls of one forward.
    connections : list of Call
        The calls of its connections, in order.

    Returns
    -------
    Chain

    Raises
    ------
    ChainError
        Where the state after the last connection is seen by no module.
    """
    layers = layer_numbers(connections)
    first = connections[0]
    places = [_place([Seen(first, "taken")], -1, "embed", first.producer or "(input)")]
    links: list[Link] = []
    for number, call in enumerate(connections):
        following = connections[number + 1] if number + 1 < len(connections) else None
        next_layer = None if following is None else layers[number + 1]
        states = _distinct(_states_after(tape, call, following))
        links.append(_link(call, layers[number], len(places) - 1))
        for state, site in zip(states, _sites(states, layers[number], next_layer), strict=True):
            layer = layers[number] if site != "pre" or next_layer is None else next_layer
            producer = call.path if state is states[0] else state[0].call.producer or state[0].call.path
            places.append(_place(state, layer, site, producer))
    parents = {id(call.parent): call.parent for call in connections if call.parent is not None}
    return Chain(
        name="",
        places=tuple(places),
        links=tuple(links),
        blocks=tuple(dict.fromkeys(call.path for call in parents.values())),
        block_class=type(next(iter(parents.values())).module).__name__ if parents else "",
        shapes=(first.x_shape,) * len(places),
    )


def _states_after(tape: Tape, call: Call, following: Call | None) -> list[Seen]:
    """Every place at which the state after a connection, or what became of it, is seen before the next one begins."""
    seen = [] if call.closing is None else [Seen(call.closing, "closed")]
    seen += [Seen(block, "given") for block in _blocks_left(call, following)]
    if following is not None:
        seen.append(Seen(following, "taken"))
    elif not seen:
        seen = [Seen(later, "taken") for later in _takers(tape, call)][:1]
    if not seen:
        raise ChainError(
            f"the state after the last connection {call.path!r} (shape {call.x_shape}) is seen by no module: "
            "no later call takes or returns it. Collapse the streams in a module, for example einops' Reduce layer"
        )
    return seen


def _blocks_left(call: Call, following: Call | None) -> Iterator[Call]:
    """The module calls around a connection that take and give streams, and end before the next connection begins."""
    around = call.parent
    while around is not None and not (following is not None and following.inside(around)):
        own = (
            around.module is call.module
        )  # in closure style it gave the branch's input, and its streams come later
        closed = call.closing is not None and same_tensor(around.y, call.closing.y)
        if around.x_shape == around.y_shape == call.x_shape and (closed or not own):
            yield around
        around = around.parent


def _takers(tape: Tape, last: Call) -> Iterator[Call]:
    for later in tape.calls[last.order + 1 :]:
        if later.x_shape == last.x_shape and not later.inside(last):
            yield later


def _distinct(seen: list[Seen]) -> list[State]:
    """The places by the values that they show: a new state where the value changes."""
    states: list[State] = []
    for place in seen:
        if states and states[-1][-1].same(place):
            states[-1].append(place)
        else:
            states.append([place])
    return states


def _sites(states: list[State], layer: int, next_layer: int | None) -> list[str]:
    """The site of each state between one connection and the next: mid inside a block, post behind it, pre at the next head."""
    if next_layer == layer:
        return ["mid"] * len(states)
    kinds = [{place.kind for place in state} for state in states]
    sites = ["post"] * len(states)
    for number, shown in enumerate(kinds):
        if shown == {"closed"} and any("given" in later for later in kinds[number + 1 :]):
            sites[number] = "mid"  # its block goes on
        elif shown == {"taken"} and number:
            sites[number] = "pre"  # changed between the blocks
    return sites


def _place(state: State, layer: int, site: str, producer: str) -> Place:
    """Of several places of one state the last one, which takes what is really handed on."""
    seen = state[-1]
    return Place(seen.call.path, seen.call.index, seen.at, layer, site, producer, seen.call.method)


def _link(call: Call, layer: int, depth_in: int) -> Link:
    assert call.site is not None
    branch = call.branch
    return Link(
        path=call.path,
        index=call.index,
        layer=layer,
        branch=_branch_label(call, branch),
        branch_path=branch.path if branch else None,
        branch_index=branch.index if branch else 0,
        style=call.site.style,
        depth_in=depth_in,
        depth_out=depth_in + 1,
    )


_LABELS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("attn", re.compile(r"att|ssm|mamba|mixer|retention", re.IGNORECASE).search),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert|dense\w*dense", re.IGNORECASE).search),
)


def branch_label(*names: str) -> str:
    """What kind of branch some names tell of: attn, mlp, or block.

    Parameters
    ----------
    *names : str
        Names in the order of their weight.

    Returns
    -------
    str
    """
    for text in names:
        for label, matches in _LABELS:
            if matches(text):
                return label
    return "block"


def _branch_label(call: Call, branch: Call | None) -> str:
    own = getattr(call.module, "branch", None)
    return branch_label(
        call.path.rpartition(".")[2],
        branch.path.rpartition(".")[2] if branch else "",
        type(branch.module).__name__ if branch else "",
        type(own).__name__ if own is not None else "",
    )
