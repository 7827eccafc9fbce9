"""Which error is raised for a capture that could not be made? `CaptureError`."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """A capture that could not be made, or that would be incomplete."""
