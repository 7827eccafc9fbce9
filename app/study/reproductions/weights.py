"""Was a network of a study trained already? Its weights, saved with the settings that they came from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from depthscope.app.study.reproductions.measuring import fresh, run_steps
from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.errors import TakenError

# One entry: safetensors writes several in random order.
ENTRY = "depthscope study training"


def trained_once(
    settings: Mapping[str, Any], build: Callable[..., nn.Module], path: Path
) -> tuple[nn.Module, dict[str, float]]:
    """A cell's trained network: read from its file, or trained and written there.

    ``build``: takes a family, a size and a seed.
    Returns: With ``start_loss`` and ``train_seconds``, of the processor.
    Raises TakenError: Where a file of another origin, or of other settings, has the file's name.
    """
    learner = fresh(settings, build)
    if path.exists():
        facts = _facts_of(path, settings)
        learner.model.load_state_dict(load_file(path))
        return learner.model, facts
    started = time.process_time()
    run_steps(learner, settings)
    facts = {"start_loss": learner.losses[0], "train_seconds": time.process_time() - started}
    with replaced_file(path, check=partial(_facts_of, settings=settings)) as part:
        entry = json.dumps({"settings": dict(settings), "facts": facts}, sort_keys=True)
        save_file(learner.model.state_dict(), part, metadata={ENTRY: entry})
    return learner.model, facts


def _facts_of(path: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    try:
        with safe_open(path, framework="numpy") as file:
            entry = json.loads((file.metadata() or {})[ENTRY])
        if entry["settings"] != dict(settings):
            raise ValueError("it is of another network")
        return {name: float(value) for name, value in entry["facts"].items()}
    except Exception as error:  # safetensors has an error of its own for a file of another format
        raise TakenError(
            f"{path} exists and is not the weights that the study keeps of this network; move it away, or name another "
            "folder"
        ) from error
