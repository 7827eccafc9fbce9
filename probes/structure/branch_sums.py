"""How a plain block adds its branches to the residual state: found in numbers, state + α · branch = next state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from depthscope.probes.connections.coefficients import spread, tolerance
from depthscope.probes.model.autocast import compute_dtype
from depthscope.probes.structure.chain import Chain, Link, Place
from depthscope.probes.structure.stream_chain import branch_label
from depthscope.probes.structure.tape import Call, is_norm, version

MOST = 40  # calls inside a block
ELEMENTS = 4096  # elements of a state that tell whether one is the sum of two others


@dataclass(frozen=True)
class Add:
    """One step inside a block: these branches were added, and the state behind them is seen here."""

    branches: tuple[Call, ...]
    seen: Call | None  # None for the block's own output
    at: str
    normed: bool = False  # the sum went through a norm, as in a post-norm block


def find_adds(block: Call) -> tuple[Add, ...] | None:
    """The steps by which a block's branches turn its input into its output.

    Parameters
    ----------
    block : Call
        A call that ended, with the calls made during it in ``children``.

    Returns
    -------
    tuple of Add or None
        None where no sums of its children's outputs, or norms of such sums, explain the output.
    """
    if block.x is None or block.y is None or block.versions[0] != version(block.x):
        return None
    inner = [
        call for call in block.children if call.x_shape == block.x_shape or call.y_shape == block.x_shape
    ]
    if len(inner) > MOST:
        return None  # a stack of blocks, not a block
    return _Search(block, inner).steps(_sample(block.x), block.order) or None


class _Search:
    """The search for the steps of one block: what is added first, and what follows from there."""

    def __init__(self, block: Call, inner: list[Call]) -> None:
        self.goal = _sample(block.y)
        self.limit = tolerance(compute_dtype(block.y)) if block.y is not None else 0.0
        shape = block.x_shape
        self.branches = [c for c in inner if c.y is not None and c.y_shape == shape]
        self.takers = [c for c in inner if c.x is not None and c.x_shape == shape]

    def steps(self, state: torch.Tensor, order: int) -> tuple[Add, ...] | None:
        if (state - self.goal).norm() <= self.limit * self.goal.norm():
            return ()
        for add, after in self._options(state, order):
            rest = self.steps(after, max(branch.order for branch in add.branches))
            if rest is not None:
                return (add, *rest) if rest else (replace(add, seen=None, at="output"),)
        return None

    def _options(self, state: torch.Tensor, order: int) -> Iterator[tuple[Add, torch.Tensor]]:
        later = [branch for branch in self.branches if branch.order > order]
        for count in (1, 2):  # one branch after the other, or two in parallel
            for chosen in combinations(later, count):
                total = torch.stack([_sample(branch.y) for branch in chosen]).sum(0)
                for target, seen, at, after in self._targets(max(c.order for c in chosen)):
                    if _explains(target - state, total, target, self.limit):
                        yield Add(chosen, seen, at, normed=at == "output" and seen is not None), after

    def _targets(self, order: int) -> Iterator[tuple[torch.Tensor, Call | None, str, torch.Tensor]]:
        """What the sum may be: the block's output, what a later call takes, or what a norm takes to give the state."""
        for call in self.takers:
            if call.order > order:
                taken = _sample(call.x)
                yield taken, call, "input", taken
        yield self.goal, None, "output", self.goal
        for call in self.takers:
            if call.order > order and call in self.branches and is_norm(call.module):
                yield _sample(call.x), call, "output", _sample(call.y)


def _explains(change: torch.Tensor, branch: torch.Tensor, target: torch.Tensor, limit: float) -> bool:
    """Whether the change is a multiple of the branch, as far as the precision of the states can tell."""
    if not change.norm() > 10 * limit * target.norm():
        return False
    scale = (change @ branch) / (branch @ branch).clamp_min(torch.finfo(branch.dtype).tiny)
    return bool((change - scale * branch).norm() <= limit * target.norm() and scale > 0)


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
            links += [_link(add, branch, block, layer, depth) for branch in add.branches]
            if add.seen is None:
                places.append(outside)
                shapes.append(chain.shapes[number + 1])
            else:
                seen = add.seen
                producer = add.branches[-1].path
                places.append(Place(seen.path, seen.index, add.at, layer, "mid", producer))
                shapes.append(seen.x_shape)
    return replace(chain, places=tuple(places), links=tuple(links), shapes=tuple(shapes))


def _link(add: Add, branch: Call, block: Call, layer: int, depth: int) -> Link:
    inside = branch.path.removeprefix(block.path)
    label = branch_label(branch.path.rpartition(".")[2], type(branch.module).__name__, inside)
    style = "normed" if add.normed else "add"
    return Link(branch.path, branch.index, layer, label, branch.path, branch.index, style, depth, depth + 1)
