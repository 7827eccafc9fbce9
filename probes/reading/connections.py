"""What joins two states? Replays of the recorded steps on unit streams give H_res, H_pre and H_post."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.cuts import Cut
from depthscope.probes.reading.description import BranchReading, ConnectionReading
from depthscope.probes.reading.graph import ReadingError, TracedValue, filled
from depthscope.probes.reading.operations import JOINS, MIXES, MOVES, PRODUCTS
from depthscope.probes.reading.states import FeaturesDiffer, Replays, States, Table

GATE = 1e-5  # a weight that differs by more than this along the features is one of each feature


@dataclass
class DepthParts:
    """Sums over depth: each state, and what each branch reads, is a sum of the first value and of all branches' outputs."""

    states: list[TracedValue]
    sources: list[torch.Tensor]  # (tokens, features)
    # By the number of a state or read: (tokens, its values at once, sources, features or 1).
    weights: dict[int, torch.Tensor]
    constants: dict[int, torch.Tensor]

    def of(self, value: TracedValue) -> torch.Tensor:
        """The weights of a state, or of a read of one value."""
        return self.weights[value.number][:, 0]


def weights(found: torch.Tensor) -> torch.Tensor:
    """Weights along the features as one number where they are the same: (…, D) as (…, 1)."""
    if found.shape[-1] == 1:
        return found
    mean = found.mean(-1, keepdim=True)
    scale = mean.abs().max().clamp_min(1.0)
    return mean if bool((found - mean).abs().max() <= GATE * scale) else found


class Held:
    """What values hold of each stream of a state, and of each stream of some branches' outputs."""

    def __init__(
        self,
        states: States,
        replays: Replays,
        targets: Sequence[TracedValue],
        sources: Sequence[Sequence[TracedValue]],
    ):
        self._states, self._replays = states, replays
        self._streams = [states.num_streams(values) for values in sources]
        units: Table = {}
        for at, (values, streams) in enumerate(zip(sources, self._streams, strict=True)):
            for stream in range(streams):
                for number, unit in replays.unit(values, stream, streams).items():
                    units.setdefault(number, {})[at, stream] = unit
        self._table = replays.held(targets, units)

    def columns(self, values: Sequence[TracedValue], sources: Sequence[int]) -> torch.Tensor:
        """The weights with which some values hold the streams of some sources: (tokens, to, from, features or 1)."""
        bases = [(at, stream) for at in sources for stream in range(self._streams[at])]
        boxes = [self._replays.box(value) for value in values]
        zeros = [box.zeros(self._replays.kind, self._replays.device) for box in boxes]
        tensors = [
            torch.stack([self._table.get(value.number, {}).get(basis, zero) for basis in bases])
            for value, zero in zip(values, zeros, strict=True)
        ]
        found = self._states.sorted(tensors, [box.numbers for box in boxes], self._replays.num_features)
        return weights(found.permute(1, 2, 0, 3))


class _Joined(NamedTuple):
    """What joins two states, apart from the values of the forward."""

    h_res: torch.Tensor
    writes: list[torch.Tensor]  # by branch
    reads: list[list[torch.Tensor]]
    constant: torch.Tensor | None
    weighs: bool


class _Link(NamedTuple):
    """Two states, and what is between them."""

    start: Cut  # the state, after the norm with which the step begins
    target: Cut
    branches: list[Branch]
    reads: list[list[TracedValue]]  # by branch
    sources: list[Cut]  # of which the target and the reads are made
    before_sum: list[str]
    after_sum: list[str]


