"""How are models trained so that only their connections can differ? On the same batches, in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from depthscope.app.study.small_lm import Size, SmallLM, build

TITLES = {"residual": "residual", "hc": "HC", "mhc": "mHC"}


@dataclass(frozen=True)
class Recipe:
    """How the three models are trained; the same for each.

    The learning rate rises over the first part of the budget and falls to zero along a cosine: it follows the
    clock, so that a slow machine also ends on a trained model, unless `steps` is given: then a run is exactly
    reproducible.
    """

    seconds: float = 60.0
    steps: int | None = None
    batch: int = 8
    length: int = 64
    learning_rate: float = 3e-3
    warm_up: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    size: Size = field(default_factory=Size)
    probed_sequences: int = 8
    probed_length: int = 128
    snapshots: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75)
    """Parts of the budget at which the models are measured, besides the end."""


@dataclass
class Learner:
    """One of the models with its optimiser and what it has been through."""

    kind: str
    model: SmallLM
    optimiser: torch.optim.Optimizer
    initial: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    history: list[xr.Dataset] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and a held-out end of the same text."""

    train: torch.Tensor
    held_out: torch.Tensor

    @property
    def unigram_entropy(self) -> float:
        """Loss, in nats a byte, of a model that knows only how frequent each byte is."""
        counts = torch.bincount(self.held_out).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


def split(text: str, *, held_out: float = 0.1) -> Corpus:
    """Cut a text into training bytes and a held-out end.

    Parameters
    ----------
    text : str
        Any text.
    held_out : float
        The part kept for validation.

    Returns
    -------
    Corpus
        Of int64 bytes.
    """
    ids = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))
    border = len(ids) - int(len(ids) * held_out)
    return Corpus(ids[:border], ids[border:])


def learner(kind: str, recipe: Recipe) -> Learner:
    """A fresh model and its optimiser; only the branches' matrices and the head decay.

    Parameters
    ----------
    kind : {"residual", "hc", "mhc"}
        The connection.
    recipe : Recipe
        Size, seed, optimiser.

    Returns
    -------
    Learner
        At step 0.
    """
    model = build(kind, size=recipe.size, seed=recipe.seed)
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decaying], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decaying], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    initial = {name: value.clone() for name, value in connection_parameters(model).items()}
    return Learner(kind, model, optimiser, initial)


