"""What is an operation to a memory, and what is known of it when it is recorded? By its name, and by what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthscope.probes.reading.graph import (
    PARAMETER,
    SHAPE_ONLY,
    UNSEEN,
    Graph,
    TracedValue,
    names,
    values_in,
    walk,
)

MOST_STREAMS = 63  # what is wider has features on its axes
SAME = names("alias detach clone contiguous _to_copy to lift_fresh lift_fresh_copy neg positive")
VIEWS = names("view _unsafe_view reshape _reshape_alias flatten unflatten")
ROW_MAJOR = VIEWS | names("unsqueeze squeeze")  # what leaves all elements in order
MOVES = VIEWS | names(
    "permute transpose t mT movedim unsqueeze squeeze expand repeat slice narrow split split_with_sizes chunk select "
    "unbind index_select index gather tile repeat_interleave diagonal unfold constant_pad_nd"
)
TURNS = names("roll flip")
PARTS = names("slice select unbind split split_with_sizes")
# The positions of what is added up.
SUMS: dict[str, tuple[int, ...]] = {
    "add": (0, 1), "sub": (0, 1), "rsub": (0, 1), "where": (1, 2), "lerp": (0, 1), "masked_fill": (0, 2),
}  # fmt: skip
# The positions of what is written into, and of what is written.
SCATTERS: dict[str, tuple[int, ...]] = {
    "index_add": (0, 3), "index_copy": (0, 3), "scatter_add": (0, 3), "scatter": (0, 3), "index_put": (0, 2),
    "slice_scatter": (0, 1), "select_scatter": (0, 1), "patch": (0, 1), "copy": (1,), "masked_scatter": (0, 2),
}  # fmt: skip
ADDING = names("index_add scatter_add")  # of these, what adds to what was there
PRODUCTS: dict[str, tuple[int, ...]] = {"mul": (0, 1), "div": (0,), "native_dropout": (0, 1)}
MATRICES: dict[str, tuple[int, int]] = {
    "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1), "dot": (0, 1),
}  # fmt: skip
# What mixes features by parameters: `linear` is a whole call of a layer.
LAYERS = names("linear convolution") | {*MATRICES}
REDUCES = names("sum mean")
# Attention mixes its values, which may be those of earlier depths; kernels that take half precision alone cannot be run again.
ATTENTIONS = names("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention")
# What is linear in one operand and mixes it along an axis: the positions of that operand.
MIXED_ALONG = {
    **dict.fromkeys(ATTENTIONS, 2),
    **dict.fromkeys((*REDUCES, *TURNS, "cumsum", "convolution"), 0),
}
# Of what a memory carries: its streams.
MIXES = names("convolution cumsum") | {*MATRICES, *REDUCES, *ATTENTIONS}
JOINS = names("cat stack")
ZEROS = names("zeros zeros_like new_zeros empty empty_like new_empty")
# Norms and activations: they may lie on the way of the memory itself, as in post-norm blocks.
BATCH_NORMS = names(
    "native_batch_norm _native_batch_norm_legit batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training "
    "_batch_norm_with_update _batch_norm_no_update"
)
GROUP_NORMS = names("native_group_norm group_norm")
NORMS = names("native_layer_norm layer_norm _fused_rms_norm rms_norm") | GROUP_NORMS | BATCH_NORMS
FUNCTIONS = NORMS | names(
    "relu gelu silu leaky_relu elu hardswish hardtanh sigmoid tanh mish prelu _prelu_kernel softplus hardsigmoid clamp "
    "relu6 threshold clamp_min"
)
# What a norm divides by, and what may be done to that before.
STATISTICS = names("rsqrt sqrt reciprocal linalg_vector_norm norm std var pow amax max")
SCALINGS_OF_NORMS = names("clamp_min clamp add sub mul div maximum")
# Norms along the channels of images, whose features are the second axis.
CHANNEL_NORMS = GROUP_NORMS | BATCH_NORMS


def only_moves(value: TracedValue) -> bool:
    """Whether an operation gives the elements of what it takes, elsewhere or as they are."""
    if value.name == "cat":  # of a single tensor
        return [parent.numel for parent in value.parents] == [value.numel]
    return value.name in SAME or value.name in MOVES


def linear_in(value: TracedValue) -> list[TracedValue]:
    """The operands that an operation may carry: of attention its values, for given queries and keys."""
    return [value.args[2]] if value.name in ATTENTIONS else list(value.parents)


def mixed_axes(value: TracedValue) -> list[int] | None:
    """Along which axes one of `MIXED_ALONG` mixes its operand; None where it adds something, or gives something else."""
    args, of = value.args, value.args[MIXED_ALONG[value.name]]
    rank = len(of.shape)
    if value.name == "convolution":
        return None if args[2] is not None else [1, *_mixed_places(value)]
    if value.name in ATTENTIONS:
        return [rank - 2] if value.item == 0 else None
    at = 2 if value.name == "roll" else 1
    given = args[at] if len(args) > at else None
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    return [dim % rank for dim in dims]


def _mixed_places(value: TracedValue) -> list[int]:
    """Along which axes of an image a convolution does more than give each place by itself."""
    _, kernel, _, stride, padding, _, transposed, *_ = value.args
    each = zip(kernel.shape[2:], stride, padding, strict=True)
    return [
        2 + at for at, (size, step, pad) in enumerate(each) if transposed or (size, step, pad) != (1, 1, 0)
    ]


def mixes_channels(value: TracedValue) -> bool:
    """Whether a convolution is a matrix over the second axis alone: a kernel of one element, to which nothing is added."""
    return value.name == "convolution" and value.args[-1] == 1 and mixed_axes(value) == [1]


def spreads(value: TracedValue, number: TracedValue) -> bool:
    """Whether a product with weights makes features of each of some numbers, as of the columns of a table."""
    others = [parent for parent in value.parents if parent is not number]
    return (
        value.name in PRODUCTS
        and value.numel > number.numel
        and any(w.of_parameter and w.numel > MOST_STREAMS for w in others)
    )


def addends(value: TracedValue) -> list[TracedValue]:
    """What an operation adds up, whatever it multiplies."""
    if value.name in JOINS:
        return list(values_in(value.args[0]))
    positions = SUMS.get(value.name) or SCATTERS.get(value.name) or ()
    if value.name in ("addmm", "baddbmm"):
        positions = (0,)
    return [v for at in positions if at < len(value.args) for v in values_in(value.args[at])]


def moved(graph: Graph, value: TracedValue) -> list[TracedValue]:
    """What has the same elements as a value in another order: what it was made of by that, and what is made of it."""

    def moves(before: TracedValue, after: TracedValue) -> bool:
        alone = sum(parent.is_floating for parent in after.parents) == 1
        return only_moves(after) and after.numel == before.numel and alone

    takers = [taker for taker in graph.takers(value) if moves(value, taker)]
    return [*(before for before in value.parents[:1] if moves(before, value)), *takers]


def reordered(graph: Graph, values: Iterable[TracedValue]) -> Iterator[TracedValue]:
    """Some values, and all that have the same elements as one of them in another order, the nearest first."""
    return walk(values, lambda value: moved(graph, value))


def same_elements(graph: Graph, value: TracedValue) -> list[TracedValue]:
    """A value, and others with the same elements: copies and views of it, and what it is one of."""
    before = walk([value], lambda of: of.parents if _is_same(of) else ())
    after = walk([value], lambda of: filter(_is_same, graph.takers(of)))
    found = dict.fromkeys([*before, *after])
    return [other for other in found if other.shape.count(1) <= value.shape.count(1)]


def _is_same(value: TracedValue) -> bool:
    """Whether a value has the elements of the only one that it was made of."""
    same = value.name in ROW_MAJOR or (value.name in SAME and value.name not in ("neg", "positive"))
    if not same or len(value.parents) != 1:
        return False
    (parent,) = value.parents
    return (value.numel, value.dtype) == (parent.numel, parent.dtype) and parent.kind != PARAMETER


def before_all_readers(graph: Graph, same: Sequence[TracedValue]) -> list[TracedValue]:
    """The values with the same elements from which everything comes that reads one of them: these have the gradient."""
    numbers, takers = {of.number for of in same}, graph.takers
    readers = [of for of in same if any(has_gradient(t) and t.number not in numbers for t in takers(of))]
    ways: list[set[int]] = []
    for reader in readers:
        way = {reader.number}
        while reader.parents and reader.parents[0].number in numbers:
            reader = reader.parents[0]
            way.add(reader.number)
        ways.append(way)
    return [of for of in same if all(of.number in way for way in ways)] or list(same[:1])


def has_gradient(taker: TracedValue) -> bool:
    """Whether a gradient comes through an operation."""
    return taker.is_floating and taker.name not in SHAPE_ONLY and taker.name != "detach"


def is_view(value: TracedValue) -> bool:
    """Whether a value lies in the memory of what it was made of."""
    return value.alias or value.name == "_unsafe_view"


def is_read_early(graph: Graph, made: Sequence[TracedValue], before: int = -1) -> bool:
    """Whether some of the values that together are a state were read before the last was made, by what is no part of it.

    ``before``: the number of the last value of the state before, with which that one was there.
    """
    numbers = {value.number for value in made}
    inside, last = graph.ancestors(numbers, stop=range(before + 1)), max(numbers)
    held = {n for n in numbers if n > before}  # and its views; the others are of the state before too
    for value in graph.values[min(held, default=last) + 1 : last]:
        if not held.isdisjoint(parent.number for parent in value.parents):
            if is_view(value):
                held.add(value.number)
            elif value.number not in inside:
                return True
    return False


def part_of(value: TracedValue) -> tuple[int, slice | int]:
    """Along which axis one of `PARTS` takes which places."""
    args, name = value.args, value.name
    if name in ("select", "unbind"):
        axis = args[1] if len(args) > 1 else 0
        index: slice | int = args[2] if name == "select" else value.item
        return axis % len(args[0].shape), index
    if name == "slice":
        given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        return given[0] % len(args[0].shape), slice(*given[1:])
    sizes, axis = args[1], (args[2] if len(args) > 2 else 0) % len(args[0].shape)
    start = sizes * value.item if isinstance(sizes, int) else sum(sizes[: value.item])
    return axis, slice(start, start + value.shape[axis])


def is_unknown(value: TracedValue) -> bool:
    """Whether nothing is known of what made a value: an operation of a library, or a kernel."""
    return value.name == UNSEEN or getattr(value.func, "namespace", "aten") not in ("aten", "prims")


def named(graph: Graph, value: TracedValue) -> str:
    """What made a value of which nothing is known, and where."""
    what = "a kernel" if value.func is None else str(value.func)
    return f"{what} in {graph.path(value) or 'the model'}"


def factors(value: TracedValue) -> list[Any]:
    """What an operation multiplies: values, numbers."""
    return [value.args[at] for at in PRODUCTS.get(value.name) or MATRICES.get(value.name) or ()]


def weights(graph: Graph) -> dict[int, list[TracedValue]]:
    """By number, for all values that take some: parameters, also where they were cast, cut, transposed or normed before."""
    if graph.weights is None:
        made: dict[int, list[TracedValue]] = {}  # what is a parameter but for that
        found = graph.weights = {}
        for value in graph.values:
            if value.kind == PARAMETER:
                made[value.number] = [value]
                continue
            own = [weight for parent in value.parents for weight in made.get(parent.number, ())]
            if own:
                found[value.number] = own
                scaled = value.name in PRODUCTS and value.numel == max(weight.numel for weight in own)
                if (len(value.parents) == 1 and only_moves(value)) or (
                    scaled and not graph.depends_on_input(value)
                ):
                    made[value.number] = own
    return graph.weights


def weights_in(graph: Graph, marks: bytearray) -> set[TracedValue]:
    """The parameters that work in marked values."""
    return {weight for number, of in weights(graph).items() if marks[number] for weight in of}


def mean_of(value: TracedValue, of: TracedValue) -> TracedValue | None:
    """The mean of what it is added to that an addend is, as a norm that is written out takes away; None where it is none."""
    for _ in range(6):
        if value.name in REDUCES:
            return value if any(parent is of for parent in value.parents) else None
        scales = value.name in PRODUCTS and len([v for v in value.parents if v.shape]) == 1
        if not value.parents or not (only_moves(value) or scales):
            return None
        value = value.parents[0]
    return None


def centred(value: TracedValue, carriers: Sequence[TracedValue]) -> list[TracedValue]:
    """The means of what a sum carries that it adds."""
    found = (mean_of(addend, carrier) for addend in addends(value) for carrier in carriers)
    return [mean for mean in found if mean is not None]


def is_along_features(mean: TracedValue) -> bool:
    """Whether a mean is one over the last axis alone; others mix tokens."""
    dims = mean.args[1] if len(mean.args) > 1 else None
    return dims is not None and {
        dim % len(mean.parents[0].shape) for dim in ([dims] if isinstance(dims, int) else dims)
    } == {len(mean.parents[0].shape) - 1}


def is_statistic(graph: Graph, value: TracedValue, of: TracedValue) -> bool:
    """Whether a factor is a norm of what it scales, or of what that was computed from, as by the gain that comes first."""
    before = [parent for parent in of.parents if not parent.of_parameter][:1]
    for _ in range(8):
        if value.name in STATISTICS or (value.name in REDUCES and value.parents[0].name == "abs"):
            return any(graph.depends(value, one) for one in [of, *before])
        if not value.parents or not (only_moves(value) or value.name in SCALINGS_OF_NORMS):
            return False
        value = max(value.parents, key=lambda v: v.number)
    return False


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
        return KnownOperation(func, name, False, is_view, False, mutates=tuple(into))
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
