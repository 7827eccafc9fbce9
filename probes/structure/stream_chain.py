"""The chain of a model with stream connections: its states, and where something outside of the connections changes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from depthscope.probes.structure.chain import Chain, Connection, HookPoint, layer_numbers
from depthscope.probes.structure.tape import Call, ChainError, Tape, same_tensor


@dataclass(frozen=True)
class Observation:
    """One observation of a state: at a connection's or block's input or output, or where a paired connection closes."""

    call: Call
    kind: str  # "input", "output" or "closing"

    @property
    def at(self) -> str:
        """The side of the call that shows it."""
        return "input" if self.kind == "input" else "output"

    @property
    def written(self) -> int | None:
        """How often the state had been written in place by then."""
        return self.call.versions[0 if self.kind == "input" else 1]

    def same(self, other: Observation) -> bool:
        """Whether both show one and the same value: one tensor, not rewritten between.

        Equal values in two tensors do not count: what is added between them may be zero in a fresh model only.
        """
        own = self.call.x if self.kind == "input" else self.call.y
        others = other.call.x if other.kind == "input" else other.call.y
        return same_tensor(own, others) and self.written == other.written


State = list[Observation]  # those that show one and the same value, in order


def stream_chain(tape: Tape, connections: list[Call]) -> Chain:
    """A chain with streams: the input of every connection, and each state that differs from it before the next one.

    A state that changes outside of the connections, as by a per-layer embedding, is captured before and after the change.

    ``connections``: the calls of its connections, in order.
    Raises ChainError: Where no module shows the state after the last connection.
    """
    layers = _block_numbers(connections)
    first = connections[0]
    points = [_hook_point([Observation(first, "input")], -1, "embed", first.producer or "(input)")]
    found: list[Connection] = []
    for number, call in enumerate(connections):
        following = connections[number + 1] if number + 1 < len(connections) else None
        next_layer = None if following is None else layers[number + 1]
        states = _distinct_states(_observations_after(tape, call, following))
        found.append(_connection(call, layers[number], len(points) - 1))
        for state, site in zip(states, _site_names(states, layers[number], next_layer), strict=True):
            layer = layers[number] if site != "pre" or next_layer is None else next_layer
            producer = call.path if state is states[0] else state[0].call.producer or state[0].call.path
            points.append(_hook_point(state, layer, site, producer))
    parents = {id(call.parent): call.parent for call in connections if call.parent is not None}
    return Chain(
        name="",
        points=tuple(points),
        connections=tuple(found),
        blocks=tuple(dict.fromkeys(call.path for call in parents.values())),
        block_class=type(next(iter(parents.values())).module).__name__ if parents else "",
        shapes=(first.x_shape,) * len(points),
    )


def _block_numbers(connections: Sequence[Call]) -> list[int]:
    """Numbers of the blocks that connections are in; a block that runs several times counts each time."""
    around = [call.parent for call in connections]
    runs = list({id(block): block for block in around}.values())
    if len({block.path for block in runs if block is not None}) == len(runs) or len(runs) == len(around):
        return layer_numbers(connections)
    order = {id(block): number for number, block in enumerate(runs)}
    return [order[id(block)] for block in around]


def _observations_after(tape: Tape, call: Call, following: Call | None) -> list[Observation]:
    """Every observation of the state after a connection, or of what became of it, before the next one begins."""
    found = [] if call.closing is None else [Observation(call.closing, "closing")]
    found += [Observation(block, "output") for block in _blocks_that_end(call, following)]
    if following is not None:
        found.append(Observation(following, "input"))
    elif not found:
        # After the last connection any later call that takes a tensor of the streams' shape may show the state: the first one.
        later = (c for c in tape.calls[call.order + 1 :] if c.x_shape == call.x_shape and not c.inside(call))
        found = [Observation(taker, "input") for taker in later][:1]
    if not found:
        raise ChainError(
            f"the state after the last connection {call.path!r} (shape {call.x_shape}) is seen by no module: "
            "no later call takes or returns it. Collapse the streams in a module, for example einops' Reduce layer"
        )
    return found


def _blocks_that_end(call: Call, following: Call | None) -> Iterator[Call]:
    """The calls around a connection that take and return streams, and end before the next connection begins."""
    for around in call.ancestors():
        if following is not None and following.inside(around):
            return
        # In closure style the module's own forward returns the branch's input, and the streams come later.
        own = around.module is call.module
        closed = call.closing is not None and same_tensor(around.y, call.closing.y)
        if around.x_shape == around.y_shape == call.x_shape and (closed or not own):
            yield around


def _distinct_states(observations: list[Observation]) -> list[State]:
    """The observations by the values that they show: a new state where the value changes."""
    states: list[State] = []
    for observation in observations:
        if states and states[-1][-1].same(observation):
            states[-1].append(observation)
        else:
            states.append([observation])
    return states


def _site_names(states: list[State], layer: int, next_layer: int | None) -> list[str]:
    """The site of each state up to the next connection: mid inside a block, post after it, pre where the next one begins."""
    if next_layer == layer:
        return ["mid"] * len(states)
    kinds = [{observation.kind for observation in state} for state in states]
    sites = ["post"] * len(states)
    for number, shown in enumerate(kinds):
        if shown == {"closing"} and any("output" in later for later in kinds[number + 1 :]):
            sites[number] = "mid"  # its block goes on
        elif shown == {"input"} and number:
            sites[number] = "pre"  # changed between the blocks
    return sites


def _hook_point(state: State, layer: int, site: str, producer: str) -> HookPoint:
    # Of several observations of one state the last: what takes it gets the tensor that is really passed on, in autograd too.
    last = state[-1]
    return HookPoint(last.call.path, last.call.index, last.at, layer, site, producer, last.call.method)


def _connection(call: Call, layer: int, depth_in: int) -> Connection:
    assert call.site is not None
    branch = call.branch
    own = getattr(call.module, "branch", None)  # lucidrains' modules contain their branch
    return Connection(
        path=call.path,
        index=call.index,
        layer=layer,
        branch=branch_label(
            call.path.rpartition(".")[2],
            branch.path.rpartition(".")[2] if branch else "",
            type(branch.module).__name__ if branch else "",
            type(own).__name__ if own is not None else "",
        ),
        branch_path=branch.path if branch else None,
        branch_index=branch.index if branch else 0,
        style=call.site.style,
        depth_in=depth_in,
        depth_out=depth_in + 1,
    )


# Names of modules and classes in transformers, timm, state-space and lucidrains' models.
_LABELS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("attn", re.compile(r"att|ssm|mamba|mixer|retention", re.IGNORECASE).search),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert|dense\w*dense", re.IGNORECASE).search),
)


def branch_label(*names: str) -> str:
    """The kind of a branch by its names: attn, mlp, or block where no name shows it."""
    for text in names:
        for label, matches in _LABELS:
            if matches(text):
                return label
    return "block"
