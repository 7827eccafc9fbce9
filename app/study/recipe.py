"""How are the study's models trained? One recipe for all of them, and the learning rate over its budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from depthscope.app.study.small_lm import Size


@dataclass(frozen=True)
class Recipe:
    """How the models are trained; the same for each.

    The learning rate rises over the first part of the budget and falls to zero along a cosine. The budget is time, of a
    slow machine at least `fewest_steps`, unless `steps` is given: then a run is exactly reproducible.
    """

    seconds: float = 60.0
    steps: int | None = None
    fewest_steps: int = 21
    """Three measured steps: with fewer there is no training to look at."""
    batch: int = 8
    length: int = 64
    # Heuristics of ours for decoders of this size.
    learning_rate: float = 3e-3
    warm_up: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    size: Size = field(default_factory=Size)
    probed_sequences: int = 8
    probed_length: int = 128
    record_every: int = 10
    """Every so many training steps, the first one included, are measured while the models learn."""


def spent_fraction(recipe: Recipe, seconds: float, steps: int) -> float:
    """The fraction of the budget that is spent: of the steps where the recipe has a number of them, else of the time.

    Returns: 0 at the start; 1 or more ends the training.
    """
    if recipe.steps is not None:
        return steps / recipe.steps
    return min(seconds / recipe.seconds, steps / recipe.fewest_steps)


def schedule(fraction: float, warm_up: float) -> float:
    """The learning rate's factor: a linear rise, then a cosine to zero.

    Examples
    --------
    >>> schedule(0.1, 0.1), round(schedule(0.55, 0.1), 6)
    (1.0, 0.5)
    """
    if fraction < warm_up:
        return max(fraction / warm_up, 0.01)  # a first step at rate 0 would change nothing
    return 0.5 * (1 + math.cos(math.pi * (fraction - warm_up) / (1 - warm_up)))
