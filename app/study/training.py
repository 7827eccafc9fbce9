"""How are models trained so that only their connections can differ? On the same batches, one step each in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from depthscope.app.study.corpus import Corpus, draw_batch
from depthscope.app.study.learner import Learner, train_step
from depthscope.app.study.recipe import Recipe, schedule, spent_fraction
from depthscope.app.study.small_lm import TITLES
from depthscope.app.text.terminal import progress_bar


@contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread for each operation: the tensors are small, and the three models already keep the cores busy.

    Yields: The former number of threads is restored on the way out.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_side_by_side(
    learners: Sequence[Learner],
    corpus: Corpus,
    recipe: Recipe,
    *,
    progress: bool = False,
) -> float:
    """Give every model the same batches in the same order, one step each in turn, until the budget is spent.

    ``learners``: trained in place; their losses are filled.
    Returns: Seconds spent, with what measuring the models took.
    """
    # Its own generator: a caller's random numbers do not change the batches.
    generator = torch.Generator().manual_seed(recipe.seed)
    seconds, step = 0.0, 0
    with ThreadPoolExecutor(len(learners)) as pool, progress_bar("training", visible=progress) as show:
        while (fraction := spent_fraction(recipe, seconds, step)) < 1:
            started = time.perf_counter()
            batch = draw_batch(corpus.train, recipe.batch, recipe.length, generator)
            rate = recipe.learning_rate * schedule(fraction, recipe.warm_up)
            # In threads, which torch lets run at the same time: it releases the lock inside its operations. A step of
            # all models ends before the next begins, so that none gets ahead of the budget.
            steps = [pool.submit(train_step, learner, batch, rate, recipe.clip) for learner in learners]
            for each in steps:
                each.result()
            seconds += time.perf_counter() - started
            step += 1
            losses = "  ".join(f"{TITLES[each.kind]} {np.mean(each.losses[-10:]):.2f}" for each in learners)
            show(spent_fraction(recipe, seconds, step), f"step {step}  {losses}")
    return seconds
