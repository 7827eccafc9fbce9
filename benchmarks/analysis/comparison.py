"""What is a comparison of tools? The same data for all, a reference for their answers, and sizes at which to time them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Make = Callable[[], Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Tool:
    """One implementation of what is compared.

    ``prepare``: from the data to a step; only the step is timed. A missing package is an ImportError here.
    ``truth``: the reference with which its answer is compared, where the comparison has several.
    ``package``: the peer to which it belongs, in a process of its own since some patch torch when they are imported;
    empty for this package, numpy and torch.
    ``skips``: sizes at which it would take minutes.
    """

    prepare: Callable[[Any], Step]
    truth: str = ""
    package: str = ""
    skips: tuple[str, ...] = ()


def worst(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest absolute difference."""
    return float(np.abs(found - truth).max())


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """The relative difference of a scalar."""
    return float(abs(found / truth - 1.0))


@dataclass(frozen=True)
class Comparison:
    """Several tools on the same data.

    ``title``: what is computed, and the meaning of the sizes.
    ``tools``: by name.
    ``baseline``: the tool by whose times the others are divided.
    ``sizes``: functions that make the data for timing.
    ``variants``: functions that make the data on which answers are checked.
    ``truths``: references: from the data to the answer in float64.
    ``error``: from an answer and its reference to the error.
    ``note``: what a reader needs to know, in the page.
    """

    title: str
    tools: Mapping[str, Tool]
    baseline: str
    sizes: Mapping[str, Make]
    variants: Mapping[str, Make] = field(default_factory=dict)
    truths: Mapping[str, Callable[[Any], np.ndarray]] = field(default_factory=dict)
    # The worst entry: a mean would hide one wrong value among many right ones.
    error: Callable[[np.ndarray, np.ndarray], float] = worst
    note: str = ""

    def groups(self) -> list[list[str]]:
        """Tools that share a process, the baseline first."""
        # Tools without a package form one group with the baseline.
        packages: dict[str, list[str]] = {}
        for name, tool in self.tools.items():
            if name != self.baseline:
                packages.setdefault(tool.package, []).append(name)
        return [[self.baseline, *names] for names in packages.values()]


def on_all_pairs(of_pair: Callable[[Any, Any], float], layers: Any) -> np.ndarray:
    """A symmetric table from a function of two matrices, each pair once."""
    table = np.empty((len(layers), len(layers)))
    for i, x in enumerate(layers):
        # With itself too: a tool is timed for what a user calls it for, the full table.
        for j in range(i, len(layers)):
            table[i, j] = table[j, i] = float(of_pair(x, layers[j]))
    return table
