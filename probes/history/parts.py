"""Where is what was measured of each checkpoint, until all are? One small run each, next to the history, to go on from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import TakenError

ENDING = ".checkpoints"
HISTORY_OPTIONS = "history_options"
"""Attribute of a part: how it was measured. One that was measured in another way is measured again."""

_PART = re.compile(r"step-(\d{15})\.nc")


def parts_folder(out: Path) -> Path:
    """The folder of the parts of a history."""
    folder = out.with_name(schema.without_suffix(out.name) + ENDING)
    foreign = (
        [child.name for child in folder.iterdir() if not _PART.fullmatch(child.name)]
        if folder.exists()
        else []
    )
    if foreign:
        raise TakenError(
            f"{folder} contains {foreign[0]}, which is no part of a history; move it away, or name another --out"
        )
    return folder


def part_path(folder: Path, step: int) -> Path:
    """The file of one checkpoint."""
    return folder / f"step-{step:015d}.nc"


def open_part(path: Path, options: Mapping[str, Any]) -> xr.DataTree | None:
    """What was measured of a checkpoint before, in memory; None where it is to be measured now.

    ``options``: how it has to have been measured.
    """
    if not path.exists():
        return None
    try:
        with schema.open_run(path) as opened:
            if opened.attrs.get(HISTORY_OPTIONS) != dict(options):
                return None
            return opened.load()
    except schema.SchemaError:  # torn, as by a full disk
        return None


def fingerprint(checkpoint: str) -> str:
    """Sizes and times of a checkpoint's files: whether it is still the one that was measured, without reading it."""
    place = Path(checkpoint)
    files = sorted(child for child in place.iterdir() if child.is_file()) if place.is_dir() else [place]
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return " ".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def without_trace(run: xr.DataTree) -> xr.DataTree:
    """A run without its sampled states."""
    nodes = {path: node for path, node in run.to_dict().items() if not path.startswith("/trace")}
    return xr.DataTree.from_dict({**nodes, "/": xr.Dataset(attrs=run.attrs)})