class Linear:
    """The values of a memory as sums of earlier ones."""

    def __init__(self, states: States):
        self.states = states
        self._replays = [Replays(states, one_feature=True), Replays(states, one_feature=False)]
        self._known: dict[Hashable, _Joined] = {}
        self._writes: list[tuple[int, int]] | None = None
        # By the numbers of two states.
        self._links: dict[Hashable, tuple[_Link, Hashable | None]] = {}

    def held(self, targets: Sequence[TracedValue], sources: Sequence[Sequence[TracedValue]]) -> Held:
        """What some values hold of the streams of others."""
        try:
            return Held(self.states, self._replays[0], targets, sources)
        except FeaturesDiffer:
            return Held(self.states, self._replays[1], targets, sources)

    def joined_by(
        self, number: int, before: Cut, after: Cut, branches: Sequence[Branch]
    ) -> ConnectionReading:
        """The connection between a state, which has a number, and the next one."""
        link, steps = self._link(before, after, branches)
        joined = None if steps is None else self._known.get(steps)
        if joined is None:
            joined = self._joined(link, before)
            if steps is not None:
                self._known[steps] = joined
        found = [
            self._branch(branch, write, list(zip(of, weights, strict=True)))
            for branch, write, of, weights in zip(
                link.branches, joined.writes, link.reads, joined.reads, strict=True
            )
        ]
        return ConnectionReading(
            number,
            joined.h_res,
            found,
            joined.constant,
            link.start,
            link.target,
            link.before_sum,
            link.after_sum,
            joined.weighs,
        )

    def _branch(
        self, branch: Branch, write: torch.Tensor, reads: Sequence[tuple[TracedValue, torch.Tensor]]
    ) -> BranchReading:
        """What a branch reads and writes: of several values those of all streams at once, otherwise the last one."""
        found = BranchReading(branch, write, self.states.output(branch), reads=reads)
        mixtures = len(reads) > 1 and all(matrix.shape[1] == 1 for _, matrix in reads)
        together = (mixtures or found.out.shape[1] > 1) and all(matrix.shape[-1] == 1 for _, matrix in reads)
        matrices = [matrix for _, matrix in (reads if together else reads[-1:])]
        if not matrices:
            return found
        found.read = torch.cat(matrices, 1)
        is_gate, is_one = found.read.shape[-1] > 1, not together and matrices[-1].shape[1] == 1
        whole = [read for read, _ in reads if self.states.memory.is_whole(read)]
        if whole and (is_gate or not is_one or matrices[-1].shape[2] > 1):
            taken = whole[-1:] if is_one or is_gate else whole
            found.taken = torch.cat([self.states.array([read]) for read in taken], 1)
        return found

    def _link(self, before: Cut, after: Cut, branches: Sequence[Branch]) -> tuple[_Link, Hashable | None]:
        """What is between two states, and its steps, where these begin with the state as it is."""
        key = tuple(tuple(value.number for value in cut) for cut in (before, after))
        if key not in self._links:
            begins = {value.number for value in before}
            target = [self.states.before_functions(value, begins) for value in after]
            start = [self.states.after_functions(value) for value in before]
            if _last(start) >= _last(target):  # the step is no more than a norm
                start = list(before)
            before_sum, after_sum = (
                [last.name for first, last in zip(*ends, strict=True) if first is not last]
                for ends in ((before, start), (target, after))
            )
            between = self._written(branches, _last(before), _last(after))
            first = min(begins)
            reads = [
                [r for r in dict.fromkeys([*b.reads_before_norms, b.read]) if r.number >= first]
                for b in between
            ]
            sources = [start, *([b.source] for b in between)]
            link = _Link(start, target, between, reads, sources, before_sum, after_sum)
            self._links[key] = link, self._steps(link) if start == before else None
        return self._links[key]

    def _joined(self, link: _Link, before: Cut) -> _Joined:
        target, sources = link.target, link.sources
        first = min(value.number for value in sources[0])
        early = [read for of in link.reads for read in of if read.number < first]
        late = [read for of in link.reads for read in of if read.number >= first]
        held = self.held([*target, *late], sources)
        # Where the step begins with a norm, branches may read what comes before that.
        held_early = self.held(early, [before]) if early else held
        h_res = held.columns(target, [0])
        return _Joined(
            h_res,
            [held.columns(target, [at]) for at in range(1, len(sources))],
            [
                [(held_early if read in early else held).columns([read], [0]) for read in of]
                for of in link.reads
            ],
            self._constants([target], sources).get(0),
            self._weighs(sources[0], target, h_res),
        )

    def _steps(self, link: _Link) -> Hashable | None:
        """What the steps that join two states are, to be compared; None where one adds a constant, or takes anything else."""
        states, replays, sources = self.states, self._replays[0], link.sources
        places = {value.number: at for at, value in enumerate(v for of in sources for v in of)}
        parts: list[Hashable] = [tuple(map(len, sources))]
        parts += [id(states.numbers(value)) for of in sources for value in of]
        ends = [*link.target, *(read for of in link.reads for read in of)]
        try:
            for value in replays.between(ends, places):
                if replays.adds_constant(value) or not states.has_numbers(value):
                    return None
                operands = filled(
                    (value.args, value.kwargs, replays.taken(value)), lambda of: places[of.number]
                )
                parts.append((value.name, repr(operands), value.item, id(states.numbers(value))))
                places[value.number] = len(places)
            return (*parts, *(tuple(places[v.number] for v in of) for of in (link.target, *link.reads)))
        except KeyError:
            return None

    def _weighs(self, before: Cut, target: Sequence[TracedValue], h_res: torch.Tensor) -> bool:
        """Whether a step of the memory between two states scales, mixes, moves or leaves out streams."""
        memory = self.states.memory
        for number in memory.back(target, {value.number for value in before}):
            value = memory.graph.values[number]
            if value.name in MOVES and value.numel < max((v.numel for v in memory.inside(value)), default=0):
                return True
            if value.name not in MOVES and any(value.name in group for group in (PRODUCTS, MIXES, JOINS)):
                return True
        identity = torch.eye(*h_res.shape[1:3], dtype=h_res.dtype, device=h_res.device)
        return h_res.shape[1] > 1 and bool((h_res != identity[..., None]).any())

    def _written(self, branches: Sequence[Branch], begin: int, end: int) -> list[Branch]:
        """The branches that write between two moments, in their order."""
        if self._writes is None:
            pairs = ((write.number, at) for at, branch in enumerate(branches) for write in branch.writes)
            self._writes = sorted(pairs)
        first, last = (bisect_right(self._writes, (moment, len(branches))) for moment in (begin, end))
        return [branches[at] for at in sorted({at for _, at in self._writes[first:last]})]

    def _constants(
        self, groups: Sequence[Sequence[TracedValue]], sources: Sequence[Sequence[TracedValue]]
    ) -> dict[int, torch.Tensor]:
        """What else is added to groups of values, as (tokens, streams, features) by their positions where it is something."""
        values = [value for group in groups for value in group]
        found = self._replays[1].constants(values, {value.number for of in sources for value in of})
        constants: dict[int, torch.Tensor] = {}
        for at, group in enumerate(groups):
            if not any(value.number in found for value in group):
                continue
            tensors = [found.get(value.number, torch.zeros(value.shape))[None] for value in group]
            numbers = [self.states.numbers(value) for value in group]
            constant = self.states.sorted(tensors, numbers, self.states.num_features)[0]
            if bool(constant.any()):
                constants[at] = constant
        return constants

    def over_depth(self, branches: Sequence[Branch], values: Sequence[TracedValue]) -> DepthParts:
        """The weights with which states and reads hold the first value and the outputs of all branches."""
        reads = [read for branch in branches for read in self.mixtures(branch)]
        ordered = sorted(dict.fromkeys(values), key=lambda value: value.number)
        held_values = list(dict.fromkeys([*ordered, *reads]))
        counts = {self.states.num_streams([value]) for value in ordered}
        if counts != {1}:
            raise ReadingError(
                f"what is carried becomes larger on its way ({min(counts)} to {max(counts)} times the first state), so it is "
                "no fixed number of residual streams"
            )
        root = self.states.memory.root
        if (streams := self.states.num_streams([root])) > 1:
            raise ReadingError(
                f"branches read earlier states next to the last one, and these have {streams} streams"
            )
        outputs = [self.states.output(branch) for branch in branches]
        if any(output.shape[1] > 1 for output in outputs):
            raise ReadingError("branches read earlier states, and one of them gives several streams at once")
        sources = [[root], *([branch.source] for branch in branches)]
        found = self.held(held_values, sources)
        added = self._constants([[value] for value in held_values], sources)
        return DepthParts(
            ordered,
            [self.states.array([root])[:, 0], *(output[:, 0] for output in outputs)],
            {value.number: found.columns([value], range(len(sources))) for value in held_values},
            {held_values[at].number: constant for at, constant in added.items()},
        )

    def mixtures(self, branch: Branch) -> list[TracedValue]:
        """What a branch reads: several mixtures of earlier outputs at once, or one."""
        trunk = self.states.memory.trunk
        several = [read for read in branch.reads_before_norms if read.number not in trunk]
        return list(dict.fromkeys([*(several if len(several) > 1 else ()), branch.read]))


def _last(cut: Cut) -> int:
    return max(value.number for value in cut)
