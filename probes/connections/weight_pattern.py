"""Which tensors of a weight file are a connection, and what are its weights there? One pattern each.

Shapes: ``n`` streams, ``f`` fractions of each, ``v`` inputs of the branch. A row of H_res is a destination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.safetensors_header import StoredTensor

Leaves = Mapping[str, StoredTensor]  # the tensors of one module, by the last part of their names
Values = Mapping[str, np.ndarray]  # by role
Settings = Mapping[str, float]

SINKHORN_ROUNDS = 20  # the default of hyper-connections and of transformers' deepseek_v4


@dataclass(frozen=True)
class FoundTensors:
    """The tensors of one connection; its weights are computed from those in ``roles``."""

    module: str
    streams: int
    width: int | None
    roles: Mapping[str, StoredTensor]
    unread: tuple[StoredTensor, ...] = ()
    fractions: int = 1  # 0 where the shapes do not determine it


@dataclass(frozen=True)
class StaticWeights:
    """A connection at an input that adds nothing; None where the file does not determine it, for the reason in ``note``."""

    res: np.ndarray | None = None  # (n·f, n·f)
    pre: np.ndarray | None = None  # (n,), or (reads, n·f)
    post: np.ndarray | None = None  # (n,), or (n·f, writes)
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)  # the learned parameters by part
    gates: Mapping[str, float] = field(default_factory=dict)  # factors of the part that depends on the input
    note: str = ""


def attributes_of(module: Any, settings: Settings) -> dict[str, float]:
    """The settings that a built module has as attributes of these names, and the defaults of the others."""
    return {name: float(getattr(module, name, value)) for name, value in settings.items()}


@dataclass(frozen=True)
class WeightPattern:
    """One way in which a family's tensors appear in a file.

    Parameters
    ----------
    name, style : str
        The family as the description names it (``"mhc"``), and the way in which it is written.
    looked_for : str
        The shapes in words, for a user whose checkpoint has none.
    find : callable
        ``find(module, leaves)`` yields the connections among one module's tensors, by their shapes.
    weigh : callable
        ``weigh(found, values, settings)``: the weights where the input adds nothing; ``values`` are float64.
    settings : mapping
        Numbers of the configuration that the formula needs, with their defaults.
    constrained : bool
        Whether H_res is doubly stochastic by construction.
    learns_mixing : bool
        Whether H_res has learned biases; otherwise it is the same matrix in every model.
    composes : bool
        Whether products of H_res alone describe how the streams mix over depth.
    head : bool
        Whether it only reads the streams at the end; it counts where connections of the same size were found.
    sinkhorn : callable, optional
        ``sinkhorn(settings)``: how the learned logits become H_res, as `depthscope.diagnostics.with_replay` takes it.
    module_settings : callable
        ``module_settings(module, settings)``: the settings of a module that was built.
    """

    name: str
    style: str
    looked_for: str
    find: Callable[[str, Leaves], Iterator[FoundTensors]]
    weigh: Callable[[FoundTensors, Values, Settings], StaticWeights]
    settings: Settings = field(default_factory=dict)
    constrained: bool = False
    learns_mixing: bool = True
    composes: bool = True
    head: bool = False
    sinkhorn: Callable[[Settings], dict[str, Any]] | None = None
    module_settings: Callable[[Any, Settings], dict[str, float]] = attributes_of
