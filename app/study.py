"""What does the connection alone change? Three small language models trained side by side."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_model
from torch import nn

import probes
from app.small_lm import CONNECTIONS, Size, SmallLM, build
from diagnostics import schema
from probes.load import LoadedModel, encode_text, sample_text, token_texts
from probes.weights import file_digest

TITLES = {"residual": "residual", "hc": "HC", "mhc": "mHC"}


class StudyError(ValueError):
    """A study that cannot be run as asked."""


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


def main(args: argparse.Namespace) -> int:
    """The command ``depthscope study``.

    Parameters
    ----------
    args : argparse.Namespace
        With `out` and `minutes`.

    Returns
    -------
    int
        Exit code 0.
    """
    for path in run_study(Path(args.out), seconds=60 * args.minutes).values():
        sys.stdout.write(f"{path}\n")
    return 0


def run_study(
    out: Path, *, seconds: float = 60.0, seed: int = 0, progress: bool = True, recipe: Recipe | None = None
) -> dict[str, Path]:
    """Train a residual, an HC and an mHC model side by side, probe each, save runs and weights.

    Parameters
    ----------
    out : Path
        Folder for ``residual.nc``, ``hc.nc``, ``mhc.nc`` and their weights; earlier ones are replaced.
    seconds : float
        Training time of the three together; probing comes on top.
    seed : int
        Of the weights and of the order of the data.
    progress : bool
        Show a bar with the three losses on stderr.
    recipe : Recipe, optional
        Everything else; its own seconds and seed are replaced by the two above.

    Returns
    -------
    dict of str to Path
        The saved runs by family: residual, hc, mhc.

    Raises
    ------
    StudyError
        If the time is not positive.
    """
    recipe = replace(recipe or Recipe(), seconds=seconds, seed=seed)
    if recipe.seconds <= 0 or (recipe.steps is not None and recipe.steps < 1):
        raise StudyError(f"got {recipe.seconds:g} s and {recipe.steps} steps; expected more than 0")
    text = sample_text()
    corpus = split(text)
    learners = [learner(kind, recipe) for kind in CONNECTIONS]
    with single_threaded():
        spent = train_side_by_side(learners, corpus, recipe, progress=progress)
        out.mkdir(parents=True, exist_ok=True)
        return {each.kind: _saved(each, corpus, recipe, out, spent) for each in learners}


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
    learners: Sequence[Learner], corpus: Corpus, recipe: Recipe, *, progress: bool = False
) -> float:
    """Give every model the same batches in the same order, one step each in turn, until the budget is spent.

    Parameters
    ----------
    learners : sequence of Learner
        Trained in place; their losses and the history of their statistics are filled.
    corpus : Corpus
        What they read.
    recipe : Recipe
        The budget and the optimiser.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    float
        Seconds spent in training steps; probing is not counted.
    """
    order = torch.Generator().manual_seed(recipe.seed)
    due = list(recipe.snapshots)
    spent, step = 0.0, 0
    with ThreadPoolExecutor(len(learners)) as pool, _bar(progress) as show:
        while (part := done_part(recipe, spent, step)) < 1:
            if due and part >= due[0]:
                due.pop(0)
                _measure_all(learners, corpus, recipe, step)
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


def _probe(each: Learner, corpus: Corpus, recipe: Recipe, attrs: Mapping[str, Any]) -> xr.DataTree:
    """Measure a model on the same held-out windows every time."""
    loaded = LoadedModel(each.model, None, TITLES[each.kind], "", each.kind)
    text = bytes(corpus.held_out.to(torch.uint8).tolist()).decode(errors="replace")
    batch = encode_text(
        loaded, text, sequences=recipe.probed_sequences, length=recipe.probed_length, seed=recipe.seed
    )
    each.model.eval()
    try:
        return probes.capture(
            each.model,
            batch,
            gradients=True,
            token_text=token_texts(loaded, batch),
            max_sequences=recipe.probed_sequences,
            attrs=attrs,
        )
    finally:
        each.model.train()


def _measure_all(learners: Sequence[Learner], corpus: Corpus, recipe: Recipe, step: int) -> None:
    for each in learners:
        run = _probe(each, corpus, recipe, {})
        each.history.append(_statistics(run, step))


def _statistics(run: xr.DataTree, step: int) -> xr.Dataset:
    return run["statistics"].to_dataset().assign_coords(step=[step])


def with_history(run: xr.DataTree, history: Sequence[xr.Dataset], step: int) -> xr.DataTree:
    """The final run with the statistics of earlier steps before its own.

    Parameters
    ----------
    run : DataTree
        Captured at the end of training.
    history : sequence of Dataset
        Statistics of earlier captures on the same batch.
    step : int
        How many training steps the final one comes after.

    Returns
    -------
    DataTree
        Sums over all tokens (without a step) are those of the final weights.
    """
    final = _statistics(run, step)
    stepwise = [name for name, value in final.data_vars.items() if "step" in value.dims]
    rows = [dataset[stepwise] for dataset in (*history, final)]
    joined = xr.concat(rows, dim="step", data_vars="all", coords="minimal", compat="override", join="exact")
    attrs = {str(name): value for name, value in run.attrs.items()}
    statistics = joined.merge(final.drop_vars([*stepwise, "step"]), compat="override")
    return schema.create_run(run["trace"].to_dataset(), statistics=statistics, attrs=attrs)


def _saved(each: Learner, corpus: Corpus, recipe: Recipe, out: Path, spent: float) -> Path:
    step = len(each.losses)
    weights = out / f"{each.kind}.safetensors"
    save_model(each.model, str(weights), metadata={"format": "pt"})
    attrs = {
        "model": f"small LM, {TITLES[each.kind]}",
        "seed": recipe.seed,
        "loss_reduction": "mean",
        "weights_digest": file_digest([weights]),
        "training": training_facts(each, corpus, recipe, spent),
    }
    run = with_history(_probe(each, corpus, recipe, attrs), each.history, step)
    return schema.save_run(run, out / f"{each.kind}.nc")


def training_facts(each: Learner, corpus: Corpus, recipe: Recipe, spent: float) -> dict[str, Any]:
    """What a reader has to know about the training to judge the comparison.

    Parameters
    ----------
    each : Learner
        A trained learner.
    corpus : Corpus
        What it read.
    recipe : Recipe
        How.
    spent : float
        Seconds, of all three together.

    Returns
    -------
    dict
        Losses in nats a byte.
    """
    steps = len(each.losses)
    return {
        "corpus": "pydoc_data.topics, bytes; the last tenth held out",
        "steps": steps,
        "bytes": steps * recipe.batch * recipe.length,
        "seconds_side_by_side": round(spent, 1),
        "batch": recipe.batch,
        "length": recipe.length,
        "optimiser": "AdamW, betas 0.9 0.95, gradient norm clipped at " + format(recipe.clip, "g"),
        "weight_decay": recipe.weight_decay,
        "learning_rate": recipe.learning_rate,
        "schedule": "linear warm-up, cosine to zero, by "
        + ("the clock" if recipe.steps is None else "steps"),
        "initial_loss": each.losses[0],
        "final_loss": float(np.mean(each.losses[-10:])),
        "held_out_loss": held_out_loss(each.model, corpus),
        "unigram_entropy": corpus.unigram_entropy,
        "connection_movement": connection_movement(each),
    }


def _progress_line(learners: Sequence[Learner]) -> str:
    shown = [f"{TITLES[each.kind]} {np.mean(each.losses[-10:]):.2f}" for each in learners]
    return f"step {len(learners[0].losses)}  " + "  ".join(shown)


@contextmanager
def _bar(progress: bool) -> Iterator[Callable[[float, str], None]]:
    columns = TextColumn("training"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda part, line: bar.update(task, completed=min(part, 1.0), description=line)
