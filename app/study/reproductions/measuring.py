"""How is a cell measured? A fresh network, the same text for all, a short training, and one capture before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope import probes
from depthscope.app.study.corpus import Corpus, draw_batch, split_corpus
from depthscope.app.study.learner import Learner, create_learner, held_out_loss, train_step
from depthscope.app.study.recipe import Recipe, schedule
from depthscope.app.study.reproductions.networks import make
from depthscope.app.study.reproductions.plan import Along, MeasuredCell, RunNumber, profile, slice_of
from depthscope.app.study.small_lm import Size
from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.theory import overlay_laws
from depthscope.probes.checkpoints.text_batch import sample_text

# Held-out sequences that are measured, before and after the training, by every cell.
SEQUENCES = 4


@cache
def corpus() -> Corpus:
    """Python's documentation, which comes with Python, as bytes."""
    return split_corpus(sample_text())


def measured_batch(settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Evenly spread held-out sequences: the same ones for every cell of a length."""
    ids, length = corpus().held_out, settings["length"]
    starts = torch.linspace(0, len(ids) - length - 1, SEQUENCES).long()[:, None]
    batch = ids[starts + torch.arange(length)]
    return {"input_ids": batch, "labels": batch}


def train(
    settings: Mapping[str, Any],
    numbers: Sequence[RunNumber],
    curves: Sequence[Along],
    *,
    build: Callable[..., nn.Module] = make,
) -> tuple[nn.Module, MeasuredCell]:
    """Build a cell's network, measure it, train it on the text, and measure it again.

    ``settings``: of the cell: family, depth, seed, width, heads, streams, steps, batch, length.
    ``numbers``: each is stored as ``start_NAME`` and ``NAME``.
    ``build``: takes a family, a size and a seed.
    Returns: With ``loss`` (held-out, nats per byte), ``start_loss``, and bytes saved for the backward of each token.
    """
    learner = fresh(settings, build)
    model = learner.model
    numbers = [number for number in numbers if number.metric]
    curves = [curve for curve in curves if curve.metric]
    metrics = sorted({number.metric for number in numbers} | {curve.metric for curve in curves})
    # The first capture is for what the network does by itself; its gradients may all be zero.
    first, _ = analysed(model, settings, metrics)
    run_steps(learner, settings)
    model.eval()
    last, run = analysed(model, settings, metrics)
    memory = run.attrs.get("memory", {})
    found = {
        **{f"start_{number.name}": number.of(first) for number in numbers},
        **{number.name: number.of(last) for number in numbers},
        "start_loss": learner.losses[0],
        "loss": held_out_loss(model, corpus(), length=settings["length"]),
        "kept_bytes": memory.get("measured_kept_bytes", np.nan) / memory.get("measured_tokens", 1),
    }
    lines: dict[str, list[float]] = {}
    for curve in curves:
        analysis = first if curve.start else last
        lines[curve.name] = profile(analysis, curve.metric, curve.at).tolist()
        if curve.law and curve.metric in analysis:
            lines[f"{curve.name}_law"] = _law(curve, analysis)
    return model, MeasuredCell(found, lines, run)


def fresh(settings: Mapping[str, Any], build: Callable[..., nn.Module] = make) -> Learner:
    """A cell's network before its first step, with its optimizer.

    ``build``: takes a family, a size and a seed.
    """
    size = Size(settings["depth"], settings["width"], settings["heads"], settings["streams"])
    recipe = Recipe(steps=settings["steps"], seed=settings["seed"], size=size)
    return create_learner(settings["family"], recipe, build(settings["family"], size, settings["seed"]))


def run_steps(learner: Learner, settings: Mapping[str, Any]) -> None:
    """Train for the cell's steps, on batches that its seed draws."""
    recipe, generator = Recipe(), torch.Generator().manual_seed(settings["seed"])
    for step in range(settings["steps"]):
        batch = draw_batch(corpus().train, settings["batch"], settings["length"], generator)
        rate = recipe.learning_rate * schedule(step / settings["steps"], recipe.warm_up)
        train_step(learner, batch, rate, recipe.clip)


def analysed(
    model: nn.Module, settings: Mapping[str, Any], metrics: Sequence[str]
) -> tuple[xr.Dataset, xr.DataTree]:
    """The metrics of a network on the batch that every cell of its length is measured on, and its run with them."""
    attrs = {
        "model": f"small network, {settings['family']}, {settings['depth']} layers",
        "settings": dict(settings),
    }
    run = probes.capture(
        model,
        measured_batch(settings),
        gradients=True,
        max_sequences=SEQUENCES,
        attrs={
            **attrs,
            "loss_reduction": "mean",
            "seed": settings["seed"],
            "data": "pydoc_data.topics, bytes",
        },
    )
    analysis = analyze(run, metrics=metrics)
    assert isinstance(analysis, xr.Dataset)
    parts = {name: schema.chain_dataset(run, name) for name in ("trace", "statistics")}
    known = {str(name): value for name, value in run.attrs.items()}
    return analysis, schema.create_run(**parts, metrics=analysis, attrs=known)


def _law(curve: Along, analysis: xr.Dataset) -> list[float]:
    """The values of a law over a curve; empty where it does not hold, such as after training."""
    for overlay in overlay_laws(slice_of(analysis[curve.metric], curve.at).squeeze(), analysis):
        if overlay.law.name == curve.law and overlay.values is not None:
            return [float(value) for value in overlay.values.values.ravel()]
    return []
