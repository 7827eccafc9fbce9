"""Which modules need not be watched operation by operation? Those of torch's own that run few, always the same ones.

A linear layer is four operations, of which two are views; all of them together are half of a forward's. What such a module
computes is known from its class as long as nothing of it was replaced: then the trace steps aside while it runs, and notes the
same values as if it had watched. Whatever is unusual (hooks of the user's, autocast, another memory format, weights of another
kind, an axis of streams) is watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooked

from depthscope.probes.dataflow.axes import CONTRACTED, Axes, Axis, new_axes, regrouped
from depthscope.probes.dataflow.operations import contracts, rule_of
from depthscope.probes.dataflow.values import Step, Value

if TYPE_CHECKING:
    from depthscope.probes.dataflow.trace import Trace

ATEN = torch.ops.aten
# The view of a linear layer's product in the shape of what it took: without a bias, and with one.
VIEWS = [(func, rule_of(func)) for func in (ATEN._unsafe_view.default, ATEN.view.default)]
# Whether a call is the usual one, and what it then computed; both of the module and the value that it took.
Usual = Callable[[Any, Value], bool]
Notes = Callable[["Trace", Any, Value, torch.Tensor, torch.Tensor], None]


def _is_plain(weight: Any) -> bool:
    # The exact class: quantised and distributed weights have one of their own, and run other operations.
    return weight is None or (type(weight) is nn.Parameter and weight.layout is torch.strided)


def _usual_linear(module: Any, value: Value) -> bool:
    own = module._parameters
    axis, size = value.axes[-1], value.shape[-1]
    return (
        own.get("weight") is not None
        and _is_plain(own["weight"])
        and "bias" in own
        and _is_plain(own["bias"])
        and len(axis) == 1
        and axis[0].size == size > 1
        and not contracts(axis, size)  # what mixes streams is followed, and not the work of a branch
    )


def _note_linear(trace: Trace, module: Any, value: Value, x: torch.Tensor, output: torch.Tensor) -> None:
    has_bias = module._parameters["bias"] is not None  # not by the attribute, which torch looks for in Python
    func = ATEN.addmm.default if has_bias else ATEN.mm.default
    for atom in value.axes[-1]:
        atom.note(CONTRACTED)
    (columns,) = new_axes(output.shape[-1:])
    if output.ndim == 2:
        product = trace.add_value(output, (value.axes[0], columns), value)
        product.func = func
        trace.hold(output, product)
        return
    matrix = trace.add_number(value)  # of the view as a matrix
    rows, lead = _rows(value, output)
    product = trace.add_value(output, (rows, columns), value)
    trace.parents[product.number] = (matrix,)
    product.shape, product.func = (output.numel() // output.shape[-1], output.shape[-1]), func
    result = trace.add_value(output, (*lead, columns), product)
    result.func, rule = VIEWS[has_bias]
    result.step = Step(rule, result.func, (product, list(output.shape)), {}, (product,))
    result.root = product.number
    trace.hold(output, result)


def _rows(value: Value, output: torch.Tensor) -> tuple[Axis, Axes]:
    """The axis of the rows of a matrix that a value is viewed as, and the axes that a view makes of it again."""
    rows: list[Any] = []
    lead: list[Axis] = []
    for axis, size in zip(value.axes[:-1], value.shape[:-1], strict=True):
        if not axis and size == 1:
            lead.append(axis)
            continue
        atom = axis[0].itself() if len(axis) == 1 else None
        if atom is None or atom.size != size or atom.parent is not None:  # parts may be one axis as rows
            return _regrouped_rows(value, output)
        rows.append(atom)
        lead.append((atom,))
    return tuple(rows), tuple(lead)


def _regrouped_rows(value: Value, output: torch.Tensor) -> tuple[Axis, Axes]:
    num_rows = output.numel() // output.shape[-1]
    matrix = regrouped(value.axes, (num_rows, value.shape[-1])) or new_axes((num_rows, value.shape[-1]))
    rows = matrix[0] or new_axes((num_rows,))[0]
    lead = regrouped((rows,), output.shape[:-1])
    return rows, lead or new_axes(output.shape[:-1])


def _usual_norm(module: Any, value: Value) -> bool:
    own = module._parameters
    return "weight" in own and "bias" in own and _is_plain(own["weight"]) and _is_plain(own["bias"])


def _note_norm(trace: Trace, module: Any, value: Value, x: torch.Tensor, output: torch.Tensor) -> None:
    own = module._parameters
    given = list(module.normalized_shape), own["weight"], own["bias"], module.eps
    trace.note_operation(
        ATEN.native_layer_norm.default, (x, *given), (value, *given), {}, value, (output, None, None)
    )
    trace.add_number(value)  # the means
    trace.add_number(value)  # and the inverse deviations


def _any(module: Any, value: Value) -> bool:
    return True


def _in_another_tensor(module: Any, value: Value) -> bool:
    return module.inplace is False


def _notes_of(func: Any, options: Callable[[Any], dict[str, Any]] = lambda module: {}) -> Notes:
    """Notes of a module that is one function of one tensor."""

    def note(trace: Trace, module: Any, value: Value, x: torch.Tensor, output: torch.Tensor) -> None:
        trace.note_operation(func, (x,), (value,), options(module), value, output)

    return note


def _approximation(module: Any) -> dict[str, Any]:
    return {} if module.approximate == "none" else {"approximate": module.approximate}


# By class: what it calls, whether a call is the usual one, what it then computed.
KNOWN: dict[type[nn.Module], tuple[str, Usual, Notes]] = {
    nn.Linear: ("linear", _usual_linear, _note_linear),
    nn.LayerNorm: ("layer_norm", _usual_norm, _note_norm),
    nn.GELU: ("gelu", _any, _notes_of(ATEN.gelu.default, _approximation)),
    nn.ReLU: ("relu", _in_another_tensor, _notes_of(ATEN.relu.default)),
    nn.SiLU: ("silu", _in_another_tensor, _notes_of(ATEN.silu.default)),
}


def known_modules() -> dict[type[nn.Module], tuple[Usual, Notes]]:
    """What is known of torch's own modules at present: libraries replace functions of torch, and forwards of its classes.

    Returns: By the exact class: whether a call is the usual one, and what notes the values that it makes.
    """
    return {
        kind: (usual, notes)
        for kind, (name, usual, notes) in KNOWN.items()
        if _is_torchs(kind.forward) and _is_torchs(getattr(F, name), getattr(torch._C._nn, name, None))
    }


def _is_torchs(function: Any, builtin: Any = None) -> bool:
    code = getattr(function, "__code__", None)
    if code is None:
        return function is not None and function is builtin
    return code.co_filename.startswith(_TORCH)


_TORCH = str(nn.__file__).removesuffix("__init__.py")  # where torch's own modules and functions are written


def runs_alone(module: nn.Module) -> bool:
    """Whether a call of a module runs its class's forward, and no hooks but our two."""
    own = vars(module)
    return not (
        "forward" in own
        or len(own["_forward_hooks"]) != 1
        or len(own["_forward_pre_hooks"]) != 1
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or hooked._global_forward_hooks
        or hooked._global_forward_pre_hooks
        or hooked._global_backward_hooks
        or hooked._global_backward_pre_hooks
    )
