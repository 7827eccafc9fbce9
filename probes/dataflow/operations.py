"""Which operations carry a state linearly, and what do they do to its axes? One rule for each.

An operation is *transparent* where its output is linear in one of its operands at fixed others: then a state may be followed
through it. Where it contracts an axis as an opaque operation made it (the features of a linear layer, the tokens of an
attention), it is opaque all the same: that is what a branch does. Streams are axes that were stacked, expanded or split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from depthscope.probes.dataflow.axes import (
    ATTENDED,
    CONTRACTED,
    NORMALISED,
    SLID,
    WEIGHED,
    Atom,
    Axes,
    Axis,
    all_noted,
    broadcast,
    made_axis,
    new_axes,
    regrouped,
    united,
)
from depthscope.probes.dataflow.values import Step, Value

# Heuristic: published models have 2 to 16 streams, and histories over depth are stacked; a longer axis is no stream axis.
MOST_STREAMS = 64

# What a rule finds of one output: its axes, and whether it is linear in its operands.
Found = tuple[Axes, bool]
Finds = Callable[[Any, Any, tuple[int, ...], int], Found | None]


@dataclass(frozen=True)
class Rule:
    """What one operation does.

    Parameters
    ----------
    finds : callable
        ``finds(args, kwargs, shape, item)``: axes of an output, and whether the operation is transparent there; None where
        neither is known.
    sums : bool
        Whether several operands are added.
    product : bool
        Whether it is linear in each of two operands, not in both.
    function : bool
        Whether it is a norm or an activation of one operand: not linear, but a state may pass through it as a whole.
    writes : bool
        Whether it writes into its first operand.
    reads_only : bool
        Whether its output is no value of the model.
    mixes : bool
        Whether several positions of an axis are added up in one.
    mask : bool
        Whether it draws a mask, which a replay takes as it was.
    factor_positions : tuple of int
        Positions of the two operands of a product.
    sum_of : callable, optional
        ``sum_of(args, kwargs)``: where one operation does the work of several, what it is the sum of: arguments, and products
        as (function, first factor, second factor). None where it is no such sum.
    zero : tuple of int
        Positions of constants that a replay sets to zero, since they are added and not carried.
    """

    finds: Finds
    sums: bool = False
    product: bool = False
    function: bool = False
    writes: bool = False
    reads_only: bool = False
    mixes: bool = False
    mask: bool = False
    zero: tuple[int, ...] = ()
    factor_positions: tuple[int, ...] = (0, 1)
    sum_of: Callable[[Any, Any], list[Any] | None] | None = None

    def describe(self, value: Value, item: int, args: Any, kwargs: Any, operands: list[Value]) -> None:
        """Set the axes of a value, and the step that made it where that is transparent."""
        found = self.finds(args, kwargs, value.shape, item)
        if found is None:
            value.axes = new_axes(value.shape)
            return
        value.axes, linear = found
        if not linear:
            return
        if self is COPY:  # what was there before is gone
            args, operands = (None, args[1]), [args[1]]
        value.step = Step(self, value.func, args, kwargs, tuple(operands), item)

    def factors(self, args: Any) -> list[Any]:
        """The operands of a product."""
        return [args[position] for position in self.factor_positions]


def _is_value(argument: Any) -> bool:
    return isinstance(argument, Value)


_CONSTANT: Axis = (None,)  # type: ignore[assignment]  # an axis of a constant, which has no atom of its own


def _axes_of(argument: Any) -> Axes:
    """Axes of an argument: of a value its own, of a constant tensor new ones."""
    if isinstance(argument, Value):
        return argument.axes
    if isinstance(argument, torch.Tensor):
        return tuple([_CONSTANT if size > 1 else () for size in argument.shape])
    return ()


def _completed(axes: Sequence[Any], shape: tuple[int, ...], *, whole: bool = False) -> Axes:
    """Axes with new atoms where only a constant gave them."""
    return tuple(
        [
            (axis if axis and axis[0] is not None else () if size == 1 else (Atom(size, whole=whole),))
            for axis, size in zip(axes, shape, strict=True)
        ]
    )


# --- structure


def _same(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return args[0].axes, True


def _viewed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return regrouped(args[0].axes, shape) or new_axes(shape), True


def _permuted(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes = args[0].axes
    return tuple([axes[dim] for dim in args[1]]), True


def _transposed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes = list(args[0].axes)
    first, second = args[1:3] if len(args) > 2 else (0, -1)
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes), True


def _unsqueezed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes = list(args[0].axes)
    axes.insert(args[1] % len(shape), ())
    return tuple(axes), True


def _squeezed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    value = args[0]
    dims = range(len(value.shape)) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {dim % len(value.shape) for dim in dims if value.shape[dim] == 1} if value.shape else set()
    return tuple(axis for dim, axis in enumerate(value.axes) if dim not in gone), True


def _expanded(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    value = args[0]
    lead = len(shape) - len(value.shape)
    old = (1,) * lead + value.shape
    axes = ((),) * lead + value.axes
    return tuple(axis if a == b else made_axis(b) for axis, a, b in zip(axes, old, shape, strict=True)), True


def _repeated(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    value, times = args[0], args[1]
    axes = ((),) * (len(times) - len(value.shape)) + value.axes
    return tuple(made_axis(n) + axis for n, axis in zip(times, axes, strict=True)), True


def _cut(axis: Axis, old: int, new: int) -> Axis:
    """An axis of which some positions were taken."""
    if old == new or new == 1:
        return axis if old == new else ()
    # What is done along a part is done along the whole.
    return (Atom(new, whole=all(atom.whole for atom in axis), parent=axis[0] if len(axis) == 1 else None),)


def _sliced(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    value = args[0]
    return tuple(_cut(*of) for of in zip(value.axes, value.shape, shape, strict=True)), True


def _padded(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    """Zeros before or after the positions of some axes."""
    value = args[0]
    return tuple(
        axis if old == new else made_axis(new) if old == 1 else _cut(axis, old, new)
        for axis, old, new in zip(value.axes, value.shape, shape, strict=True)
    ), len(args) < 3 or not args[2]


def _selected(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes = list(args[0].axes)
    del axes[args[1] if len(args) > 1 else 0]
    return tuple(axes), True


def _unbound(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return _selected((args[0], args[1] if len(args) > 1 else 0), kwargs, shape, item)


def _indexed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    """Rows taken by a constant index, along one axis: ``index_select`` and ``x[index]``."""
    value = args[0]
    if not _is_value(value):
        return None
    if len(args) > 2 and isinstance(args[1], int) and not _is_value(args[2]):
        return _sliced(args, kwargs, shape, item)
    if len(args) > 1 and isinstance(args[1], (list, tuple)) and len(shape) == len(value.shape):
        return _sliced(args, kwargs, shape, item)
    return new_axes(shape), not any(_is_value(index) for index in args[1:])


def _stacked(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes = list(_joined(args[0]))
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    axes.insert(dim % len(shape), made_axis(len(args[0])))
    return _completed(axes, shape), True


def _concatenated(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    pieces = [piece for piece in args[0] if len(piece.shape) == len(shape)]  # an empty tensor is no piece
    axes = list(_joined(pieces))
    # Streams may begin as one state next to constants; a class token goes next to many others.
    thick = any(_is_value(piece) and piece.shape[dim] > 1 for piece in pieces)
    axes[dim] = (Atom(shape[dim], whole=thick),) if shape[dim] > 1 else ()
    return _completed(axes, shape), True


def _joined(pieces: Sequence[Any]) -> Axes:
    return next(piece.axes for piece in pieces if _is_value(piece))


# --- sums and products


def _added(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return _completed(united(_axes_of(args[0]), _axes_of(args[1])), shape), True


def _multiplied(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return _completed(united(_axes_of(args[0]), _axes_of(args[1])), shape), True


def _divided(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    # x / y is linear in x alone; a rounding mode makes it an opaque operation
    return _multiplied(args, kwargs, shape, item)[0], _is_value(args[0]) and kwargs.get(
        "rounding_mode"
    ) is None


def _masked(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return _completed(broadcast(_axes_of(args[0]), _axes_of(args[1])), shape), not _is_value(args[1])


def _chosen(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    both = united(_axes_of(args[1]), _axes_of(args[2]))
    return _completed(broadcast(_axes_of(args[0]), both), shape), not _is_value(args[0])


def _reduced(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    """A sum or mean."""
    value = args[0]
    given = args[1] if len(args) > 1 and args[1] is not None else range(len(value.shape))
    dims = (
        {dim % len(value.shape) for dim in ([given] if isinstance(given, int) else given)}
        if value.shape
        else set()
    )
    keep = len(shape) == len(value.shape)
    axes = _mixed_axes(value, dims)
    return tuple(
        [() if dim in dims else axis for dim, axis in enumerate(axes) if keep or dim not in dims]
    ), True


def _mixed_axes(value: Value, dims: set[int]) -> Axes:
    """The axes of a product that is about to be summed: where that mixes streams, their new axis is one of streams too."""
    factors = (
        [] if value.step is None or not value.step.rule.product else value.step.rule.factors(value.step.args)
    )
    tensors = [factor for factor in factors if len(getattr(factor, "shape", ())) == len(value.shape)]
    axes = list(value.axes)
    if len(tensors) != 2:
        return value.axes
    for carrier, matrix in (tensors, tensors[::-1]):
        for dim in dims if _is_value(carrier) else ():
            size, old = value.shape[dim], carrier.axes[dim]
            if not old or not contracts(old, size) or matrix.shape[dim] != size:
                continue
            for other in range(len(axes)):
                # An axis that only the matrix has, as long as the one that is added up.
                if other not in dims and matrix.shape[other] == size and carrier.shape[other] == 1:
                    axes[other] = old
    return tuple(axes)


def contracts(axis: Axis, size: int) -> bool:
    """Whether a product over this axis mixes streams, and is not one over features or tokens."""
    # Several atoms together, as the heads and their features after an attention, are one axis of features.
    return size <= MOST_STREAMS and len(axis) == 1 and axis[0] is not None and not axis[0].itself().whole


def _matrix_product(first: Any, second: Any, shape: tuple[int, ...]) -> Found:
    """Axes of ``first @ second`` of the same number of axes; transparent where the contracted axis is one of streams."""
    a, b = _axes_of(first), _axes_of(second)
    lead = broadcast(a[:-2], b[:-2])
    size = second.shape[-2]
    linear = False
    for own, other in ((first, a[-1]), (second, b[-2])):
        if not _is_value(own):
            continue
        if size == 1 or contracts(other, size):
            linear = True
        elif not _is_value(second if own is first else first):
            all_noted(other, CONTRACTED)  # with a constant, as a linear layer does
    rows, columns = a[-2], b[-1]
    # What mixes streams gives streams again; what a matrix of weights makes is an axis of features.
    if linear and _is_value(second) and contracts(b[-2], size):
        rows = b[-2] if first.shape[-2] == size else made_axis(first.shape[-2])
    elif linear and _is_value(first) and contracts(a[-1], size):
        columns = a[-1] if second.shape[-1] == size else made_axis(second.shape[-1])
    return _completed([*lead, rows, columns], shape, whole=not linear), linear


def _bmm(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return _matrix_product(args[0], args[1], shape)


def _addmm(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes, linear = _matrix_product(args[1], args[2], shape)
    return axes, linear and not _is_value(args[0])


def _linear_layer(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    if not _is_value(args[0]):
        return None
    all_noted(args[0].axes[-1], CONTRACTED)
    return (*args[0].axes[:-1], *new_axes(shape[-1:])), False


def _sum_of_product(args: Any, kwargs: Any) -> list[Any] | None:
    """``addmm(x, a, b)`` as x + a @ b."""
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")) or not _is_tensor(args[0]):
        return None
    product = torch.ops.aten.mm.default if len(args[1].shape) == 2 else torch.ops.aten.bmm.default
    return [args[0], (product, args[1], args[2])]


def _sum_of_scaled(args: Any, kwargs: Any) -> list[Any] | None:
    """``addcmul(x, a, b)`` as x + a · b."""
    return [args[0], (torch.ops.aten.mul.Tensor, *args[1:3])] if kwargs.get("value", 1) == 1 else None


def _sum_of_both(args: Any, kwargs: Any) -> list[Any] | None:
    """``lerp(x, y, w)`` as (1 − w) · x + w · y."""
    if not _is_tensor(args[2]):
        return None
    rest = (torch.ops.aten.rsub.Scalar, args[2], 1)
    return [(torch.ops.aten.mul.Tensor, args[0], rest), (torch.ops.aten.mul.Tensor, args[1], args[2])]


def _is_tensor(argument: Any) -> bool:
    return _is_value(argument) or isinstance(argument, torch.Tensor)


def _vector_product(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    """Matrix by vector, or vector by vector."""
    axes, size = _axes_of(args[0]), args[1].shape[0]
    linear = False
    for own, axis in ((args[0], axes[-1]), (args[1], _axes_of(args[1])[0])):
        if _is_value(own):
            linear = linear or size == 1 or contracts(axis, size)
    return _completed(axes[:-1], shape), linear


def _scaled_sum(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    """``x + value · a · b`` and ``x + value · a / b``: linear in x alone, and in a where b is a constant."""
    axes = united(_axes_of(args[0]), broadcast(_axes_of(args[1]), _axes_of(args[2])))
    return _completed(axes, shape), not _is_value(args[2])


def _interpolated(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return _added(args, kwargs, shape, item)[0], not _is_value(args[2])


def _patched(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return args[0].axes, True


def _scattered(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    """``index_add``, ``index_copy``, ``index_put``, ``scatter_add``: linear in what is written to and in what is written."""
    indices = args[1] if isinstance(args[1], (list, tuple)) else args[2:3]
    if any(_is_value(index) for index in indices):
        return None
    own = args[0].axes if _is_value(args[0]) else new_axes(shape)
    return own, True


# --- opaque operations of which the axes are known


def _dropped(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return args[0].axes, item == 0


def _pointwise(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    axes: Axes = ()
    for argument in args:
        if _is_value(argument) or isinstance(argument, torch.Tensor):
            axes = broadcast(axes, _axes_of(argument))
    return (_completed(axes, shape), False) if len(axes) == len(shape) else (new_axes(shape), False)


def _activated(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    return args[0].axes, _is_value(args[0])


def _softmaxed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    # Along the tokens that an attention looks at, where it is written out.
    all_noted(args[0].axes[args[1]], WEIGHED)
    return args[0].axes, False


def _moved_along(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found:
    # The axes are what they were, and the positions along them are not: no state is carried through it.
    return args[0].axes, False


def _layer_normed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    if not _is_value(args[0]) or item:
        return None
    sizes = args[1] if isinstance(args[1], (list, tuple)) else ()
    for axis in args[0].axes[len(shape) - len(sizes) :]:
        all_noted(axis, NORMALISED)
    return args[0].axes, True


def _channel_normed(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    if not _is_value(args[0]) or item:
        return None
    all_noted(args[0].axes[1], NORMALISED)
    return args[0].axes, True


def _convolved(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    value, weight = args[0], args[1]
    if not _is_value(value) or len(value.shape) != len(weight.shape):
        return None
    all_noted(value.axes[1], CONTRACTED)
    axes = [value.axes[0], *new_axes(shape[1:2])]
    if (
        value.shape[1] == shape[1] and args[8] == shape[1]
    ):  # one filter a channel: the channels stay what they are
        axes[1] = value.axes[1]
    for dim in range(2, len(shape)):
        if weight.shape[dim] > 1 or len(shape) == 3:
            all_noted(value.axes[dim], SLID)
        axes.append(value.axes[dim] if value.shape[dim] == shape[dim] else new_axes(shape[dim : dim + 1])[0])
    for axis in axes[2:]:
        all_noted(axis, SLID)
    return tuple(axes), False


def _attended(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    if item or not _is_value(args[0]) or len(args[0].shape) < 3:
        return None
    all_noted(args[0].axes[-2], ATTENDED)
    value_axes = _axes_of(args[2])
    return _completed([*args[0].axes[:-1], value_axes[-1] if value_axes else ()], shape), False


def _embedded(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    if not _is_value(args[1]):
        return None
    return (*args[1].axes, *new_axes(shape[-1:])), False


def _copied(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> Found | None:
    """``x.copy_(y)``: all of x becomes y, broadcast and cast."""
    if not _is_value(args[1]):
        return None
    lead = len(shape) - len(args[1].axes)
    return _completed(((),) * lead + args[1].axes, shape), True


def _unknown(args: Any, kwargs: Any, shape: tuple[int, ...], item: int) -> None:
    return None


STRUCTURE: dict[str, Finds] = {
    **dict.fromkeys(
        (
            "alias",
            "detach",
            "clone",
            "contiguous",
            "_to_copy",
            "lift_fresh",
            "neg",
            "view_as_real_copy",
            "to",
        ),
        _same,
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"), _viewed),
    "permute": _permuted,
    **dict.fromkeys(("transpose", "t"), _transposed),
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "expand": _expanded,
    "repeat": _repeated,
    **dict.fromkeys(("slice", "narrow", "split", "split_with_sizes", "chunk"), _sliced),
    "select": _selected,
    "unbind": _unbound,
    **dict.fromkeys(("index_select", "index"), _indexed),
}
NORMS: dict[str, Finds] = {
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), _layer_normed),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "native_group_norm", "group_norm",
         "batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_with_update"),
        _channel_normed,
    ),
}  # fmt: skip
# Functions of one operand that a whole state may go through, as in post-activation networks.
ACTIVATIONS = ("relu", "gelu", "silu", "leaky_relu", "elu", "hardswish", "hardtanh", "sigmoid", "tanh", "mish", "prelu",
               "_prelu_kernel", "softplus", "hardsigmoid", "clamp", "relu6")  # fmt: skip
OPAQUE: dict[str, Finds] = {
    "linear": _linear_layer,
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"), _convolved),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax"), _softmaxed),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_attention_math", "scaled_dot_product_attention"),
        _attended,
    ),
    "embedding": _embedded,
    **dict.fromkeys(("roll", "flip"), _moved_along),
}  # fmt: skip
RULES: dict[str, Rule] = {
    **{name: Rule(finds) for name, finds in STRUCTURE.items()},
    **{name: Rule(finds, function=True) for name, finds in NORMS.items()},
    **{name: Rule(_activated, function=True) for name in ACTIVATIONS},
    **{name: Rule(finds) for name, finds in OPAQUE.items()},
    **{name: Rule(_added, sums=True, zero=(0, 1)) for name in ("add", "sub", "rsub")},
    **{name: Rule(_reduced, mixes=True) for name in ("sum", "mean")},
    "mul": Rule(_multiplied, product=True),
    "div": Rule(_divided, product=True),
    **{name: Rule(_bmm, product=True, mixes=True) for name in ("bmm", "mm", "matmul")},
    **{
        name: Rule(
            _addmm, product=True, mixes=True, zero=(0,), factor_positions=(1, 2), sum_of=_sum_of_product
        )
        for name in ("addmm", "baddbmm")
    },
    **{name: Rule(_vector_product, product=True, mixes=True) for name in ("mv", "dot")},
    "addcmul": Rule(_scaled_sum, sums=True, zero=(0,), sum_of=_sum_of_scaled),
    "addcdiv": Rule(_scaled_sum, sums=True, zero=(0,)),
    "native_dropout": Rule(_dropped, mask=True),
    "lerp": Rule(_interpolated, sums=True, zero=(0, 1), sum_of=_sum_of_both),
    "masked_fill": Rule(_masked, zero=(2,)),
    "where": Rule(_chosen, sums=True, zero=(1, 2)),
    "constant_pad_nd": Rule(_padded),
    "stack": Rule(_stacked),
    "cat": Rule(_concatenated),
    **{
        name: Rule(_scattered, sums=True, zero=(0, len(RULE_POSITIONS) - 1))
        for name, RULE_POSITIONS in {
            "index_add": ("x", "dim", "index", "source"),
            "index_copy": ("x", "dim", "index", "source"),
            "scatter_add": ("x", "dim", "index", "source"),
            "index_put": ("x", "indices", "values"),
        }.items()
    },
}
PATCH = Rule(_patched, sums=False)
COPY = Rule(_copied, writes=True)
READS_ONLY = Rule(_unknown, reads_only=True)
# What has only the shape of a value is a constant.
CONSTANTS = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
             "rand_like", "randn_like", "bernoulli", "new_empty_strided")  # fmt: skip
SILENT = ("_local_scalar_dense", "is_same_size", "sym_size", "sym_stride", "sym_numel", "item", "equal")
# By identity, with the operation itself, so that no other one gets its identity: torch hashes an operation in Python.
_known: dict[int, tuple[Rule, Any]] = {}


def rule_of(func: Any) -> Rule:
    """The rule of an operation; one that finds nothing where it is not known."""
    known = _known.get(id(func))
    if known is None:
        known = _known[id(func)] = _make_rule(func), func
    return known[0]


def _make_rule(func: Any) -> Rule:
    packet = getattr(func, "overloadpacket", None)
    name = getattr(packet, "__name__", str(func))
    if name in (*SILENT, *CONSTANTS):
        return READS_ONLY
    schema = getattr(func, "_schema", None)
    writes = bool(schema is not None and schema.is_mutable and name.endswith("_"))
    known = str(func).startswith("aten.") and RULES.get(name.removesuffix("_") if writes else name)
    if writes and name == "copy_":
        return COPY
    if known:
        return replace(known, writes=True) if writes else known
    pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
    return Rule(_pointwise if pointwise else _unknown, writes=writes)


# --- once more, on other tensors


def replayed(value: Value, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """What a transparent step makes of other operands; what was only added to them counts as zero.

    ``tensors``: one for each of its operands, in order; None for zero.
    """
    step = value.step
    assert step is not None
    given = iter(tensors)
    if step.rule is COPY:
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device).copy_(
            _or_zero(next(given), step.operands[0])
        )
    if step.rule is PATCH:
        old, new = (_or_zero(next(given), operand) for operand in step.operands)
        base = torch.empty_strided(value.shape, step.args[5], dtype=old.dtype, device=old.device).copy_(old)
        base.as_strided(*step.args[2:5]).copy_(new)
        return base
    args = [_argument(argument, position, step, given) for position, argument in enumerate(step.args)]
    if step.rule.mask:
        probe, mask, share = args
        return probe * mask / (1 - share)
    kwargs = {name: _argument(argument, None, step, given) for name, argument in step.kwargs.items()}
    if step.rule.writes:
        args[0] = args[0].clone()
    if step.rule.finds is _viewed:  # the operands of a replay may lie in memory in another order
        return args[0].reshape(args[1] if len(args) == 2 else value.shape)
    result = step.func(*args, **kwargs)
    return result[step.item] if isinstance(result, (tuple, list)) else result


def _or_zero(tensor: torch.Tensor | None, value: Value) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device) if tensor is None else tensor


def _argument(argument: Any, position: int | None, step: Step, given: Any) -> Any:
    if _is_value(argument):
        return _or_zero(next(given), argument)
    if isinstance(argument, list) and any(_is_value(item) for item in argument):
        return [
            _argument(item, position, step, given) if _is_value(item) else _zeros(item) for item in argument
        ]
    return _zeros(argument) if position in step.rule.zero else argument


def _zeros(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return torch.zeros_like(argument)
    return type(argument)(0) if isinstance(argument, (int, float)) else argument
