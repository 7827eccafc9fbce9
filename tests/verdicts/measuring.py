"""How does a planned network become a run and an analysis? A task, some training, one capture, the judged metrics."""

from __future__ import annotations

import math
from typing import Any

import torch
import xarray as xr
from torch import nn
from torch.nn import functional

from depthscope import diagnostics, probes
from depthscope.diagnostics.verdicts import judged_metrics
from tests.verdicts.networks import IMAGES, functional_loss
from tests.verdicts.plans import Plan


def generator(plan: Plan, purpose: int) -> torch.Generator:
    """Random numbers of a plan; training and capture draw different ones."""
    return torch.Generator().manual_seed(1000 * plan.seed + purpose)


def text(plan: Plan, sequences: int, length: int, purpose: int) -> torch.Tensor:
    """A language to learn: four of five tokens follow from the one before, and the rest is noise."""
    rng = generator(plan, purpose)
    following = torch.randperm(plan.vocabulary - 1, generator=generator(plan, 0)) + 1  # 0 is padding
    ids = torch.randint(1, plan.vocabulary, (sequences, length), generator=rng)
    known = torch.rand(sequences, length, generator=rng) < 0.8
    for place in range(1, length):
        ids[:, place] = torch.where(known[:, place], following[ids[:, place - 1] - 1], ids[:, place])
    return ids


def images(plan: Plan, count: int, purpose: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise around one of eight patterns, which is the label."""
    rng = generator(plan, purpose)
    patterns = torch.randn(8, 3, 16, 16, generator=generator(plan, 0))
    labels = torch.randint(8, (count,), generator=rng)
    return patterns[labels] + torch.randn(count, 3, 16, 16, generator=rng), labels


def batch_of(plan: Plan, purpose: int = 1) -> dict[str, torch.Tensor]:
    """What is captured: tokens, where some sequences may be padded."""
    ids = text(plan, plan.sequences, plan.length, purpose)
    if not plan.padded:
        return {"input_ids": ids}
    lengths = torch.randint(2, plan.length + 1, (plan.sequences,), generator=generator(plan, purpose))
    lengths[0] = plan.length  # the longest sequence says how long the batch is
    mask = (torch.arange(plan.length) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def loss_on(plan: Plan, model: nn.Module, purpose: int) -> torch.Tensor:
    """Loss on new data."""
    if plan.family in IMAGES:
        pictures, labels = images(plan, 16, purpose)
        return functional.cross_entropy(model(pictures), labels)
    ids = text(plan, 8, 16, purpose)
    return functional_loss(model(ids), ids, None)


def trained(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """The network after the plan's steps of AdamW on its task."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=plan.rate)
    for step in range(plan.steps):
        optimizer.zero_grad()
        loss_on(plan, model, 10 + step).backward()
        # As every recipe for such networks does; a few large first steps would be a fault of their own.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def measured_with(plan: Plan) -> tuple[Any, Any]:
    """The batch that is captured, and its loss."""
    if plan.family in IMAGES:
        pictures, labels = images(plan, plan.sequences, 1)
        return pictures, lambda output, _: functional.cross_entropy(output, labels)
    batch = batch_of(plan)
    return batch, lambda output, given: functional_loss(
        output, given["input_ids"], given.get("attention_mask")
    )


def captured(model: nn.Module, plan: Plan, **options: Any) -> xr.DataTree:
    """A run with gradients."""
    batch, loss = measured_with(plan)
    return probes.capture(model, batch, gradients=True, loss=loss, **options)


def settled(model: nn.Module, plan: Plan) -> xr.DataTree:
    """The same, and what `settle` tries, as the command ``probe`` does."""
    batch, loss = measured_with(plan)
    return probes.settle(captured(model, plan), model, batch, loss=loss)


@torch.no_grad()
def cost(healthy: nn.Module, spoilt: nn.Module, plan: Plan) -> float:
    """What a fault costs on new data, as a share of what the healthy network has learned; inf where it is not finite."""
    sizes = 8 if plan.family in IMAGES else plan.vocabulary
    losses = [
        [float(loss_on(plan, model, 5000 + batch)) for batch in range(4)] for model in (healthy, spoilt)
    ]
    before, after = (sum(each) / len(each) for each in losses)
    if not math.isfinite(after):
        return math.inf
    return (after - before) / max(math.log(sizes) - before, 0.1 * math.log(sizes))


def recorded(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer, steps: int = 2) -> xr.DataTree:
    """A run of some steps of training, with the weights' updates."""
    with probes.record(model, gradients=True, weights=True) as recorder:
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_on(plan, model, 100 + step)
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    return recorder.run


def analysed(run: xr.DataTree) -> xr.Dataset | xr.DataTree:
    return diagnostics.analyze(run, metrics=judged_metrics())
