"""What is known of an operation when it is recorded? By its name, and by what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.reading.graph import Graph, TracedValue, names
from depthscope.probes.reading.operations import (
    BATCH_NORMS,
    FUNCTIONS,
    JOINS,
    MATRICES,
    MIXES,
    MOST_STREAMS,
    MOVES,
    NORMS,
    PRODUCTS,
    SAME,
    SCATTERS,
    SUMS,
    TURNS,
)  # fmt: skip

MOST_OPERANDS = 2
ROUNDING = 64  # in units of the least difference that the result's numbers have


def factors_of_sum(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> dict[int, float] | None:
    """With which factors an operation adds its operands up, by their positions; None where it does something else.

    Never tried where processes work together: the operation may wait for the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    at = [n for n, argument in enumerate(args) if isinstance(argument, torch.Tensor)]
    alike = isinstance(result, torch.Tensor) and all(
        args[n].shape == result.shape and args[n].dtype == result.dtype for n in at
    )
    if not alike or not 0 < len(at) <= MOST_OPERANDS or not result.is_floating_point() or not result.numel():
        return None
    devices = [result.device] if result.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):  # it may draw random numbers
            return _factors(func, args, kwargs, result, at)
    except Exception:  # it takes no such numbers: nothing is known of it
        return None


def _factors(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor, at: Sequence[int]
) -> dict[int, float] | None:
    def run(operands: Sequence[torch.Tensor]) -> torch.Tensor:
        given = dict(zip(at, operands, strict=True))
        return func(*(given.get(n, argument) for n, argument in enumerate(args)), **kwargs).double()

    generator = torch.Generator(result.device).manual_seed(0)
    tried = [torch.empty_like(result).normal_(generator=generator) for _ in at]
    zeros = [torch.zeros_like(result) for _ in at]
    factors = []
    for n, numbers in enumerate(tried):
        made = run([*zeros[:n], numbers, *zeros[n + 1 :]])
        factors.append(float((made * numbers).sum() / numbers.double().square().sum()))
    bound = ROUNDING * torch.finfo(result.dtype).eps
    for operands in (zeros, tried, [2 * numbers.flip(0) for numbers in tried], [args[n] for n in at]):
        total = sum(factor * of.double() for factor, of in zip(factors, operands, strict=True))
        size = max(float(of.abs().max()) for of in operands)
        if not float((run(operands) - total).abs().max()) <= bound * max(size, bound):
            return None
    return {n: factor for n, factor in zip(at, factors, strict=True) if factor} or None


# What holds nothing before it is written; if it is read all the same, a kernel wrote it of which no operation is seen.
EMPTY = names("empty empty_like empty_strided new_empty new_empty_strided empty_permuted")
# Sums with a product in one operation, and the product alone.
FUSED = {
    "addmm": torch.ops.aten.mm.default,
    "baddbmm": torch.ops.aten.bmm.default,
    "addcmul": torch.ops.aten.mul.Tensor,
}
# What carries a memory: what it takes is held, and what it gives is made again from that.
CARRYING = SAME | MOVES | TURNS | JOINS | {*SUMS, *SCATTERS, *PRODUCTS, *FUSED} | MIXES - {"convolution"}

# Of what these take autograd saves each tensor, where all of them need gradients.
SAVING = NORMS | MATRICES.keys() | PRODUCTS.keys()


