"""What ran in a forward and lies in no chain? Towers with blocks, and parts with many of the parameters, each with the reason.

A model may have several towers, and not all of them can be read: each that is left out is named, so that no run looks complete
that is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import Value
from depthscope.probes.model.modules import all_modules
from depthscope.probes.structure.chain import Chain
from depthscope.probes.structure.find_chains import FURTHER_SHARE, block_paths
from depthscope.probes.structure.plain_proof import states_of
from depthscope.probes.structure.ran_parameters import RanParameters, ran_parameters
from depthscope.probes.structure.tape import FORWARD, Call, Tape

# Parts without repeated blocks are named from this share of the parameters on; a heuristic of ours. Below it are projectors,
# stems and heads, of which a forward has many.
NAMED_SHARE = 0.2
# A block computes something: it has a matrix to go in and one to come out, unlike a convolution with its norm.
MATRICES = 2


@dataclass(frozen=True)
class LeftOut:
    """A part of the model that ran and lies in no chain.

    Parameters
    ----------
    module : str
        Its path.
    blocks : int
        How many blocks of one class ran in it; 0 where none are repeated.
    block : str
        Their class.
    share : float
        Of the parameters that ran, those of embeddings and heads for a vocabulary left out.
    why : str
        Why no chain has it.
    layers : str
        The pattern that names its blocks; empty where one pattern does not.
    """

    module: str
    blocks: int
    block: str
    share: float
    why: str
    layers: str = ""

    @property
    def sentence(self) -> str:
        """All of it in words."""
        blocks = f"{self.blocks} blocks of {self.block}, " if self.blocks else ""
        advice = f"; layers={self.layers!r} names its blocks" if self.layers else ""
        return f"{self.module} ({blocks}{self.share:.0%} of the parameters): {self.why}{advice}"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, with the sentence."""
        return {**asdict(self), "sentence": self.sentence}


def not_covered(tape: Tape, model: nn.Module, chains: Sequence[Chain], *, named: bool) -> tuple[LeftOut, ...]:
    """The parts of a model that ran and lie in no chain.

    ``tape``: the calls of the first forward, with its trace.
    Returns: In the order in which they ran.
    """
    return tuple(_LeftOutParts(tape, model, chains, named=named).found())


