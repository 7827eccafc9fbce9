"""What is asked of every tool: the same data, an answer to check, and sizes to time it at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Make = Callable[[], Any]
Step = Callable[[], Any]


class CannotTakeError(Exception):
    """Why a tool is not measured."""


@dataclass(frozen=True)
class Tool:
    """One way to an answer.

    Parameters
    ----------
    prepare : callable
        From the data to a step; only the step is timed. A missing package is an ImportError here.
    truth : str
        Which of the question's answers it should give.
    package : str
        The peer that it belongs to, in a process of its own since some change torch when they are imported; empty for what
        this package brings and for what numpy and torch do.
    skips : tuple of str
        Sizes at which it would take minutes.
    answers : bool
        Whether it answers the question; else it is only here to divide times by.
    """

    prepare: Callable[[Any], Step]
    truth: str = ""
    package: str = ""
    skips: tuple[str, ...] = ()
    answers: bool = True


def worst(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest absolute difference."""
    return float(np.abs(found - truth).max())


@dataclass(frozen=True)
class Question:
    """One question to several tools.

    Parameters
    ----------
    title : str
        What is asked, at which sizes.
    tools : mapping of str to Tool
        By name.
    baseline : str
        The tool that times are divided by.
    sizes : mapping of str to callable
        What makes the data that tools are timed on.
    variants : mapping of str to callable
        What makes the data that answers are checked on.
    truths : mapping of str to callable
        The answer in float64, from the data.
    error : callable
        How far an answer is from it.
    own_variants : mapping of str to callable
        Further ones, that peers would take minutes for.
    note : str
        What a reader must know.
    """

    title: str
    tools: Mapping[str, Tool]
    baseline: str
    sizes: Mapping[str, Make]
    variants: Mapping[str, Make] = field(default_factory=dict)
    truths: Mapping[str, Callable[[Any], np.ndarray]] = field(default_factory=dict)
    error: Callable[[np.ndarray, np.ndarray], float] = worst
    own_variants: Mapping[str, Make] = field(default_factory=dict)
    note: str = ""

    def groups(self) -> list[list[str]]:
        """Tools that share a process, the baseline first."""
        packages: dict[str, list[str]] = {}
        for name, tool in self.tools.items():
            if name != self.baseline:
                packages.setdefault(tool.package, []).append(name)
        return [[self.baseline, *names] for names in packages.values()]


def on_all_pairs(of_pair: Callable[[Any, Any], float], layers: Any) -> np.ndarray:
    """A symmetric table from a function of two matrices, each pair once."""
    table = np.empty((len(layers), len(layers)))
    for i, x in enumerate(layers):
        for j in range(i, len(layers)):
            table[i, j] = table[j, i] = float(of_pair(x, layers[j]))
    return table
