"""A residual chain: which calls show its states, and which connections join them; and that of modules which the user names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.probes.reading.description import ConnectionReading, MemoryReading
from depthscope.probes.reading.graph import Graph, ModuleCall, TracedValue, ValuePlace
from depthscope.probes.reading.operations import FUNCTIONS, NORMS

ADD = "add"
# The styles of a plain block: state + branch, and what of that sum is the next state.
PLAIN = (ADD, "norm", "activation")
NO_FINAL_NORM = "no norm takes the last state"
READ = "read"  # the style of a connection with streams whose weights the operations of each forward show
DEPTH = "depth"  # the style of a branch that reads a sum over depth
ASSERTED = "unproven: the states are asserted by layers=, and "


class ChainError(InputError):
    """No chain of blocks was found, or the named layers do not form one."""


@dataclass(frozen=True)
class HookPoint:
    """What shows one state of a chain: the input or the output of one call of a module, or an operation inside of it."""

    path: str
    index: int  # of the call, among the module's calls in one forward
    at: str  # "input", "output", or "operation" where only the trace of the forward shows it
    layer: int
    site: str
    module: str  # the module that computed the state
    number: int  # of the value that it shows, in the graph of the forward that was read
    shape: tuple[int, ...]  # of the state
    # Which of the call's floating tensors; the k-th operation of its name that the call runs itself.
    item: int = 0
    operation: str = ""  # its name
    result: int = 0  # which of its results
    layout: str = ""  # where it is another one than the chain's
    streams: tuple[HookPoint, ...] = ()  # what shows each stream, where each is a tensor of its own
    without_gradient: str = ""  # why the gradient of the tensor is not that of the state alone

    @property
    def place(self) -> ValuePlace:
        """Where the operation is that shows a state which no call shows."""
        return ValuePlace(self.path, self.index, self.operation, self.item, self.result)

    def moment_in(self, graph: Graph) -> float:
        """When it shows its state in the forward that was read: with an operation, or as a call begins or ends."""
        if self.at == "operation":
            return self.number
        made = graph.made_in.get(graph.call_of(self.path, self.index))
        if made is None:  # it did not end
            return math.inf
        return made.start - 0.5 if self.at == "input" else made.stop - 0.5


@dataclass(frozen=True)
class Connection:
    """What joins two depths: the call that mixes or adds, and the call whose output is the branch's."""

    path: str
    layer: int
    branch: str
    branch_path: str | None
    branch_index: int
    style: str
    depth_in: int
    depth_out: int
    parameters: tuple[str, ...] = ()  # names of those that its coefficients are computed from
    is_sinkhorn: bool = False  # whether Sinkhorn's iteration makes its matrix
    layout: str = ""  # of what the branch of a plain block gives


