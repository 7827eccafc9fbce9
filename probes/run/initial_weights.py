"""Are the weights of a model as they were drawn? Of all blocks, of some, or are several blocks copies of one another."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from depthscope.probes.model.modules import all_parameters, module_paths
from depthscope.probes.structure.chain import Chain

SAMPLED = 4096  # numbers of a matrix by which two blocks are compared first


def weight_facts(model: nn.Module, chain: Chain) -> dict[str, Any]:
    """What the weights say of the age of a chain's blocks, and of mistakes in loading them; what does not hold is absent.

    Returns: ``untouched``, 1, where no vector of any block can have been trained; ``untouched_blocks``, the numbers of blocks
    every vector of which is as initialisers leave it, where others of the model are not; ``equal_blocks``, the numbers of
    blocks with all weights of another block that are not shared with it.
    """
    facts: dict[str, Any] = {}
    with torch.no_grad():
        modules = _modules_of_blocks(model, chain)
        blocks = {number: _weights(block) for number, block in modules.items()}
        every = _weights(model)
        touched = {id(w.parameter) for w, is_touched in _vectors_touched(every) if is_touched}

        def is_fresh(vectors: Sequence[_Weight]) -> bool:
            return bool(vectors) and not any(id(weight.parameter) in touched for weight in vectors)

        inside = [weight for of in blocks.values() for weight in of]
        if all(blocks.values()) and is_fresh(_vectors(inside)):
            facts["untouched"] = 1
        own = {id(weight.parameter) for weight in inside}
        outside = _vectors([weight for weight in every if id(weight.parameter) not in own])
        fresh = [number for number, of in blocks.items() if is_fresh(_vectors(of))]
        # Without a vector outside there is nothing that training would have left.
        if fresh and (len(fresh) < len(chain.blocks) or (outside and not is_fresh(outside))):
            facts["untouched_blocks"] = fresh
        if equal := _equal_blocks(modules):
            facts["equal_blocks"] = equal
    return facts


def is_untouched(model: nn.Module, chain: Chain) -> bool:
    """Whether no vector of any block can have been trained, as `weight_facts` says; stops at the first that was."""
    with torch.no_grad():
        blocks = [_weights(block) for block in _modules_of_blocks(model, chain).values()]
        inside = [weight for of in blocks for weight in of]
        touched = (is_touched for _, is_touched in _vectors_touched(inside))
        return all(blocks) and bool(_vectors(inside)) and not any(touched)


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

    parameter: nn.Parameter
    own: list[nn.Parameter]


def _modules_of_blocks(model: nn.Module, chain: Chain) -> dict[int, nn.Module]:
    """The modules of a chain's blocks, by their numbers."""
    # A block may have been taken out since it was measured, such as by layer drop of the user's own.
    known = dict(module_paths(model))
    return {number: known[block] for number, block in enumerate(chain.blocks) if block in known}


def _weights(model: nn.Module) -> list[_Weight]:
    """The parameters that can be read of a module, each with those of the module that owns it."""
    found: list[_Weight] = []
    for _, part in module_paths(model):
        own = [p for p in part._parameters.values() if p is not None and is_readable(p)]
        found += [_Weight(p, own) for p in own]
    return found


# Vectors of fewer numbers may be weights of streams, which begin at anything.
FEWEST = 8


def _vectors_touched(weights: Sequence[_Weight]) -> Iterator[tuple[_Weight, bool]]:
    """The vectors among some weights; whether each can have been trained: it is neither constant nor as torch draws a bias.

    Matrices alone are not asked: drawn from a normal distribution they look the same before and after.
    """
    vectors = _vectors(weights)
    constant = _of_each([weight.parameter for weight in vectors], lambda rows: rows.amin(1) == rows.amax(1))
    for weight, is_constant in zip(vectors, constant, strict=True):
        yield weight, not is_constant and not _is_drawn_by_torch(weight.parameter, weight.own)


def _vectors(weights: Sequence[_Weight]) -> list[_Weight]:
    return [w for w in weights if w.parameter.ndim == 1 and w.parameter.numel() >= FEWEST]


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
    largest, of_bias = (float(torch.linalg.vector_norm(p, math.inf)) for p in (matrices[0], bias))
    return 0.9 * bound < largest <= bound and of_bias <= bound


def _equal_blocks(modules: Mapping[int, nn.Module]) -> list[int]:
    """Blocks whose weights are all those of another block, and not shared with it."""
    blocks = {number: all_parameters(block) for number, block in modules.items()}
    groups: dict[Any, list[int]] = {}
    for number, weights in blocks.items():
        if weights and all(is_readable(weight) for weight in weights):
            groups.setdefault(_sample(weights), []).append(number)
    pairs = [pair for same in groups.values() for pair in pairwise(same)]
    return sorted({number for pair in pairs if _are_equal(*(blocks[n] for n in pair)) for number in pair})


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


# Numbers of each parameter. An optimizer's step changes nearly all of them, so that a few do; `checkpoints.weight_files` reads
# all, which takes seconds for a large model.
NUMBERS_PER_PARAMETER = 256
NUMPY_TYPES = (torch.float32, torch.float64, torch.float16)
SHARDED = "FullyShardedDataParallel"  # its parameters are shards, but look like plain ones


def weights_digest(model: nn.Module) -> str | None:
    """SHA-256 over the names, shapes, types and some numbers of all parameters, the same in every process.

    None where a parameter cannot be read in this process: sharded, offloaded, not initialised.
    """
    if any(type(module).__name__ == SHARDED for _, module in module_paths(model)):
        return None
    parameters = dict(model.named_parameters())
    if not all(_is_readable(parameter) for parameter in parameters.values()):
        return None
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_some_numbers(parameter))
    return digest.hexdigest()


def _is_readable(parameter: nn.Parameter) -> bool:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
        return False
    # By attributes, without importing either: a DTensor; a parameter of DeepSpeed's third stage, which is empty here.
    is_shard = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")
    # Quantised weights have a class of their own that computes what torch does not know of them.
    is_plain = type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return parameter.layout == torch.strided and is_plain and not is_shard


def _some_numbers(parameter: nn.Parameter) -> bytes:
    """Numbers at equal distances, from the first one on."""
    # Odd: an even one may divide the width, and read one column
    step = max(parameter.numel() // NUMBERS_PER_PARAMETER, 1) | 1
    flat = parameter.detach().reshape(-1)
    if flat.dtype in NUMPY_TYPES and flat.device.type == "cpu":
        return flat.numpy()[::step].tobytes()  # thousands of parameters: numpy takes a third of the time
    return flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()
