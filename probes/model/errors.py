"""Which errors are raised for what could not be measured or changed? `CaptureError`, `InterventionError`."""

from __future__ import annotations

from depthscope.diagnostics.errors import DepthscopeError


class CaptureError(DepthscopeError, RuntimeError):
    """A capture that could not be made, or that would be incomplete."""


class InterventionError(CaptureError):
    """A change that cannot be made, or an experiment that the model does not allow."""


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