def connection_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that belong to the connections and not to the branches inside them.

    Parameters
    ----------
    model : nn.Module
        One of the study's models.

    Returns
    -------
    dict of str to torch.Tensor
        Detached, by name; empty for the residual model.
    """
    own = {
        f"{prefix}.{name}": value.detach()
        for prefix, module in model.named_modules()
        if hasattr(module, "branch")
        for name, value in module.named_parameters()
        if not name.startswith("branch.")
    }
    return own


def connection_movement(each: Learner) -> dict[str, float]:
    """How far the connections have moved from where they started: rms change per kind of parameter.

    Parameters
    ----------
    each : Learner
        A trained learner.

    Returns
    -------
    dict of str to float
        Such as ``{"static_alpha": 0.08, …}``; a connection that never learns shows zeros.
    """
    squares: dict[str, list[torch.Tensor]] = {}
    for name, value in connection_parameters(each.model).items():
        squares.setdefault(_kind_of_parameter(name), []).append(
            (value - each.initial[name]).square().flatten()
        )
    return {kind: float(torch.cat(parts).mean().sqrt()) for kind, parts in squares.items()}


def _kind_of_parameter(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[parts.index("norm") :]) if "norm" in parts else parts[-1]


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread per model: the tensors are small, and the three models already keep the cores busy.

    Yields
    ------
    None
        While torch uses one thread per operation.
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
    measure: Callable[[int], None] | None = None,
    progress: bool = False,
) -> float:
    """Give every model the same batches in the same order, one step each in turn, until the budget is spent.

    Parameters
    ----------
    learners : sequence of Learner
        Trained in place; their losses are filled.
    corpus : Corpus
        What they read.
    recipe : Recipe
        The budget and the optimiser.
    measure : callable, optional
        Called with the number of steps at each of the recipe's snapshots.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    float
        Seconds spent in training steps; measuring is not counted.
    """
    order = torch.Generator().manual_seed(recipe.seed)
    due = list(recipe.snapshots) if measure else []
    spent, step = 0.0, 0
    with ThreadPoolExecutor(len(learners)) as pool, _bar(progress) as show:
        while (part := done_part(recipe, spent, step)) < 1:
            if measure and due and part >= due[0]:
                due.pop(0)
                measure(step)
            started = time.perf_counter()
            batch = draw(corpus.train, recipe, order)
            rate = recipe.learning_rate * schedule(part, recipe.warm_up)
            list(pool.map(lambda each: _train_step(each, batch, rate, recipe.clip), learners))  # noqa: B023
            spent += time.perf_counter() - started
            step += 1
            show(done_part(recipe, spent, step), _progress_line(learners))
    return spent


def done_part(recipe: Recipe, spent: float, step: int) -> float:
    """The part of the budget that is spent, by steps where they are given, else by the clock.

    Parameters
    ----------
    recipe : Recipe
        The budget.
    spent : float
        Seconds of training.
    step : int
        Steps of training.

    Returns
    -------
    float
        From 0 on; 1 is the end.
    """
    return step / recipe.steps if recipe.steps is not None else spent / recipe.seconds


def schedule(part: float, warm_up: float) -> float:
    """The learning rate's factor: a linear rise, then a cosine to zero.

    Parameters
    ----------
    part : float
        Of the budget, 0 to 1.
    warm_up : float
        Where the rise ends.

    Returns
    -------
    float
        From 0 to 1.

    Examples
    --------
    >>> schedule(0.1, 0.1), round(schedule(0.55, 0.1), 6)
    (1.0, 0.5)
    """
    if part < warm_up:
        return max(part / warm_up, 0.01)  # a first step at rate 0 would teach nothing
    return 0.5 * (1 + math.cos(math.pi * (part - warm_up) / (1 - warm_up)))


def draw(ids: torch.Tensor, recipe: Recipe, order: torch.Generator) -> torch.Tensor:
    """A batch of random windows, one byte longer than the predictions made on it.

    Parameters
    ----------
    ids : torch.Tensor
        The training bytes.
    recipe : Recipe
        Batch and length.
    order : torch.Generator
        Where the windows come from.

    Returns
    -------
    torch.Tensor
        (batch, length + 1) int64.
    """
    starts = torch.randint(0, len(ids) - recipe.length, (recipe.batch, 1), generator=order)
    return ids[starts + torch.arange(recipe.length + 1)]


def _train_step(each: Learner, batch: torch.Tensor, rate: float, clip: float) -> None:
    for group in each.optimiser.param_groups:
        group["lr"] = rate
    loss = each.model(batch, labels=batch).loss
    each.optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(each.model.parameters(), clip)
    each.optimiser.step()
    each.losses.append(float(loss.detach()))


def held_out_loss(model: SmallLM, corpus: Corpus, *, length: int = 128, windows: int = 64) -> float:
    """Mean loss on evenly spread windows of the held-out text, in nats a byte.

    Parameters
    ----------
    model : SmallLM
        A trained model.
    corpus : Corpus
        With the held-out bytes.
    length, windows : int
        What is read of them.

    Returns
    -------
    float
        The loss.
    """
    starts = torch.linspace(0, len(corpus.held_out) - length - 1, windows).long().unsqueeze(1)
    batch = corpus.held_out[starts + torch.arange(length + 1)]
    with torch.inference_mode():
        return float(np.mean([model(part, labels=part).loss.item() for part in batch.split(8)]))


def _progress_line(learners: Sequence[Learner]) -> str:
    shown = [f"{TITLES[each.kind]} {np.mean(each.losses[-10:]):.2f}" for each in learners]
    return f"step {len(learners[0].losses)}  " + "  ".join(shown)


@contextmanager
def _bar(progress: bool) -> Iterator[Callable[[float, str], None]]:
    columns = TextColumn("training"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda part, line: bar.update(task, completed=min(part, 1.0), description=line)
