"""Damaged bytes of every file of a run: the netCDF file, the zip, and the chunks and metadata of a zarr folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from tests.fuzz.kinds import Mutator, NotApplicable, Subject
from tests.fuzz.runs.base_runs import choose
from tests.fuzz.runs.damage import ALL, Damage


def copied(rng: Random, material: Path, folder: Path, suffix: str) -> tuple[Path, Subject]:
    """A copy of a random base run in the folder of the case, and the subject for it."""
    base = choose(rng, material, suffix)
    path = folder / f"run{suffix}"
    shutil.copytree(base, path) if base.is_dir() else shutil.copyfile(base, path)
    return path, {"path": str(path), "base": base.name}


def _of_file(suffix: str, damage: Damage) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        path, subject = copied(rng, material, folder, suffix)
        path.write_bytes(damage(bytearray(path.read_bytes()), rng))
        return subject

    return mutate


def _of_store(metadata: bool, damage: Damage) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        path, subject = copied(rng, material, folder, ".zarr")
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and (file.name == "zarr.json") == metadata
        ]
        file = rng.choice(files)
        if not file.stat().st_size:
            raise NotApplicable
        file.write_bytes(damage(bytearray(file.read_bytes()), rng))
        return subject

    return mutate


MUTATORS: dict[str, Mutator] = {
    **{f"nc:{damage.__name__}": _of_file(".nc", damage) for damage in ALL},
    **{f"zip:{damage.__name__}": _of_file(".zarr.zip", damage) for damage in ALL},
    **{f"zarr-chunk:{damage.__name__}": _of_store(False, damage) for damage in ALL},
    **{f"zarr-json:{damage.__name__}": _of_store(True, damage) for damage in ALL},
}
