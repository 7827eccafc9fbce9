"""Which error is raised for a capture that could not be made? `CaptureError`."""

from __future__ import annotations

from torch import nn

from depthscope.diagnostics.errors import DepthscopeError, InputError
from depthscope.probes.model.modules import is_planned


class CaptureError(DepthscopeError, RuntimeError):
    """A capture that could not be made, or that would be incomplete."""


def as_capture_error(error: Exception) -> Exception:
    """An error in one sentence: ours as it is, any other as the reason why a model cannot be measured.

    Tensors of any kind may pass through a user's model, and many kinds refuse the operations that a measurement needs.
    """
    if isinstance(error, (CaptureError, ValueError)):
        return error
    reason = next(iter(str(error).splitlines()), "")
    wrapped = CaptureError(
        f"{reason[:200]} ({type(error).__name__}: the model, or what it was called with, cannot be measured)"
    )
    for note in getattr(error, "__notes__", ()):
        wrapped.add_note(note)
    return wrapped


def require_module(model: object, *, later: bool = False) -> None:
    """Refuse what is no model, and one without values; a training may give a model its values later."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is of type {type(model).__name__}; expected a torch.nn.Module, such as the one that a function calls"
        )
    if not later and is_planned(model):
        raise CaptureError(
            "the model is on the meta device, which holds no values; build it with values, or see what a capture would take "
            "with describe(model, batch)"
        )
