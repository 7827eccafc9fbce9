"""Mutated checkpoints: configurations, headers, indexes, pickles, tokenizers and factories that nobody should trust."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from random import Random

from tests.fuzz.checkpoints.damage import BASES, MUTATORS
from tests.fuzz.checkpoints.damage import Mutator as Damage
from tests.fuzz.kinds import Kind, Mutator, NotApplicable, Subject
from tests.fuzz.outcomes import CLEAR, DIFFERENT, EQUAL, Answer, of_command


def prepare(folder: Path) -> None:
    """Write every whole checkpoint, with the command line that reads it."""
    for name, make in BASES.items():
        (folder / name).mkdir()
        (folder / f"{name}.json").write_text(json.dumps(make(folder / name)))


def warm_up(material: Path) -> None:
    """Import what reading a checkpoint imports."""
    import safetensors.torch
    import torch
    import transformers

    from depthscope import probes
    from depthscope.app.cli import main
    from depthscope.probes import checkpoints

    assert all((safetensors.torch, torch, transformers.LlamaForCausalLM, probes, main, checkpoints))


def _mutating(damages: list[Damage]) -> Mutator:
    """One mutator of all variants of a damage."""

    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        damage = rng.choice(damages)
        if not (material / damage.base).exists():
            raise NotApplicable
        shutil.copytree(material / damage.base, folder, dirs_exist_ok=True, symlinks=True)
        words = damage.damage(folder, rng) or json.loads((material / f"{damage.base}.json").read_text())
        return {"words": words, "folder": str(folder), "expect": damage.expect}

    return mutate


def open_doors(subject: Subject, material: Path, rng: Random) -> list[Answer]:
    """The answer of the command line, from within the folder of the case."""
    os.chdir(subject["folder"])
    sys.path.insert(0, subject["folder"])
    answer = of_command(subject["words"], accepted=EQUAL)
    if answer.outcome == EQUAL and subject["expect"] == "refused":
        return [Answer(answer.door, DIFFERENT, f"accepted what must be refused: {answer.message}")]
    if answer.outcome == CLEAR and subject["expect"] == "accepted":
        return [Answer(answer.door, DIFFERENT, f"refused a whole one: {answer.message}")]
    return [answer]


def _by_name() -> dict[str, Mutator]:
    groups: dict[str, list[Damage]] = {}
    for damage in MUTATORS:
        groups.setdefault(damage.name.partition("/")[0], []).append(damage)
    return {name: _mutating(damages) for name, damages in groups.items()}


CHECKPOINTS = Kind(
    name="checkpoints",
    mutators=_by_name(),
    prepare=prepare,
    warm_up=warm_up,
    doors=open_doors,
    command=lambda subject: f"cd {subject['folder']} && depthscope {' '.join(map(str, subject['words']))}"[
        :500
    ],
    mib=700,  # importing a family of models, and compiling its forward, are part of the case
)
