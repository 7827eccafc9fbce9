"""Which runs are mutated? Small ones of every kind that the format has, saved in all three formats."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import analyze, schema
from tests.models.synthetic_run import synthetic_run

SMALL = {"layers": 2, "samples": 2, "tokens": 6, "features": 4}
STEMS = ("tiny", "mhc", "analysed", "chains", "captured")


def _tiny() -> xr.DataTree:
    return synthetic_run(
        "residual", layers=1, samples=1, tokens=4, features=4, gradients=False, weights=False
    )


def _analysed() -> xr.DataTree:
    run = synthetic_run("hc", **SMALL)
    attrs = {str(name): value for name, value in run.attrs.items()}
    parts = {name: run[name].to_dataset() for name in ("trace", "statistics")}
    return schema.create_run(**parts, metrics=analyze(run).assign_attrs(complete=True), attrs=attrs)


def _chains() -> xr.DataTree:
    trace = synthetic_run("residual", **SMALL)["trace"].to_dataset()
    chains = {"encoder": trace, "decoder": trace.isel(depth=slice(2))}
    return schema.create_run(
        chains, attrs={"family": "residual", "note": "", "flag": True, "nested": {"a": [1, None]}}
    )


def _captured() -> xr.DataTree:
    import torch

    from depthscope.probes import capture
    from tests.models.small_models import llama

    torch.manual_seed(0)
    model = llama()
    tokens = torch.randint(0, 50, (2, 8))
    return capture(model, {"input_ids": tokens, "labels": tokens}, streaming=True, gradients=True)


MAKERS: dict[str, Callable[[], xr.DataTree]] = {
    "tiny": _tiny,
    "mhc": lambda: synthetic_run("mhc", **SMALL),
    "analysed": _analysed,
    "chains": _chains,
    "captured": _captured,
}


def prepare(folder: Path, stems: Iterable[str] = STEMS) -> None:
    """Save runs in every format, with what opening each gives."""
    for stem in stems:
        run = MAKERS[stem]()
        for suffix in schema.SUFFIXES:
            path = schema.save_run(run, folder / f"{stem}{suffix}")
            with schema.open_run(path) as back:
                (folder / f"{stem}{suffix}.expected").write_bytes(pickle.dumps(contents(back.load())))


def choose(rng: Random, material: Path, suffix: str) -> Path:
    """One of the saved runs."""
    return rng.choice([path for stem in STEMS if (path := material / f"{stem}{suffix}").exists()])


def contents(run: xr.DataTree) -> dict[str, Any]:
    """Everything in a run by path: dims, type and values of variables, and attributes."""
    found: dict[str, Any] = {}
    for node in run.subtree:
        dataset = node.to_dataset(inherit=False)
        found[node.path] = dict(dataset.attrs)
        for name, variable in dataset.variables.items():
            kind = "coordinate" if name in dataset.coords else "variable"
            found[f"{node.path}:{name}"] = (
                kind,
                variable.dims,
                str(variable.dtype),
                variable.values,
                dict(variable.attrs),
            )
    return found


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Where two contents differ first; empty where they are equal, NaN to NaN."""
    if found.keys() != expected.keys():
        return f"paths: {sorted(found.keys() ^ expected.keys())[:5]}"
    for path, value in found.items():
        if not same(value, expected[path]):
            return f"{path}: {_differing(value, expected[path])}"[:300]
    return ""


def _differing(value: Any, other: Any) -> str:
    if isinstance(value, dict):
        keys = [key for key in value.keys() | other.keys() if key not in value or key not in other]
        keys += [key for key in value.keys() & other.keys() if not same(value[key], other[key])]
        return f"attributes {sorted(map(str, keys))[:3]}"
    parts = ("kind", "dims", "dtype", "values", "attributes")
    return ", ".join(part for part, a, b in zip(parts, value, other, strict=True) if not same(a, b))


def same(value: Any, other: Any) -> bool:
    """Equal in type and value, with NaN equal to NaN."""
    if type(value) is not type(other):
        return False
    if isinstance(value, np.ndarray):
        if value.shape != other.shape or value.dtype != other.dtype:
            return False
        if value.dtype.kind == "O":
            return all(same(a, b) for a, b in zip(value.ravel(), other.ravel(), strict=True))
        # Bytes and not numbers: -0 is not 0, and one NaN is the other only where it is the same NaN.
        return value.tobytes() == other.tobytes() or bool(
            np.array_equal(value, other, equal_nan=value.dtype.kind in "fc")
        )
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return value == other or (value != value and other != other)
