"""What is a stream connection? The layout of its streams, how many there are, and what it does with them.

A connection passes n streams X of width D by a branch F with three sets of weights:

    X' = H_res X + H_post ⊗ F(H_pre · X)            (mHC, arXiv 2512.24880, Eq. 3)
"""

from __future__ import annotations

from dataclasses import dataclass

from depthscope.diagnostics.errors import InputError


class StreamConnectionError(InputError):
    """A stream connection that cannot be read."""


class ReconstructionError(StreamConnectionError):
    """The captured parts of a connection do not give the next state."""


@dataclass(frozen=True)
class Site:
    """A connection of streams.

    ``style``: of its `Connection`.
    ``family``: name of the model's family; a run names an ``"hc"`` by what its matrices are measured to satisfy, see
    `depthscope.probes.connections.constraint`.
    ``num_streams``: n, times the fractions.
    ``layout``: as in `depthscope.probes.model.layout`.
    ``fractions``: parts of each stream's features that are connected separately.
    ``mixes``: whether an H_res exists; otherwise it is the identity.
    ``reads_features``: whether the branch input is read by gates per feature, so that no scalar H_pre exists.
    """

    style: str
    family: str
    num_streams: int
    layout: str
    fractions: int = 1
    mixes: bool = True
    reads_features: bool = False