class _LeftOutParts:
    """A walk through the modules of a model, down to those of which nothing lies in a chain."""

    def __init__(self, tape: Tape, model: nn.Module, chains: Sequence[Chain], *, named: bool):
        self._tape, self._model, self._chains, self._named = tape, model, chains, named
        self._ran: RanParameters = ran_parameters(tape, model)
        self._calls: dict[str, list[Call]] = {}
        for call in tape.calls:
            if call.method == FORWARD:
                self._calls.setdefault(call.path, []).append(call)
        self._modules = dict(model.named_modules())
        self._on_chains = self._parameters_on_chains()

    def found(self) -> list[LeftOut]:
        """Every part that is to be named."""
        parts = [part for part in self._parts("", self._model) if part is not None]
        return sorted(parts, key=lambda part: self._first_call(part.module))

    def _first_call(self, path: str) -> int:
        inside = (
            call.order
            for other, calls in self._calls.items()
            if other == path or other.startswith(f"{path}.")
            for call in calls
        )
        return min(inside, default=0)

    def _parameters_on_chains(self) -> set[int]:
        """Of the blocks of all chains, of their branches, and of what computed something on the way from state to state."""
        paths = {path for chain in self._chains for path in chain.blocks}
        paths |= {c.path for chain in self._chains for c in chain.connections}
        paths |= {c.branch_path for chain in self._chains for c in chain.connections if c.branch_path}
        found: set[int] = set()
        for path in paths & self._modules.keys():
            found |= self._ran.within(self._modules[path])
        return found | self._ran.own(self._modules_on_the_way())

    def _modules_on_the_way(self) -> list[nn.Module]:
        trace = self._tape.trace
        if trace is None or trace.error is not None:
            return []
        orders: set[int] = set()
        for chain in self._chains:
            for before, after in pairwise(states_of(self._tape, chain.points)):
                # Between stages anything may happen, also a tower that no chain shows.
                if before is not None and after is not None and before.shape == after.shape:
                    orders |= calls_on_the_way(trace, before, after)
        return [self._tape.calls[order].module for order in orders if order >= 0]

    # --- the walk

    def _parts(self, path: str, module: nn.Module) -> Iterator[LeftOut | None]:
        """What is to be named of a module of which a part lies in a chain."""
        alone: list[str] = []
        for name, child in module.named_children():
            inner, ran = f"{path}.{name}".lstrip("."), self._ran.within(child)
            if not ran or ran <= self._on_chains:
                continue
            if ran & self._on_chains:
                yield from self._parts(inner, child)
            else:
                alone.append(inner)
        yield from self._named_parts(path, alone)

    def _named_parts(self, container: str, paths: Sequence[str]) -> Iterator[LeftOut | None]:
        """Modules of one container of which nothing lies in a chain; those that are blocks of one class together."""
        by_class: dict[type, list[str]] = {}
        for path in paths:
            if any(_is_block(call) for call in self._calls.get(path, ())):
                by_class.setdefault(type(self._modules[path]), []).append(path)
        together = [group for group in by_class.values() if len(group) > 1]
        for group in together:
            calls = [call for path in group for call in self._calls[path]]
            # Named after all of them: the container has other blocks, which lie in a chain.
            yield self._left_out(f"{group[0]} … {group[-1]}" if container else group[0], group, calls)
        taken = {path for group in together for path in group}
        for path in paths:
            if path not in taken:
                yield self._left_out(path, [path], self._blocks_within(path))

    def _blocks_within(self, path: str) -> list[Call]:
        """The calls of the class of blocks that has most of a module's parameters, where they are repeated."""
        by_class: dict[type, list[Call]] = {}
        for other, calls in self._calls.items():
            if other == path or other.startswith(f"{path}."):
                for call in calls:
                    by_class.setdefault(type(call.module), []).append(call)
        # The first block of a stage may change the shape.
        repeated = [calls for calls in by_class.values() if len(calls) > 1 and any(map(_is_block, calls))]
        return max(repeated, key=lambda calls: len(self._own_of(calls)), default=[])

    def _own_of(self, calls: Sequence[Call]) -> set[int]:
        return {parameter for call in calls for parameter in self._ran.within(call.module)}

    def _left_out(self, name: str, paths: Sequence[str], blocks: Sequence[Call]) -> LeftOut | None:
        parameters = {p for path in paths for p in self._ran.within(self._modules[path])}
        share = self._ran.share(parameters)
        single = all(not any(True for _ in self._modules[path].children()) for path in paths)
        if not blocks and (share < NAMED_SHARE or single):  # one layer has no depth
            return None
        return LeftOut(
            module=name,
            blocks=len(blocks),
            block=type(blocks[0].module).__name__ if blocks else "",
            share=share,
            why=self._reason(blocks),
            layers=self._pattern(blocks),
        )

    def _reason(self, blocks: Sequence[Call]) -> str:
        if not blocks:
            return "no blocks follow one another in it"
        if self._named:
            return "layers= names other blocks"
        if any(chain.has_streams or chain.history for chain in self._chains):
            return "of a model whose states have connections, the chain that has them is read alone"
        on_chains = self._ran.share(self._on_chains)
        if self._ran.share(self._own_of(blocks)) < FURTHER_SHARE * on_chains:
            return (
                f"its blocks have less than {FURTHER_SHARE:.0%} of the parameters of the blocks that are read"
            )
        return "no chain of its states was found, or none that is proven"

    def _pattern(self, blocks: Sequence[Call]) -> str:
        paths = list(dict.fromkeys(call.path for call in blocks))
        patterns = {re.sub(r"\d+(?=\D*$)", "{i}", path) for path in paths}
        pattern = patterns.pop() if len(patterns) == 1 else ""
        if "{i}" not in pattern or set(block_paths(self._model, [pattern])) != set(paths):
            return ""
        return pattern


def _is_block(call: Call) -> bool:
    """Whether a call may be that of a block: it gives what it takes in shape, and has parts with matrices."""
    if not call.x_shape or call.x_shape != call.y_shape:
        return False
    modules = all_modules(call.module)
    matrices = (p for module in modules for p in module._parameters.values() if p is not None and p.ndim >= 2)
    return len(modules) > 1 and sum(1 for _ in matrices) >= MATRICES


def calls_on_the_way(trace: Trace, before: Value, after: Value) -> set[int]:
    """Orders of the module calls that computed something from one value that another one was computed from."""
    waiting, needed = [after.number], {after.number}
    while waiting:
        for parent in trace.parents[waiting.pop()]:
            if parent > before.number and parent not in needed:
                needed.add(parent)
                waiting.append(parent)
    # In the order of their numbers: what a value was computed from comes before it.
    reached = {before.number}
    for number in sorted(needed):
        if any(parent in reached for parent in trace.parents[number]):
            reached.add(number)
    return {trace.calls[number] for number in reached if number != before.number}
