"""Do the weights say that the blocks still begin near zero, as their designer started them? Evidence, and its words.

Residual branches that begin at or near zero are a design (ReZero, LayerScale, BERT's small weights), and a network that has
not been trained yet then holds one representation in all layers. Only the weights tell such a start from a collapse.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from depthscope.probes.model.modules import all_parameters, module_paths
from depthscope.probes.structure.branch_scales import BranchScale
from depthscope.probes.structure.chain import Chain

# Weights of a norm begin at 1, and move by about the learning rate in a step: within 0.3 of 1 a network is young, after a
# hundred steps or so. This project.
YOUNG = 0.3
# A scale of a branch below this is small: LayerScale begins between 1e-6 and 0.1, ReZero at 0. This project.
SMALL_FACTOR = 0.2
# Times the root of the fan-in, the size of an output for an input of size 1: 1 or so keeps the size, 0.16 is that of weights
# of standard deviation 0.02 and width 64. This project.
SMALL_GAIN = 0.35
# The matrices of one name are drawn from one distribution in all blocks, or smaller by the root of the depth at most: about
# 10. This project.
OUT_OF_LINE = 30.0
SAMPLED = 4096  # numbers of a matrix from which its size is estimated
SAME_SCALE = 3.0  # weights that were all drawn from one distribution differ by less in their root mean square. This project.


def start_facts(model: nn.Module, chain: Chain, *, is_touched: bool = False) -> dict[str, Any]:
    """How far the norms of some blocks have moved, and why their branches are near zero by construction.

    ``is_touched``: whether they are known not to be as initialisers leave them.
    Returns: Those that are known: ``untouched``, 1 where every vector is as initialisers leave it; ``norms_moved``, the
    largest distance of a weight of a norm from 1, of the median norm; without norms ``drawn_moved``, see
    `_beyond_their_draw`; ``small_start``, a sentence. Empty where the matrices of one block are far larger than those of the
    others.
    """
    with torch.no_grad():
        blocks = _weights_of_blocks(model, chain)
        by_block = [list({id(p): p for _, p, _ in of}.values()) for of in blocks.values()]
        if not by_block or not all(by_block):
            return {}
        # A block that was drawn many times as large as the others is no start by construction, whatever else is.
        if _out_of_line(blocks.values()):
            return {}
        every = [weight for of in blocks.values() for weight in of]
        facts: dict[str, Any] = {"untouched": 1} if not is_touched and all(_untouched([every])) else {}
        moved = _distance_from_one([p for block in by_block for p in block])
        beyond = _beyond_their_draw(every) if moved is None else None
        facts |= {"norms_moved": moved} if moved is not None else {}
        facts |= {"drawn_moved": beyond} if beyond is not None else {}
        # Connections of several streams have small factors of their own. Without norms nothing tells the age.
        if not chain.has_streams and (moved is None or moved <= YOUNG):
            why = _small_by_construction(model, by_block, chain.scales, moved)
            facts |= {"small_start": why} if why else {}
        return facts


def untouched_blocks(model: nn.Module, chain: Chain) -> dict[str, Any]:
    """Blocks every vector of which is as initialisers leave it, where others of the model are not.

    Returns: ``untouched_blocks``, their numbers in the chain; empty where there is none, and where all are so and the norms
    outside of the blocks too.
    """
    with torch.no_grad():
        blocks = _weights_of_blocks(model, chain)
        untouched = zip(blocks, _untouched(blocks.values()), strict=True)
        fresh = [number for number, is_untouched in untouched if is_untouched]
        inside = {id(weight.parameter) for of in blocks.values() for weight in of}
        outside = [p for p in all_parameters(model) if id(p) not in inside and is_readable(p)]
        if len(fresh) == len(chain.blocks) and not _distance_from_one(outside):
            return {}
    return {"untouched_blocks": fresh} if fresh else {}


def _small_by_construction(
    model: nn.Module,
    by_block: list[list[nn.Parameter]],
    scales: Iterable[Sequence[BranchScale]],
    moved: float | None,
) -> str:
    largest = _largest_scale(model, scales)
    if largest is not None and largest < SMALL_FACTOR:
        age = "" if moved is None else f", and its norms are within {moved:.2g} of 1"
        return f"every branch is multiplied by a learned scale of at most {largest:.2g}{age}"
    if moved == 0.0 and _drawn_small(model, by_block):
        return "all weights were drawn small, and its norms are 1"
    return ""


def is_readable(parameter: nn.Parameter) -> bool:
    """Whether the numbers of a parameter can be looked at."""
    return (
        # Subclasses, as of quantised weights, know what a layer needs of them and perhaps nothing else.
        type(parameter) in (torch.Tensor, nn.Parameter)
        and not parameter.is_meta
        and parameter.is_floating_point()
        and parameter.layout == torch.strided
        and parameter.numel() > 0
    )


class _Weight(NamedTuple):
    """A parameter of a block, and those of the module that owns it."""

    name: str
    parameter: nn.Parameter
    own: list[nn.Parameter]


def _weights_of_blocks(model: nn.Module, chain: Chain) -> dict[int, list[_Weight]]:
    """The parameters that can be read of each block of a chain, by its number; their names are those inside of the block."""
    # A block may have been taken out since it was measured, such as by layer drop of the user's own.
    known = dict(module_paths(model))
    found: dict[int, list[_Weight]] = {}
    for number, block in enumerate(chain.blocks):
        if block not in known:
            continue
        weights = found.setdefault(number, [])
        for path, part in module_paths(known[block]):
            named = [(name, p) for name, p in part._parameters.items() if p is not None and is_readable(p)]
            own = [p for _, p in named]
            weights += [_Weight(f"{path}.{name}", p, own) for name, p in named]
    return found


def _out_of_line(blocks: Iterable[Sequence[_Weight]]) -> bool:
    """Whether a matrix of some block is far larger than those of the same name in the other blocks."""
    samples: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, parameter, _ in (weight for of in blocks for weight in of):
        if parameter.ndim > 1:
            samples[name].append(parameter.flatten()[:: max(1, parameter.numel() // SAMPLED)])
    several = [_of_each(of, _root_mean_squares) for of in samples.values() if len(of) > 2]
    return any(max(of) > OUT_OF_LINE * statistics.median(of) > 0 for of in several)


# Vectors of fewer numbers may be weights of streams, which begin at anything.
FEWEST = 8


def _untouched(blocks: Iterable[Sequence[_Weight]]) -> list[bool]:
    """Whether no vector of some blocks can have been trained, and some could: each is constant, or as torch draws a bias.

    Matrices alone are not asked: drawn from a normal distribution they look the same before and after.
    """
    vectors = [[w for w in of if w.parameter.ndim == 1 and w.parameter.numel() >= FEWEST] for of in blocks]
    every = [weight.parameter for of in vectors for weight in of]
    constant = iter(_of_each(every, lambda rows: rows.amin(1) == rows.amax(1)))
    moved = [[weight for weight in of if not next(constant)] for of in vectors]
    return [
        bool(of) and all(_is_drawn_by_torch(weight.parameter, weight.own) for weight in trained)
        for of, trained in zip(vectors, moved, strict=True)
    ]


def _of_each(vectors: Sequence[torch.Tensor], measure: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """What is measured of each of some vectors: of those of one size at once, as the rows of a matrix."""
    of_kind: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, vector in enumerate(vectors):
        of_kind[len(vector), vector.dtype, vector.device].append(number)
    found: dict[int, Any] = {}
    for numbers in of_kind.values():
        rows = torch.stack([vectors[number] for number in numbers])
        found |= zip(numbers, measure(rows).tolist(), strict=True)
    return [found[number] for number in range(len(vectors))]


def _is_drawn_by_torch(bias: nn.Parameter, own: list[nn.Parameter]) -> bool:
    """Whether a bias and its matrix are within ±1/√fan_in, as torch draws both and no training leaves them."""
    matrices = [p for p in own if p.ndim > 1 and p.shape[0] == bias.numel()]
    if len(matrices) != 1:
        return False
    bound = (matrices[0].numel() / bias.numel()) ** -0.5 * (1.0 + 1e-6)
    largest = _largest(matrices[0])
    return 0.9 * bound < largest <= bound and _largest(bias) <= bound


# The root mean square of numbers between ±b is b/√3: what differs by more was drawn otherwise, or has left it far. Heuristic.
LIKE_THE_DRAW = (0.8, 1.5)


def _beyond_their_draw(weights: Sequence[_Weight]) -> float | None:
    """How far the matrices that torch drew within ±1/√fan_in reach beyond that, the median; None where most are no such.

    Every step moves some of their numbers by about the learning rate, as it does the gains of norms.
    """
    biases = [w for w in weights if w.parameter.ndim == 1 and w.parameter.numel() >= FEWEST]
    matrices = [[p for p in w.own if p.ndim > 1 and p.shape[0] == w.parameter.numel()] for w in biases]
    pairs = [(w.parameter, of[0]) for w, of in zip(biases, matrices, strict=True) if len(of) == 1]
    reaches = []
    for bias, matrix in pairs:
        bound = (matrix.numel() / bias.numel()) ** -0.5
        alike = (3**0.5 * _root_mean_square(each) / bound for each in (matrix, bias))
        if all(LIKE_THE_DRAW[0] < each < LIKE_THE_DRAW[1] for each in alike):
            reaches.append(max(0.0, _largest(matrix) - bound))
    return statistics.median(reaches) if 2 * len(reaches) > len(pairs) else None


def _largest(parameter: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(parameter, math.inf))


def _distance_from_one(parameters: list[nn.Parameter]) -> float | None:
    """How far the vectors near 1, most of which are weights of norms, have moved from it; None where there is none.

    Where none is near 1, those of one sign may be gains that were scaled since: how far they are from their own mean.
    """
    vectors = [p for p in parameters if p.ndim == 1 and p.numel() >= FEWEST]
    means = _of_each(vectors, lambda rows: rows.float().mean(1))
    near = [p for p, mean in zip(vectors, means, strict=True) if abs(mean - 1.0) < 0.5]
    distances = sorted(_of_each(near, _from_one))
    if not near:
        positive = [
            p
            for p, least in zip(vectors, _of_each(vectors, lambda rows: rows.amin(1)), strict=True)
            if least > 0
        ]
        distances = sorted(_of_each(positive, _from_their_mean))
    # The median: other vectors may begin near 1 too.
    return distances[len(distances) // 2] if distances else None


def _from_one(rows: torch.Tensor) -> torch.Tensor:
    # Vectors of one number are as they were made, whatever it is: training moves every entry by its own gradient.
    return ((rows.float() - 1.0).abs().amax(1)) * (rows.amax(1) != rows.amin(1))


def _from_their_mean(rows: torch.Tensor) -> torch.Tensor:
    means = rows.float().mean(1, keepdim=True)
    return (rows.float() / means - 1.0).abs().amax(1)


def _largest_scale(model: nn.Module, scales: Iterable[Sequence[BranchScale]]) -> float | None:
    """The root mean square of what multiplies a branch, of the branch with the largest one; None where one has none."""
    sizes = []
    for factors in scales:
        values = [factor.value(model) for factor in factors]
        if not values or any(value is None for value in values):
            return None
        sizes.append(math.prod(_root_mean_square(value) for value in values if value is not None))
    return max(sizes, default=None)


def _drawn_small(model: nn.Module, by_block: list[list[nn.Parameter]]) -> bool:
    """Whether all matrices have about the same size, and those of the blocks one that makes any output small."""
    matrices = [p for block in by_block for p in block if p.ndim > 1]
    # Linear stores its outputs first, and Conv1D of transformers its inputs: the larger count is the safe one.
    gains = (_root_mean_square(p) * max(p.numel() / p.shape[0], p.shape[0]) ** 0.5 for p in matrices)
    if not matrices or any(not gain < SMALL_GAIN for gain in gains):
        return False
    sizes = [_root_mean_square(p) for p in all_parameters(model) if is_readable(p) and p.ndim > 1]
    return max(sizes) < SAME_SCALE * min(sizes)


def _root_mean_square(parameter: torch.Tensor) -> float:
    return float(_root_mean_squares(parameter.reshape(1, -1)))


def _root_mean_squares(rows: torch.Tensor) -> torch.Tensor:
    exact = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=exact) / math.sqrt(rows.shape[1])


def equal_blocks(model: nn.Module, chain: Chain) -> dict[str, Any]:
    """Blocks whose weights are all those of an earlier block, and not shared with it.

    Returns: ``equal_blocks``, the numbers of these blocks and of those that they equal; empty where there is none.
    """
    known = dict(module_paths(model))
    blocks = {n: list(known[path].parameters()) for n, path in enumerate(chain.blocks) if path in known}
    groups: dict[Any, list[int]] = {}
    with torch.no_grad():
        for number, weights in blocks.items():
            if weights and all(is_readable(weight) for weight in weights):
                groups.setdefault(_sample(weights), []).append(number)
        found = {
            number
            for same in groups.values()
            for first, second in pairwise(same)
            if _are_equal(blocks[first], blocks[second])
            for number in (first, second)
        }
    return {"equal_blocks": sorted(found)} if found else {}


def _sample(weights: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What equal blocks have in common: their shapes, and some numbers of the largest weight."""
    largest = max(weights, key=torch.Tensor.numel).flatten()
    numbers = largest[:: max(1, largest.numel() // SAMPLED)].float()
    return tuple(weight.shape for weight in weights), float(numbers.sum()), float(numbers.square().sum())


def _are_equal(weights: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether all numbers are the same, some were drawn, and the memory is not the same."""
    return (
        all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
        and any(bool(one.amin() < one.amax()) for one in weights)
        and not any(one is other for one, other in zip(weights, others, strict=True))
    )