@dataclass(frozen=True)
class Chain:
    """A residual chain: what shows its states, in depth order, and its connections where they are known."""

    name: str
    points: tuple[HookPoint, ...]
    connections: tuple[Connection, ...]
    blocks: tuple[str, ...]
    block_class: str
    layout: str = ""  # the axes of its states; empty where these have no order that a layout can name
    final: HookPoint | None = None  # after the last norm
    without_final: str = NO_FINAL_NORM  # why there is none
    history: bool = False  # connected to earlier depths, not to streams
    family: str = ""  # of a chain with connections over depth, or whose state is scaled at each token
    proof: str = ""  # of a plain chain: "proven", or "unproven: why"
    update: str = ""  # of a plain chain that is proven: what each next state is
    # Of its stages, while the structure is found; none where calls alone show the states
    memories: tuple[MemoryReading, ...] = field(default=(), repr=False)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its states, all in its layout."""
        return [point.shape for point in self.points]

    @property
    def has_streams(self) -> bool:
        """Whether its connections mix or write streams, rather than add branches to one state."""
        return any(connection.style not in (*PLAIN, DEPTH) for connection in self.connections)

    @property
    def over_depth(self) -> bool:
        """Whether its branches read sums over depth, whose weights are known."""
        return any(connection.style == DEPTH for connection in self.connections)


def function_name(operations: Sequence[str]) -> str:
    """What some operations on a whole state are: "norm", "activation", or nothing."""
    if not operations:
        return ""
    return "activation" if all(name in FUNCTIONS - NORMS for name in operations) else "norm"


def with_update(chain: Chain) -> Chain:
    """A plain chain with what each next state is, and its family where that is scaled at each token."""
    steps = [of for memory in chain.memories for of in memory.connections]
    assert all(isinstance(of, ConnectionReading) for of in steps)
    gated, least, most = _scales([of.h_res for of in steps])

    def passed(kind: Callable[[ConnectionReading], Sequence[str]], where: str) -> str:
        names = [name for of in steps if (name := function_name(kind(of)))]
        which = " or ".join(f"{'an' if name[0] == 'a' else 'a'} {name}" for name in dict.fromkeys(names))
        some = "" if len(names) == len(steps) else f" in {len(names)} of {len(steps)} steps"
        return f"{where} {which}{some}" if names else ""

    words = "each next state is the one before"
    if gated:
        words += ", scaled at each token,"
    elif most - least > 1e-5 * abs(most):
        words += ", scaled by constants,"
    elif steps and abs(most - 1) > 1e-5:
        words += f", times {most:.4g},"
    words += passed(lambda of: of.before_sum, " after")
    words += " plus what was computed from it" + passed(lambda of: of.after_sum, ", followed by")
    return replace(chain, family="highway" if gated else "", update=f"{words}, as traced in a forward")


def _scales(scales: Iterable[torch.Tensor]) -> tuple[bool, float, float]:
    """Whether states are scaled otherwise at each token, and the least and the largest scale, but for 0 as of a mask."""
    gated, least, most = False, math.inf, -math.inf
    # Equal blocks have one tensor
    for scale in {(of.data_ptr(), of.shape, of.stride()): of for of in scales}.values():
        scale = scale.reshape(len(scale), -1)
        largest = scale.amax(0)
        smallest = torch.where(scale == 0, largest, scale).amin(0)
        gated = gated or bool(((largest - smallest).abs() > 1e-5 * largest.abs()).any())
        least, most = min(least, float(smallest.min())), max(most, float(largest.max()))
    return gated, least, most


def layer_numbers(calls: Sequence[ModuleCall]) -> list[int]:
    """Block numbers of some calls: the first number in their paths where these ascend, else their order."""
    numbers = [int(found.group()) if (found := re.search(r"\d+", call.path)) else -1 for call in calls]
    steps = [b - a for a, b in pairwise(numbers)]
    ascending = numbers and numbers[0] >= 0 and all(step in (0, 1) for step in steps)
    # One number throughout is that of what contains the blocks, as in ``stages.1.blocks``. Of two calls it may well be that
    # of their block, which has one connection before its attention and one before its MLP.
    return numbers if ascending and (any(steps) or len(calls) < 3) else list(range(len(calls)))


# --- what the user asserts with layers=, where it is not proven


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
    """The calls of the modules that ``layers=`` names; ChainError where one is not there, did not run, or shows no state."""
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
    """The chain of what some modules take, and of what the last one gives, which no memory has as its states."""
    blocks = [graph.calls[call] for call in calls]
    ends = [
        (calls[0], "input"),
        *(
            # What the next one takes, or where that has no part in what this one gave, that
            (after, "input")
            if graph.depends(graph.sides[after, "input"][0], graph.sides[before, "output"][0])
            else (before, "output")
            for before, after in pairwise(calls)
        ),
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


def block_labels(blocks: Sequence[ModuleCall], *, constant: bool) -> list[tuple[int, str]]:
    """The block and site of the state before each of some calls, and after the last; ``constant``: all have one shape."""
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