class KnownOperation(NamedTuple):
    """What is known of an operation by its name."""

    func: Any
    name: str  # without the sign of what writes in place
    writes: bool  # into its first operand
    views: bool  # what it gives lies in the memory of what it takes
    carries: bool
    is_foreign: bool = False  # of a library, so that nothing is known of it
    # The positions and names of what it writes into, where it is one of a library.
    mutates: tuple[tuple[int, str], ...] = ()
    is_composite: bool = False  # made of other operations, which are seen without inference mode

    def targets(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """What it writes into."""
        if self.writes:
            return [args[0]]
        given = [args[n] if n < len(args) else kwargs.get(name) for n, name in self.mutates]
        return [tensor for tensor in (*given, kwargs.get("out")) if isinstance(tensor, torch.Tensor)]

    def describe(self, value: TracedValue) -> None:
        """Note whether what it made is a view, a parameter in another form, and can be made again."""
        value.alias = self.views
        if self.name in FUNCTIONS:  # what a layer or a norm over the batch made is not made again
            value.remade = self.name not in BATCH_NORMS and all(Graph.is_kept(p) for p in value.parents)
        elif self.carries:
            by_parameter = any(parent.of_parameter for parent in value.parents)
            # What is written over random numbers is not made again.
            value.remade = not self.writes or Graph.is_kept(value.parents[0])
            value.costly = by_parameter and self.name in MATRICES
            passes = self.name in SAME or self.name in MOVES
            value.of_parameter = by_parameter and passes and len(value.parents) == 1


@cache
def operation_of(func: Any) -> KnownOperation:
    """What is known of an operation of PyTorch, or of a library, whose names say nothing."""
    name, schema = func.overloadpacket.__name__, func._schema
    alias = schema.returns[0].alias_info if schema.returns else None
    is_view = alias is not None and not alias.is_write
    if func.namespace not in ("aten", "prims", "prim"):
        into = [
            (n, of.name) for n, of in enumerate(schema.arguments) if of.alias_info and of.alias_info.is_write
        ]
        name = f"{func.namespace}::{name}"
        return KnownOperation(func, name, False, is_view, False, is_foreign=True, mutates=tuple(into))
    writes = name.endswith("_") and schema.is_mutable
    name = name[:-1] if writes else name
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    carries = name in CARRYING or name in NORMS
    return KnownOperation(func, name, writes, is_view, carries, is_composite=is_composite)


ADD, MUL = operation_of(torch.ops.aten.add.Tensor), operation_of(torch.ops.aten.mul.Tensor)
LAYER_NORM = operation_of(torch.ops.aten.native_layer_norm.default)
LINEAR = operation_of(torch.ops.aten.linear.default)


def only_operation(
    module: nn.Module | None, tensors: Sequence[torch.Tensor], hooks: int
) -> tuple[KnownOperation, list[Any]] | None:
    """The one operation that a call of a layer is, and what it takes; None where others run in it, or may be looked at.

    ``hooks``: how many hooks before, and after, a call are of whoever records it.
    """
    kind = type(module)
    if (kind is not nn.Linear and kind is not nn.LayerNorm) or len(tensors) != 1:
        return None
    assert module is not None
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    is_plain = (
        type(tensors[0]) is torch.Tensor
        and (weight is None or type(weight) is nn.Parameter)
        and (bias is None or type(bias) is nn.Parameter)
    )
    if not len(module._forward_hooks) == len(module._forward_pre_hooks) == hooks or not is_plain:
        return None
    # A mode of the user's would not see the operations inside.
    if torch._C._len_torch_dispatch_stack() != 1 or torch.is_autocast_enabled(tensors[0].device.type):
        return None
    if isinstance(module, nn.LayerNorm):
        return LAYER_NORM, [tensors[0], list(module.normalized_shape), weight, bias, module.eps]
    is_wide = weight is not None and min(weight.shape) > MOST_STREAMS
    return (LINEAR, [tensors[0], weight, bias]) if is_wide else None


def is_saved(args: Any) -> bool:
    """Whether autograd saves what an operation of `SAVING` takes: it needs it for the gradients of the others."""
    tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
    return len(tensors) > 1 and all(tensor.requires_grad for tensor in tensors)


def is_layer(operation: KnownOperation, values: Sequence[TracedValue]) -> bool:
    """Whether a matrix is a parameter that is larger than what mixes streams."""
    if operation.name not in MATRICES:
        return False
    matrices = (value for value in values if value.of_parameter and len(value.shape) > 1)
    return any(min(value.shape[-2:]) > MOST_STREAMS for value in matrices)


def is_unwritten(value: TracedValue) -> bool:
    """Whether a value holds nothing yet, or lies in the memory of one that does."""
    while value.alias:
        value = value.parents[0]
    return value.name in EMPTY and value.numel > 0


def decomposed(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives that is made of others, which a mode sees."""
    TorchDispatchMode.__enter__(mode)
    try:
        return func.decompose(*args, **kwargs)
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)
