"""What joins two states? Replays of the recorded steps on unit streams give H_res, H_pre and H_post."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from depthscope.probes.reading.branches import Branch
from depthscope.probes.reading.cuts import Cut
from depthscope.probes.reading.graph import ReadingError, TracedValue
from depthscope.probes.reading.states import States

GATE = 1e-5  # a weight that differs by more than this along the features is one of each feature


@dataclass
class BranchParts:
    """What one branch reads and writes in one connection; weights are (tokens, to, from, features or 1)."""

    branch: Branch
    write: torch.Tensor
    out: torch.Tensor | None  # (tokens, streams of the branch, features)
    added: torch.Tensor  # what it adds to the next state, (tokens, streams, features)
    reads: list[tuple[TracedValue, torch.Tensor]] = field(default_factory=list)


@dataclass
class ConnectionParts:
    """What joins two states."""

    h_res: torch.Tensor  # (tokens, to, from, features or 1)
    branches: list[BranchParts]
    constant: torch.Tensor | None
    target: list[TracedValue]  # the next state, before its last norm
    functions: list[str]
    error: float = 0.0


def weights(found: torch.Tensor) -> torch.Tensor:
    """Weights along the features as one number where they are the same: (…, D) as (…, 1)."""
    mean = found.mean(-1, keepdim=True)
    scale = mean.abs().max().clamp_min(1.0)
    return mean if bool((found - mean).abs().max() <= GATE * scale) else found


def joined_by(states: States, before: Cut, after: Cut, branches: Sequence[Branch]) -> ConnectionParts:
    """The parts of the connection between two states."""
    target = [states.before_functions(value) for value in after]
    functions = [v.name for v, t in zip(after, target, strict=True) if v is not t]
    h_res = _columns(states, target, before)
    begin, end = _last(before), _last(after)
    near = (b for b in branches if b.writes[0].number <= end and b.writes[-1].number > begin)
    between = [b for b in near if any(begin < write.number <= end for write in b.writes)]
    found = [_branch_parts(states, before, target, branch) for branch in between]
    zeros = [*before, *(branch.source for branch in between)]
    nothing = {v.number: torch.zeros_like(states.graph.tensor(v)) for v in zeros}
    constant = states.array(target, states.replay(target, nothing, real=True))
    return ConnectionParts(h_res, found, constant if bool(constant.any()) else None, target, functions)


def _last(cut: Cut) -> int:
    return max(value.number for value in cut)


def _columns(states: States, target: Sequence[TracedValue], cut: Cut) -> torch.Tensor:
    """What some values hold of each stream of a state: (tokens, to, from, features or 1)."""
    units = (states.unit(cut, stream) for stream in range(states.num_streams(cut)))
    columns = [states.array(target, states.replay(target, unit)) for unit in units]
    return weights(torch.stack(columns, 2))


def _branch_parts(states: States, before: Cut, target: Sequence[TracedValue], branch: Branch) -> BranchParts:
    source = branch.source
    own = states.graph.tensor(source)
    added = states.array(target, states.replay(target, {source.number: own}))
    out = branch_output(states, branch)
    found = BranchParts(branch, _write_weights(states, branch, out, target), out, added)
    first = min(value.number for value in before)
    for read in dict.fromkeys([*branch.reads_before_norms, branch.read]):
        if read.number >= first:
            found.reads.append((read, _columns(states, [read], before)))
    return found


def branch_output(states: States, branch: Branch) -> torch.Tensor | None:
    """What a branch gave as (tokens, streams, features); None where it is spread over tokens, or has some features alone."""
    if branch.numbers is None:
        return None
    try:
        return states.sorted([states.graph.tensor(branch.source)], [branch.numbers])
    except ReadingError:
        return None


def _write_weights(
    states: States, branch: Branch, out: torch.Tensor | None, target: Sequence[TracedValue]
) -> torch.Tensor:
    """The weights with which the next state holds a branch's streams: (tokens, to, from, features or 1)."""
    source = branch.source
    own = states.graph.tensor(source)
    columns = []
    for stream in range(1 if out is None else out.shape[1]):
        single = out is None or out.shape[1] == 1
        unit = torch.ones_like(own) if single else _unit(states, branch, own, stream)
        columns.append(states.array(target, states.replay(target, {source.number: unit})))
    return weights(torch.stack(columns, 2))


def _unit(states: States, branch: Branch, own: torch.Tensor, stream: int) -> torch.Tensor:
    assert branch.numbers is not None
    order, n = states.order([branch.numbers])
    places = torch.arange(own.numel()) if order is None else order
    flat = torch.zeros(own.numel())
    flat[places.reshape(-1, n)[:, stream]] = 1
    return flat.reshape(own.shape).to(own)


@dataclass
class DepthParts:
    """Sums over depth: each state, and what each branch reads, is a sum of the first value and of all branches' outputs."""

    states: list[TracedValue]
    sources: list[torch.Tensor | None]  # (tokens, features); None where an output has no order of its own
    weights: dict[
        int, list[torch.Tensor]
    ]  # by the number of a state or read, and by source: (tokens, features or 1)
    constants: dict[int, torch.Tensor]


def over_depth(states: States, branches: Sequence[Branch], values: Sequence[TracedValue]) -> DepthParts:
    """The weights with which states and reads hold the first value and the outputs of all branches."""
    ordered = sorted(dict.fromkeys(values), key=lambda value: value.number)
    held = list(dict.fromkeys([*ordered, *(branch.read for branch in branches)]))
    counts = {states.num_streams([value]) for value in held}
    if counts != {1}:
        raise ReadingError(f"the memory grows, and what branches read has {sorted(counts)} streams")
    root = states.memory.root
    sources: list[torch.Tensor | None] = [states.array([root])[:, 0]]
    columns = [_held_by(states, held, root)]
    for branch in branches:
        out = branch_output(states, branch)
        sources.append(out[:, 0] if out is not None and out.shape[1] == 1 else None)
        columns.append(_held_by(states, held, branch.source))
    zeros = {
        v.number: torch.zeros_like(states.graph.tensor(v)) for v in (root, *(b.source for b in branches))
    }
    again = states.replay(held, zeros, real=True)
    constants = {value.number: states.array([value], again)[:, 0] for value in held}
    rows = zip(held, zip(*columns, strict=True), strict=True)
    return DepthParts(ordered, sources, {value.number: list(row) for value, row in rows}, constants)


def _held_by(states: States, held: Sequence[TracedValue], source: TracedValue) -> list[torch.Tensor]:
    ones = {source.number: torch.ones_like(states.graph.tensor(source))}
    again = states.replay(held, ones)
    return [weights(states.array([value], again)[:, 0]) for value in held]
