"""What does the connection alone change? Three small language models trained side by side, probed and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import nn

from depthscope import probes
from depthscope.app.study.corpus import Corpus, split_corpus
from depthscope.app.study.learner import Learner, connection_movement, create_learner, held_out_loss
from depthscope.app.study.recipe import Recipe
from depthscope.app.study.small_lm import CONNECTIONS, TITLES
from depthscope.app.study.training import single_threaded, train_side_by_side
from depthscope.diagnostics import schema
from depthscope.diagnostics.atomic_writes import replaced_file, require_replaceable_file
from depthscope.diagnostics.errors import InputError, StorageError, TakenError
from depthscope.probes.checkpoints.digests import file_digest
from depthscope.probes.checkpoints.load import LoadedModel
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text, token_texts
from depthscope.probes.training.recorder import Recorder


class StudyError(InputError):
    """A study that cannot be run as asked."""


def run_seeds(out: Path, *, seeds: int, seconds: float, **options: Any) -> dict[str, Path]:
    """Run the study with several seeds, one after the other: one run tells nothing about chance.

    ``out``: folder for the runs: ``residual-seed0.zarr`` and so on; of one seed ``residual.zarr``, as `run_study` names it.
    ``seeds``: how many; the seeds are 0, 1, ….
    ``seconds``: training time of each seed's three models together.
    Returns: The saved runs by name, seed by seed.
    """
    if seeds == 1:
        return run_study(out, seconds=seconds, **options)
    saved: dict[str, Path] = {}
    for seed in range(seeds):
        saved |= run_study(out, seconds=seconds, seed=seed, suffix=f"-seed{seed}", **options)
    return saved


def run_study(
    out: Path,
    *,
    seconds: float = 60.0,
    seed: int = 0,
    suffix: str = "",
    progress: bool = True,
    recipe: Recipe | None = None,
) -> dict[str, Path]:
    """Train a residual, an HC and an mHC model side by side, probe each, save runs and weights.

    ``out``: folder for ``residual.zarr``, ``hc.zarr``, ``mhc.zarr``, their weights, and ``residual-training`` and so on,
    where each training is recorded while it runs; those of an earlier study are replaced.
    ``seconds``: training time of the three together; probing comes on top.
    ``seed``: of the weights and of the order of the data.
    ``suffix``: of the runs' names, so that several studies fit into one folder.
    ``progress``: show a bar with the three losses on stderr.
    ``recipe``: everything else; its own seconds and seed are replaced by the two above.
    Returns: The saved runs by name: the families residual, hc and mhc, with the suffix.
    Raises OSError: Where the folder cannot be written to; FileExistsError where a file of another origin has a name of
    the study's.
    """
    recipe = replace(recipe or Recipe(), seconds=seconds, seed=seed)
    # Not `<= 0`: of nan that is false, and neither nan nor inf is ever spent.
    if not 0 < recipe.seconds < math.inf or (recipe.steps is not None and recipe.steps < 1):
        raise StudyError(
            f"got {recipe.seconds:g} s and {recipe.steps} steps; expected finite numbers above 0"
        )
    corpus = split_corpus(sample_text())
    learners = [create_learner(kind, recipe) for kind in CONNECTIONS]
    # Before the training: minutes of it would be lost.
    for learner in learners:
        schema.require_replaceable(out / f"{learner.kind}{suffix}.zarr")
        weights = out / f"{learner.kind}{suffix}.safetensors"
        require_replaceable_file(weights, partial(require_weights_of, learner.model))

    with single_threaded():
        with ExitStack() as recorders:
            for learner in learners:
                store = out / f"{learner.kind}{suffix}-training"
                learner.recorder = recorders.enter_context(_recorder(learner, recipe, store))
            spent = train_side_by_side(learners, corpus, recipe, progress=progress)
        return {
            f"{each.kind}{suffix}": _save(each, corpus, recipe, out / f"{each.kind}{suffix}.zarr", spent)
            for each in learners
        }


def _recorder(learner: Learner, recipe: Recipe, store: Path) -> Recorder:
    """Writes what happens to the signal while the model learns, by step; an earlier training there is replaced."""
    return probes.record(
        learner.model,
        every=recipe.record_every,
        metrics="live",
        store=store,
        force=True,
        gradients=True,
        optimizer=learner.optimizer,
        loss_reduction="mean",
        attrs={"model": f"small LM, {TITLES[learner.kind]}, while it learns", "seed": recipe.seed},
    )


def _probe(learner: Learner, corpus: Corpus, recipe: Recipe, attrs: Mapping[str, Any]) -> xr.DataTree:
    """Measure a model on the same held-out windows every time."""
    loaded = LoadedModel(learner.model, None, TITLES[learner.kind], "", learner.kind)
    # A byte cut off at the border of the held-out text is replaced; the windows stay the same for every model.
    text = bytes(corpus.held_out.tolist()).decode(errors="replace")
    batch = encode_text(
        loaded, text, sequences=recipe.probed_sequences, length=recipe.probed_length, seed=recipe.seed
    )
    learner.model.eval()
    try:
        return probes.capture(
            learner.model,
            batch,
            gradients=True,
            token_text=token_texts(loaded, batch),
            max_sequences=recipe.probed_sequences,
            attrs=attrs,
        )
    finally:
        learner.model.train()


def _save(learner: Learner, corpus: Corpus, recipe: Recipe, path: Path, spent: float) -> Path:
    # The block ends with the weights in place, directly after the run that names their digest.
    check = partial(require_weights_of, learner.model)
    with replaced_file(path.with_suffix(".safetensors"), check=check) as weights:
        try:
            # The format "pt" is what transformers asks of a safetensors file.
            save_model(learner.model, str(weights), metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk too, which is no OSError there
            raise StorageError(
                f"{path.with_suffix('.safetensors')} cannot be written ({error}); make room, or name another folder"
            ) from error
        attrs = {
            "model": f"small LM, {TITLES[learner.kind]}",
            "seed": recipe.seed,
            "loss_reduction": "mean",
            "weights_digest": file_digest([weights]),
            "training": training_facts(learner, corpus, recipe, spent),
        }
        return schema.save_run(_probe(learner, corpus, recipe, attrs), path)


def require_weights_of(model: nn.Module, path: Path) -> None:
    """Refuse to replace a file that is not the weights of such a model.

    They are recognised by the names of the tensors: a mark in the header would change the digest of equal weights, since
    safetensors writes several entries of it in random order.

    ``model``: A model of the study; its sizes do not matter.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except Exception:  # safetensors has an error of its own for a file of another format
        names = set()
    if not names or not names <= set(model.state_dict()):
        raise TakenError(
            f"{path} exists and is not the weights of an earlier study; move it away, or name another folder"
        )


def training_facts(learner: Learner, corpus: Corpus, recipe: Recipe, spent: float) -> dict[str, Any]:
    """What a reader has to know about the training to judge the comparison."""
    steps = len(learner.losses)
    return {
        "corpus": "pydoc_data.topics, bytes; the last tenth held out",
        "steps": steps,
        "bytes": steps * recipe.batch * recipe.length,
        "seconds_side_by_side": round(spent, 1),
        "batch": recipe.batch,
        "length": recipe.length,
        "optimizer": "AdamW, betas 0.9 0.95, gradient norm clipped at " + format(recipe.clip, "g"),
        "weight_decay": recipe.weight_decay,
        "learning_rate": recipe.learning_rate,
        "schedule": "linear warm-up, cosine to zero, by "
        + ("the clock" if recipe.steps is None else "steps"),
        "initial_loss": learner.losses[0],
        # Ten batches: the loss of one is noisy.
        "final_loss": float(np.mean(learner.losses[-10:])),
        "held_out_loss": held_out_loss(learner.model, corpus),
        "unigram_entropy": corpus.unigram_entropy,
        "connection_movement": connection_movement(learner),
    }
