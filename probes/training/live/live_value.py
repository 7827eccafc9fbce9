"""What is one number of a live row? An array with named dims, and what it was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthscope.diagnostics.analysis.training_curves import EXACT


@dataclass(frozen=True)
class LiveValue:
    """One value of a step.

    Parameters
    ----------
    dims : tuple of str
        Without ``step``.
    values : ndarray
        float64.
    estimator : str
        From which tokens, and how.
    attrs : mapping
        Further attributes.
    """

    dims: tuple[str, ...]
    values: np.ndarray
    estimator: str = EXACT
    attrs: Mapping[str, Any] = field(default_factory=dict)


def sampled(count: int, how: str = "") -> str:
    """The estimator of what is computed on K tokens of a step.

    Examples
    --------
    >>> sampled(128)
    'on 128 sampled tokens of the step'
    """
    return f"on {count} sampled tokens of the step{f'; {how}' if how else ''}"
