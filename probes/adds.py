"""How a plain block adds its branches to the residual state: found in numbers, state + α · branch = next state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from probes.place import Chain, Link, Place
from probes.reading import spread, tolerance
from probes.streams import branch_label
from probes.tape import Call, version

ELEMENTS = 4096  # elements of a state that tell whether one is the sum of two others


@dataclass(frozen=True)
class Add:
    """One step inside a block: these branches were added, and the state behind them is seen here."""

    branches: tuple[Call, ...]
    seen: Call | None  # None for the block's own output
    at: str


def find_adds(block: Call) -> tuple[Add, ...] | None:
    """The steps by which a block's branches turn its input into its output.

    Parameters
    ----------
    block : Call
        A call that ended, with the calls made during it in ``children``.

    Returns
    -------
    tuple of Add or None
        None where no sum of its children's outputs explains the output, as in a post-norm block.
    """
    inner = [
        call for call in block.children if call.x_shape == block.x_shape or call.y_shape == block.x_shape
    ]
    if block.x is None or block.y is None or block.versions[0] != version(block.x):
        return None
    steps: list[Add] = []
    state, order = _sample(block.x), block.order
    goal = _sample(block.y)
    limit = tolerance(block.y.dtype)
    while not _near(state, goal, limit):
        step = _next_step(block, inner, state, order, limit)
        if step is None or len(steps) == len(inner):
            return None
        steps.append(step)
        seen = step.seen
        state = goal if seen is None else _sample(seen.x if step.at == "input" else seen.y)
        order = max(branch.order for branch in step.branches)
    return tuple(steps) or None


def _next_step(block: Call, inner: list[Call], state: torch.Tensor, order: int, limit: float) -> Add | None:
    branches = [c for c in inner if c.order > order and c.y is not None and c.y_shape == block.y_shape]
    for count in (1, 2):  # one branch after the other, or two in parallel
        for chosen in combinations(branches, count):
            total = torch.stack([_sample(branch.y) for branch in chosen]).sum(0)
            for seen, at, target in _targets(block, inner, max(c.order for c in chosen)):
                if _explains(target - state, total, target, limit):
                    return Add(chosen, seen, at)
    return None


def _targets(block: Call, inner: list[Call], order: int) -> Iterator[tuple[Call | None, str, torch.Tensor]]:
    for call in inner:
        if call.order > order and call.x is not None and call.x_shape == block.x_shape:
            yield call, "input", _sample(call.x)
    yield None, "output", _sample(block.y)


def _explains(change: torch.Tensor, branch: torch.Tensor, target: torch.Tensor, limit: float) -> bool:
    """Whether the change is a multiple of the branch, as far as the precision of the states can tell."""
    if not change.norm() > 10 * limit * target.norm():
        return False
    scale = (change @ branch) / (branch @ branch).clamp_min(torch.finfo(branch.dtype).tiny)
    return bool((change - scale * branch).norm() <= limit * target.norm() and scale > 0)


def _near(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    return bool((a - b).norm() <= limit * b.norm())


def _sample(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    flat = tensor.detach().reshape(-1)
    return flat[spread(len(flat), ELEMENTS).to(flat.device)].double()


def with_adds(chain: Chain, blocks: Sequence[Call]) -> Chain:
    """A plain chain with the states inside its blocks and its branches, where every block shows how it adds them.

    Parameters
    ----------
    chain : Chain
        The input of every block and the output of the last.
    blocks : sequence of Call
        The blocks, with their ``adds``.

    Returns
    -------
    Chain
        The chain as it came where some block does not show it.
    """
    if not all(block.adds for block in blocks):
        return chain
    places, links = [chain.places[0]], []
    shapes = [chain.shapes[0]]
    for number, block in enumerate(blocks):
        outside = chain.places[number + 1]
        layer = outside.layer
        for add in block.adds:
            depth = len(places) - 1
            links += [_link(branch, layer, depth) for branch in add.branches]
            if add.seen is None:
                places.append(outside)
                shapes.append(chain.shapes[number + 1])
            else:
                seen = add.seen
                producer = add.branches[-1].path
                places.append(Place(seen.path, seen.index, add.at, layer, "mid", producer))
                shapes.append(seen.x_shape)
    return replace(chain, places=tuple(places), links=tuple(links), shapes=tuple(shapes))


def _link(branch: Call, layer: int, depth: int) -> Link:
    label = branch_label(branch.path.rpartition(".")[2], type(branch.module).__name__)
    return Link(branch.path, branch.index, layer, label, branch.path, branch.index, "add", depth, depth + 1)
