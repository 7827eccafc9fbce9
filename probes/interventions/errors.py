"""What is raised where a forward cannot be changed as asked."""

from __future__ import annotations

from depthscope.probes.model.errors import CaptureError


class InterventionError(CaptureError):
    """A change that cannot be made, or an experiment that the model does not allow."""
