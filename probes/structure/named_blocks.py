"""Which modules does ``layers=`` name, and which chain do their calls show? What the user asserts, where it is not proven."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from depthscope.diagnostics.errors import did_you_mean
from depthscope.probes.reading.description import MemoryReading
from depthscope.probes.reading.graph import Graph, ModuleCall, TracedValue
from depthscope.probes.structure.chain import Chain, ChainError, HookPoint, layer_numbers

ASSERTED = "unproven: the states are asserted by layers=, and "


def block_paths(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Module paths that a user's ``layers=`` names: paths, one ModuleList's path, or one pattern."""
    if len(layers) > 1:
        return list(layers)
    pattern, modules = layers[0], dict(model.named_modules())
    if "{i}" in pattern or "*" in pattern:
        expression = re.escape(pattern).replace(r"\{i\}", r"\d+").replace(r"\*", r"[^.]+")
        found = [path for path in modules if re.fullmatch(expression, path)]
        if not found:
            raise ChainError(f"the pattern {pattern!r} names no module; {_closest_paths(pattern, modules)}")
        return found
    container = modules.get(pattern)
    if isinstance(container, (nn.ModuleList, nn.Sequential)):
        return [f"{pattern}.{i}".lstrip(".") for i in range(len(container))]
    return [pattern]


def _closest_paths(path: str, modules: dict[str, nn.Module]) -> str:
    return did_you_mean(path, modules, otherwise="print the model to see its module paths")


def named_calls(graph: Graph, model: nn.Module, layers: Sequence[str]) -> list[int]:
    """The numbers of the calls of the modules that ``layers=`` names, in order.

    Raises ChainError: Where one of them does not exist, did not run, or takes or gives no floating tensor.
    """
    modules = dict(model.named_modules())
    wanted = block_paths(model, layers)
    calls = {path: [n for n, call in enumerate(graph.calls) if call.path == path] for path in wanted}
    for path in wanted:
        if path not in modules:
            raise ChainError(f"no module {path!r} in the model; {_closest_paths(path, modules)}")
        if not calls[path]:
            raise ChainError(f"the module {path!r} was never called in the forward; name modules that run")
    found = sorted(call for path in wanted for call in calls[path])
    for call in found:
        if graph.ends_of(call) is None:
            raise ChainError(
                f"{graph.calls[call].path} has no floating tensor as input and output; it cannot have a residual state"
            )
    return found


def states_around(graph: Graph, memory: MemoryReading, calls: Sequence[int]) -> list[int] | None:
    """The states of a memory before each of some calls, and after the last one; None where a call has no branch of it."""
    around: dict[int, list[int]] = {call: [] for call in calls}
    for connection in memory.connections:
        for of in connection.branches:
            for call in graph.stack(of.branch.source):
                if call in around:
                    around[call] += [connection.depth_in, connection.depth_out]
    if not all(around.values()):
        return None
    return sorted({min(depths) for depths in around.values()} | {max(around[calls[-1]])})


def chain_of_calls(graph: Graph, calls: Sequence[int], proof: str) -> Chain:
    """The chain of what some modules take, and of what the last one gives, which no memory has as its states.

    Where a module takes first what the one before has no part in, as a list of all before, it is what that one gave.
    """
    blocks = [graph.calls[call] for call in calls]
    ends = [
        (calls[0], "input"),
        *(_state_between(graph, *pair) for pair in pairwise(calls)),
        (calls[-1], "output"),
    ]
    values = [graph.sides[end][0] for end in ends]
    labels = block_labels(blocks, constant=len({value.shape for value in values}) == 1)
    modules = ["(input)", *(block.path for block in blocks)]
    points = []
    for (number, at), (layer, site), module, value in zip(ends, labels, modules, values, strict=True):
        call = graph.calls[number]
        points.append(HookPoint(call.path, call.number, at, layer, site, module, value.number, value.shape))
    return Chain(
        name="",
        points=tuple(points),
        connections=(),
        blocks=tuple(dict.fromkeys(call.path for call in blocks)),
        block_class="/".join(dict.fromkeys(call.kind for call in blocks)),
        proof=proof,
    )


def _state_between(graph: Graph, before: int, after: int) -> tuple[int, str]:
    taken, given = graph.sides[after, "input"][0], graph.sides[before, "output"][0]
    return (after, "input") if graph.depends(taken, given) else (before, "output")


def block_labels(blocks: Sequence[ModuleCall], *, constant: bool) -> list[tuple[int, str]]:
    """The block and site of the state before each of some calls, and of the one after the last.

    ``constant``: whether all states have one shape; otherwise there are stages, whose blocks are numbered from 0 each.
    """
    layers = layer_numbers(blocks) if constant else list(range(len(blocks)))
    found = [(-1, "embed")]
    for depth, layer in enumerate(layers, 1):
        found.append((layer, "mid" if layers[depth : depth + 1] == [layer] else "post"))
    return found


def linked_calls(graph: Graph) -> list[int]:
    """The longest run of calls, of one module or of a container's, of which each takes what the one before gave."""
    runs: dict[str, list[list[int]]] = {}
    given: dict[str, TracedValue] = {}  # by the last call of each container
    for number, call in enumerate(graph.calls):
        ends = graph.ends_of(number)
        if ends is None:
            continue
        container = call.path if call.container is None else call.container
        of_container = runs.setdefault(container, [])
        if given.get(container) is not ends[0]:
            of_container.append([])
        of_container[-1].append(number)
        given[container] = ends[1]
    every = [run for of_container in runs.values() for run in of_container if len(run) > 1]
    return max(every, key=len, default=[])


def likely_blocks(graph: Graph, model: nn.Module) -> str:
    """A pattern of modules that can be named as blocks: called one after another; empty where none are."""
    numbers = Counter(
        re.sub(r"(?<![^.])\d+(?![^.])", "{i}", c.path) for c in graph.calls if c.path[-1:].isdigit()
    )
    # The outermost ones, and of these the ones that are called most often, first.
    for pattern in sorted(numbers, key=lambda pattern: (pattern.count("."), -numbers[pattern])):
        try:
            if len(named_calls(graph, model, [pattern])) > 1:
                return pattern
        except ChainError:
            continue
    return ""


def with_named_blocks(graph: Graph, chain: Chain, calls: Sequence[int], depths: Sequence[int]) -> Chain:
    """A chain with the user's blocks, and the states numbered by them where there is one before each."""
    blocks = [graph.calls[call] for call in calls]
    chain = replace(
        chain,
        blocks=tuple(dict.fromkeys(call.path for call in blocks)),
        block_class="/".join(dict.fromkeys(call.kind for call in blocks)),
    )
    if len(depths) == len(calls) + 1 == len(chain.points):
        labels = block_labels(blocks, constant=len(set(chain.shapes)) == 1)
        points = zip(chain.points, labels, strict=True)
        chain = replace(chain, points=tuple(replace(p, layer=n, site=site) for p, (n, site) in points))
    return chain
