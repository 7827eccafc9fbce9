"""How are the demo's three models trained? Each on the same batches for the same number of steps, recorded as it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from depthscope import probes
from depthscope.app.demo import TITLES
from depthscope.app.demo.small_lm import Size, build
from depthscope.probes.checkpoints.text_batch import sample_text


@dataclass(frozen=True)
class Recipe:
    """How the models are trained; the same for each.

    The learning rate rises over the first tenth of the steps and falls to zero along a cosine. Rates, decay and clipping are
    heuristics of ours for decoders of this size.
    """

    steps: int = 1500
    batch: int = 8
    length: int = 64
    learning_rate: float = 3e-3
    warm_up: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    size: Size = field(default_factory=Size)
    record_every: int = 100


@cache
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Python's own documentation as bytes: the part to train on, and its last tenth, held out."""
    ids = torch.from_numpy(np.frombuffer(sample_text().encode(), dtype=np.uint8).astype(np.int64))
    # The end and not random windows: neighbouring windows of a text share words, and the loss would leak.
    border = len(ids) - len(ids) // 10
    return ids[:border], ids[border:]


def unigram_entropy() -> float:
    """The held-out loss, in nats per byte, of a model that knows nothing but how frequent each byte is."""
    counts = torch.bincount(corpus()[1]).double()
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * frequencies.log()).sum())


def draw_batch(ids: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows, one byte longer than the predictions made on them."""
    # The last start leaves room for length + 1 bytes: `high` itself is never drawn.
    starts = torch.randint(0, len(ids) - length, (batch, 1), generator=generator)
    return ids[starts + torch.arange(length + 1)]


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


def create_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in which only the matrices of the branches and the head decay.

    Embedding, norms and connections do not, as in other GPT-like models; so what moves the mixing matrices is the gradient
    alone.
    """
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decaying], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def train(
    model: nn.Module,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer | None = None,
    after_backward: Callable[[torch.Tensor], object] = lambda loss: None,
) -> list[float]:
    """Train a model in place.

    ``after_backward``: called with the loss before each step of the optimizer, such as a recorder's `step`.
    Returns: The loss of every step, nats per byte.
    """
    optimizer = optimizer or create_optimizer(model, recipe)
    # Its own generator: every model gets the same batches, and a caller's random numbers do not change.
    generator = torch.Generator().manual_seed(recipe.seed)
    losses = []
    for step in range(recipe.steps):
        batch = draw_batch(corpus()[0], recipe.batch, recipe.length, generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step / recipe.steps, recipe.warm_up)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        after_backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def held_out_loss(model: nn.Module, *, length: int = 128, windows: int = 64) -> float:
    """Mean loss on evenly spread windows of the held-out text, in nats per byte; the same ones for every model."""
    held_out = corpus()[1]
    starts = torch.linspace(0, len(held_out) - length - 1, windows).long().unsqueeze(1)
    batch = held_out[starts + torch.arange(length + 1)]
    with torch.inference_mode():
        # Eight windows at a time bound the memory of the logits.
        return float(np.mean([model(part, labels=part).loss.item() for part in batch.split(8)]))


def train_all(folder: Path, recipe: Recipe, *, force: bool = False) -> Iterator[str]:
    """Train the three models, recorded into ``folder/KIND-training``, and save each as ``folder/KIND.safetensors``.

    ``force``: replace what is there of an earlier training.
    Yields: A line after each model.
    """
    for kind in TITLES:
        model = build(kind, size=recipe.size, seed=recipe.seed)
        optimizer = create_optimizer(model, recipe)
        recorder = probes.record(
            model,
            every=recipe.record_every,
            metrics="live",
            store=folder / f"{kind}-training",
            force=force,
            gradients=True,
            optimizer=optimizer,
            loss_reduction="mean",
            attrs={"model": f"small LM, {TITLES[kind]}, while it learns", "seed": recipe.seed},
        )
        with single_threaded(), recorder:
            train(model, recipe, optimizer, recorder.step)
        # bfloat16: half of the bytes, and the loss changes in the fourth digit.
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
        model.load_state_dict(weights)
        facts = {
            "steps": recipe.steps,
            "seed": recipe.seed,
            "held_out_loss": round(held_out_loss(model), 4),
            "unigram_entropy": round(unigram_entropy(), 4),
        }
        save_file(weights, folder / f"{kind}.safetensors", metadata={"training": json.dumps(facts)})
        yield f"{TITLES[kind]}: {recipe.steps} steps, held-out loss {facts['held_out_loss']:.2f} nats per byte"


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for each operation of torch: the tensors are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
