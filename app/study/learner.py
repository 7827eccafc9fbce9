"""What is trained? A model with its optimizer, its losses, and how far its connections have moved."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from depthscope.app.study.corpus import Corpus
from depthscope.app.study.recipe import Recipe
from depthscope.app.study.small_lm import build
from depthscope.probes.training.recorder import Recorder


@dataclass
class Learner:
    """One model in training."""

    kind: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    initial: dict[str, torch.Tensor]
    """The connections' parameters at step 0."""
    losses: list[float] = field(default_factory=list)
    """Training loss of every step, nats per byte."""
    recorder: Recorder | None = None
    """Measures the model while it learns."""


def create_learner(kind: str, recipe: Recipe, model: nn.Module | None = None) -> Learner:
    """A fresh model and its optimizer; only the branches' matrices and the head decay.

    ``model``: A model of another kind, in place of the one of that name.
    """
    model = model or build(kind, size=recipe.size, seed=recipe.seed)
    # Embedding, norms and connections do not decay, as in other GPT-like models; so what moves the mixing matrices is
    # the gradient alone.
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decaying], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decaying], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    initial = {name: value.clone() for name, value in connection_parameters(model).items()}
    return Learner(kind, model, optimizer, initial)


def train_step(learner: Learner, batch: torch.Tensor, learning_rate: float, clip: float) -> None:
    """One step of the optimizer; the loss is added to the learner's losses.

    ``clip``: largest norm of the gradient of all parameters.
    """
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate
    loss = learner.model(batch, labels=batch).loss
    learner.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(learner.model.parameters(), clip)
    if learner.recorder is not None:
        learner.recorder.step(loss)
    learner.optimizer.step()
    learner.losses.append(float(loss.detach()))


def held_out_loss(model: nn.Module, corpus: Corpus, *, length: int = 128, windows: int = 64) -> float:
    """Mean loss on evenly spread windows of the held-out text, in nats per byte.

    ``length, windows``: length and number of the windows: the same ones for every model.
    """
    # Fixed and not random windows: the three losses differ by the models alone.
    starts = torch.linspace(0, len(corpus.held_out) - length - 1, windows).long().unsqueeze(1)
    batch = corpus.held_out[starts + torch.arange(length + 1)]
    with torch.inference_mode():
        # Eight windows at a time bound the memory of the logits.
        return float(np.mean([model(part, labels=part).loss.item() for part in batch.split(8)]))


def connection_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that belong to the connections and not to the branches inside them.

    Returns: Detached, by name; empty for the residual model.
    """
    return {
        f"{prefix}.{name}": value.detach()
        for prefix, module in model.named_modules()
        # The package's connections have their sublayer as `branch`.
        if hasattr(module, "branch")
        for name, value in module.named_parameters()
        if not name.startswith("branch.")
    }


def connection_movement(learner: Learner) -> dict[str, float]:
    """How far the connections have moved from their initial values: rms change for each kind of parameter.

    Returns: Such as ``{"static_alpha": 0.08, …}``; a connection that never learns shows zeros.
    """
    squares: dict[str, list[torch.Tensor]] = {}
    for name, value in connection_parameters(learner.model).items():
        parts = name.split(".")
        # The last word names the kind, but "gamma" alone would not tell which norm it belongs to.
        kind = ".".join(parts[parts.index("norm") :]) if "norm" in parts else parts[-1]
        squares.setdefault(kind, []).append((value - learner.initial[name]).square().flatten())
    return {kind: float(torch.cat(values).mean().sqrt()) for kind, values in squares.items()}
