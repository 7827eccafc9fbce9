"""What is a stream connection? And what is raised where one cannot be read.

A connection passes n streams X of width D by a branch F with three sets of weights:

    X' = H_res X + H_post ⊗ F(H_pre · X)            (mHC, arXiv 2512.24880, Eq. 3)
"""

from __future__ import annotations

from depthscope.diagnostics.errors import InputError


class StreamConnectionError(InputError):
    """A stream connection that cannot be read."""


class ReconstructionError(StreamConnectionError):
    """The captured parts of a connection do not give the next state."""
