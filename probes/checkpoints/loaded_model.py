"""A model together with where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what a run has to know about its origin."""

    model: nn.Module
    """Weights in place, in eval mode."""
    tokenizer: Any | None
    """The checkpoint's own tokenizer; None if it carries none."""
    name: str
    """Short name for titles and tables."""
    digest: str
    """``sha256:…`` of the weight files, or of the parameters where there is no file."""
    source: str
    """The specification and weights that this came from, as given."""
