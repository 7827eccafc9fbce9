"""How a plain block adds its branches to the residual state.

Found in numbers, state + α · branch = next state, since an addition in a forward is a function that no hook sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from depthscope.probes.connections.coefficients import spread, tolerance
from depthscope.probes.model.tensors import version
from depthscope.probes.model.user_modes import compute_dtype
from depthscope.probes.structure.chain import Chain, Connection, HookPoint
from depthscope.probes.structure.stream_chain import branch_label
from depthscope.probes.structure.tape import Call, is_norm

# More calls with the state's shape than this are a stack of blocks, not a block: the search grows with the square of their
# number. A heuristic of ours.
MAX_CALLS = 40
ELEMENTS = 4096  # of a state, compared to find whether it is the sum of two others; all of them would cost a copy each
# A change below this many roundings of the state could be explained by any small branch.
CLEAR_CHANGE = 10.0


@dataclass(frozen=True)
class BranchSum:
    """One step inside a block: these branches were added, and this call shows the state after them."""

    branches: tuple[Call, ...]
    seen: Call | None  # None for the block's own output
    at: str
    normed: bool = False  # the sum went through a norm, as in a post-norm block


def find_branch_sums(block: Call) -> tuple[BranchSum, ...] | None:
    """The steps by which a block's branches turn its input into its output.

    ``block``: A call that ended, with the calls made during it in ``children``.
    Returns: None where no sums of its children's outputs, or norms of such sums, explain the output.
    """
    rewritten = block.x is not None and block.versions[0] != version(block.x)
    if block.x is None or block.y is None or rewritten:  # x += branch leaves no state to compare with
        return None
    inner = [
        call for call in block.children if call.x_shape == block.x_shape or call.y_shape == block.x_shape
    ]
    if len(inner) > MAX_CALLS:
        return None
    return _Search(block, inner).steps(_sampled_elements(block.x), block.order) or None


class _Search:
    """The search for the steps of one block: what is added first, and what follows from there."""

    def __init__(self, block: Call, inner: list[Call]) -> None:
        self.goal = _sampled_elements(block.y)
        self.limit = tolerance(compute_dtype(block.y)) if block.y is not None else 0.0
        shape = block.x_shape
        self.branches = [c for c in inner if c.y is not None and c.y_shape == shape]
        self.takers = [c for c in inner if c.x is not None and c.x_shape == shape]

    def steps(self, state: torch.Tensor, order: int) -> tuple[BranchSum, ...] | None:
        if (state - self.goal).norm() <= self.limit * self.goal.norm():
            return ()
        # Depth first: a step that leads nowhere is taken back, as where one branch happens to fit a state that two made.
        for add, after in self._next_steps(state, order):
            rest = self.steps(after, max(branch.order for branch in add.branches))
            if rest is not None:
                return (add, *rest) if rest else (replace(add, seen=None, at="output"),)
        return None

    def _next_steps(self, state: torch.Tensor, order: int) -> Iterator[tuple[BranchSum, torch.Tensor]]:
        later = [branch for branch in self.branches if branch.order > order]
        for count in (1, 2):  # one branch after the other, or two in parallel
            for chosen in combinations(later, count):
                total = torch.stack([_sampled_elements(branch.y) for branch in chosen]).sum(0)
                for target, seen, at, after in self._possible_sums(max(c.order for c in chosen)):
                    if _explains(target - state, total, target, self.limit):
                        yield BranchSum(chosen, seen, at, normed=at == "output" and seen is not None), after

    def _possible_sums(self, order: int) -> Iterator[tuple[torch.Tensor, Call | None, str, torch.Tensor]]:
        """What the sum may be: the block's output, what a later call takes, or what a norm takes to give the state."""
        for call in self.takers:
            if call.order > order:
                taken = _sampled_elements(call.x)
                yield taken, call, "input", taken
        yield self.goal, None, "output", self.goal
        for call in self.takers:
            if call.order > order and call in self.branches and is_norm(call.module):
                yield _sampled_elements(call.x), call, "output", _sampled_elements(call.y)


def _explains(change: torch.Tensor, branch: torch.Tensor, target: torch.Tensor, limit: float) -> bool:
    """Whether the change is a positive multiple of the branch, as far as the precision of the states can tell."""
    if not change.norm() > CLEAR_CHANGE * limit * target.norm():
        return False
    # α by least squares: residual scales differ (DeepNorm, LayerScale, Granite's residual_multiplier).
    scale = (change @ branch) / (branch @ branch).clamp_min(torch.finfo(branch.dtype).tiny)
    return bool((change - scale * branch).norm() <= limit * target.norm() and scale > 0)


def _sampled_elements(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    flat = tensor.detach().reshape(-1)
    return flat[spread(len(flat), ELEMENTS).to(flat.device)].double()


def with_branch_sums(chain: Chain, blocks: Sequence[Call]) -> Chain:
    """A plain chain with the states inside its blocks and its branches, where every block shows how it adds them.

    ``chain``: the input of every block and the output of the last.
    Returns: The chain as it came where some block does not show it.
    """
    if not all(block.branch_sums for block in blocks):
        return chain
    points, shapes = [chain.points[0]], [chain.shapes[0]]
    connections: list[Connection] = []
    for number, block in enumerate(blocks):
        outside = chain.points[number + 1]
        for step in block.branch_sums:
            depth = len(points) - 1
            connections += [
                _connection(step, branch, block, outside.layer, depth) for branch in step.branches
            ]
            if step.seen is None:
                points.append(outside)
                shapes.append(chain.shapes[number + 1])
            else:
                call, producer = step.seen, step.branches[-1].path
                points.append(HookPoint(call.path, call.index, step.at, outside.layer, "mid", producer))
                shapes.append(call.x_shape)
    return replace(chain, points=tuple(points), connections=tuple(connections), shapes=tuple(shapes))


def _connection(step: BranchSum, branch: Call, block: Call, layer: int, depth: int) -> Connection:
    label = branch_label(
        branch.path.rpartition(".")[2], type(branch.module).__name__, branch.path.removeprefix(block.path)
    )
    return Connection(
        path=branch.path,
        index=branch.index,
        layer=layer,
        branch=label,
        branch_path=branch.path,
        branch_index=branch.index,
        style="normed" if step.normed else "add",
        depth_in=depth,
        depth_out=depth + 1,
    )
