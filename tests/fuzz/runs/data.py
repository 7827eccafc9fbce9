"""Runs whose data contradict themselves, written by somebody else's program: xarray, without `save_run`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import xarray as xr

from tests.fuzz.kinds import Mutator, NotApplicable, Subject
from tests.fuzz.runs.base_runs import choose

Edit = Callable[[dict[str, xr.Dataset], Random], None]
"""Changes datasets by path, as they are in the file: attributes are still encoded, a digest stays as it was."""


def _editing(edit: Edit) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        suffix = rng.choice((".nc", ".nc", ".zarr"))
        base = choose(rng, material, suffix)
        options: dict[str, Any] = (
            {"engine": "h5netcdf"} if suffix == ".nc" else {"engine": "zarr", "consolidated": False}
        )
        with xr.open_datatree(base, **options) as tree:
            nodes = {node.path: node.to_dataset(inherit=False).load() for node in tree.subtree}
        edit(nodes, rng)
        for dataset in nodes.values():
            for variable in dataset.variables.values():
                if suffix == ".zarr":
                    variable.encoding = {}
        path = folder / f"run{suffix}"
        made = xr.DataTree.from_dict(nodes)
        made.to_netcdf(path, engine="h5netcdf") if suffix == ".nc" else made.to_zarr(path, consolidated=False)
        return {"path": str(path), "base": base.name}

    return mutate


def _group(nodes: dict[str, xr.Dataset], rng: Random, having: str = "") -> str:
    found = [
        path for path, dataset in nodes.items() if dataset.variables and having in ("", *dataset.variables)
    ]
    if not found:
        raise NotApplicable
    return rng.choice(found)


def _variable(nodes: dict[str, xr.Dataset], rng: Random, kinds: str = "fiub") -> tuple[str, str]:
    path = _group(nodes, rng)
    names = [
        str(name)
        for name, variable in nodes[path].variables.items()
        if variable.dtype.kind in kinds and variable.size
    ]
    if not names:
        raise NotApplicable
    return path, rng.choice(names)


def _set(nodes: dict[str, xr.Dataset], path: str, name: str, dims: Any, values: Any) -> None:
    dataset = nodes[path]
    attrs = dataset.variables[name].attrs
    is_coordinate = name in dataset.coords
    dataset = dataset.drop_vars(name)
    dataset[name] = (dims, values, attrs)
    nodes[path] = dataset.set_coords(name) if is_coordinate else dataset


def changed_value(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    """One number is another, as a careless script or a liar makes it."""
    path, name = _variable(nodes, rng, "fi")
    variable = nodes[path].variables[name]
    values = variable.values.copy()
    place = rng.randrange(values.size)
    new = (
        rng.choice((0, -1, 1e30, float("nan"), float("inf"), -float("inf")))
        if values.dtype.kind == "f"
        else rng.choice((-1, 99, 2**31))
    )
    values.flat[place] = new
    _set(nodes, path, name, variable.dims, values)


def scaled(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng, "f")
    variable = nodes[path].variables[name]
    _set(
        nodes,
        path,
        name,
        variable.dims,
        variable.values * variable.dtype.type(1.0000002 if rng.random() < 0.5 else -1),
    )


def all_of_one(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng, "f")
    variable = nodes[path].variables[name]
    _set(
        nodes,
        path,
        name,
        variable.dims,
        np.full_like(
            variable.values, rng.choice((0, np.nan, np.inf, -1e300 if variable.dtype == "f8" else -1e30))
        ),
    )


def other_dtype(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng)
    variable = nodes[path].variables[name]
    with np.errstate(all="ignore"):
        values = variable.values.astype(rng.choice(("f4", "f8", "i4", "i8", "u1", "b1", "U5")))
    _set(nodes, path, name, variable.dims, values.astype(object) if values.dtype.kind == "U" else values)


def reordered(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    """The depths, steps, tokens or layers in another order."""
    path = _group(nodes, rng)
    dims = [dim for dim, size in nodes[path].sizes.items() if size > 1]
    if not dims:
        raise NotApplicable
    dim = rng.choice(dims)
    order = list(range(nodes[path].sizes[dim]))
    rng.shuffle(order)
    nodes[path] = nodes[path].isel({dim: order})


def duplicate_labels(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = _group(nodes, rng)
    dims = [str(dim) for dim in nodes[path].dims if dim in nodes[path].coords]
    if not dims:
        raise NotApplicable
    dim = rng.choice(dims)
    values = nodes[path].coords[dim].values.copy()
    values[:] = values[0]
    nodes[path] = nodes[path].assign_coords({dim: (dim, values, nodes[path].coords[dim].attrs)})


def doubled(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = _group(nodes, rng)
    dim = rng.choice([str(dim) for dim in nodes[path].dims])
    size = nodes[path].sizes[dim]
    nodes[path] = nodes[path].isel({dim: [*range(size), *range(size)]})


def shortened(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = _group(nodes, rng)
    dim = rng.choice([str(dim) for dim in nodes[path].dims])
    nodes[path] = nodes[path].isel({dim: slice(0, rng.choice((0, 1)))})


def other_dims(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng)
    variable = nodes[path].variables[name]
    if not variable.ndim or name in nodes[path].dims:
        raise NotApplicable
    dims = list(variable.dims)
    dims[rng.randrange(len(dims))] = "elsewhere"
    _set(nodes, path, name, dims, variable.values)


def transposed(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng)
    variable = nodes[path].variables[name]
    if variable.ndim < 2:
        raise NotApplicable
    _set(nodes, path, name, variable.dims[::-1], variable.values.T)


def scalar(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng)
    if name in nodes[path].dims:
        raise NotApplicable
    _set(nodes, path, name, (), nodes[path].variables[name].values.ravel()[0])


def missing_variable(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng, "fiubO")
    nodes[path] = nodes[path].drop_vars(name)


def extra_variable(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = _group(nodes, rng)
    name = rng.choice(
        ("extra", "residual2", "gradient", "h_res", "a b", "depth_out", "singular_value", "loss")
    )
    nodes[path] = nodes[path].assign({name: ("other", np.arange(3.0))})


def metric_of_other_shape(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    """A stored metric with a name that is known, on dims that it never has."""
    if "/metrics" not in nodes:
        # As if an analysis had been stored: the names are those that `check` looks for.
        nodes["/metrics"] = xr.Dataset(coords={"step": [0]}, attrs={"complete": "json:true"})
    names = [str(name) for name in nodes["/metrics"].data_vars] or [
        "rms",
        "effective_rank",
        "adjacent_cka",
        "stream_cosine",
    ]
    name = rng.choice(names)
    dataset = nodes["/metrics"].drop_vars(name, errors="ignore")
    made = rng.choice(
        (
            ((), 1.0),
            ("depth", np.ones(2)),
            (("step", "depth", "x"), np.ones((1, 2, 3))),
            ("step", np.array(["a"], object)),
            ("step", np.array([True])),
            ("nothing", np.zeros(0)),
            (("depth", "step"), np.ones((2, 1))),
            ("step", np.array([1 + 2j])),
        )
    )
    dims = (made[0],) if isinstance(made[0], str) else made[0]
    if (
        any(dataset.sizes.get(dim, size) != size for dim, size in zip(dims, np.shape(made[1]), strict=True))
        or np.asarray(made[1]).dtype.kind == "c"
    ):
        made = ((), 1.0)
    nodes["/metrics"] = dataset.assign({name: made})


def only_metrics(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    for path in [path for path in nodes if path not in ("/", "/metrics")]:
        del nodes[path]


def negative_counts(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    names = (
        "token_count",
        "streamed_count",
        "weight_count",
        "connection_layer",
        "depth_in",
        "depth_out",
        "layer",
        "connection",
        "depth",
        "sample",
    )
    name = rng.choice(names)
    path = _group(nodes, rng, having=name)
    variable = nodes[path].variables[name]
    value = rng.choice((-1, 0, 10**9, -(2**62)))
    _set(
        nodes, path, name, variable.dims, np.full(variable.shape, value, variable.dtype)
    ) if name not in nodes[path].dims else nodes.update(
        {path: nodes[path].assign_coords({name: (name, np.full(variable.shape, value, variable.dtype))})}
    )


def odd_text(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng, "O")
    variable = nodes[path].variables[name]
    values = variable.values.copy()
    values[rng.randrange(len(values))] = rng.choice(
        (
            "",
            "x" * 10**5,
            "embed",
            "\u202e",
            "a\nb",
            "<script>",
            "../..",
            "{{7*7}}",
            "\\input{x}",
            "$x$",
            "\x1b[31m",
        )
    )
    if name in nodes[path].dims:
        nodes[path] = nodes[path].assign_coords({name: (name, values)})
    else:
        _set(nodes, path, name, variable.dims, values)


ATTRIBUTES: tuple[Any, ...] = (
    "json:" + "[" * 900 + "]" * 900,
    "json:" + "[" * 10**5,
    'json:{"a": NaN}',
    "json:Infinity",
    "json:" + "1" * 5000,
    "json:",
    "json:tru",
    2**62,
    -1,
    float("nan"),
    float("inf"),
    "",
    "x" * 10**5,
    "<script>alert(1)</script>",
    "\x1b[2J",
    "a\nb\nc",
    "json:null",
    "json:[1, [2, {}]]",
    "json:true",
    'json:{"rms": 5}',
    "json:[1,2,3]",
    0,
    1.5,
    'json:"\\ud800"',
)


def odd_root_attribute(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    key = rng.choice(
        [*map(str, nodes["/"].attrs), "integrity", "digest", "checkpoint", "loss", "not_computed"]
    )
    nodes["/"] = nodes["/"].assign_attrs({key: rng.choice(ATTRIBUTES)})


def odd_group_attribute(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = _group(nodes, rng)
    key = rng.choice(
        [
            *map(str, nodes[path].attrs),
            "complete",
            "not_computed",
            "on_request",
            "references",
            "window",
            "new",
        ]
    )
    nodes[path] = nodes[path].assign_attrs({key: rng.choice(ATTRIBUTES)})


def odd_variable_attribute(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng, "fiubO")
    attrs = nodes[path].variables[name].attrs
    key = rng.choice(
        [*map(str, attrs), "decay", "sinkhorn_steps", "unit", "reference", "family", "new", "long_name"]
    )
    attrs[key] = rng.choice(ATTRIBUTES)


def missing_attribute(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = rng.choice([path for path in nodes if nodes[path].attrs])
    attrs = dict(nodes[path].attrs)
    del attrs[rng.choice(list(attrs))]
    nodes[path] = nodes[path].copy()
    nodes[path].attrs = attrs


def renamed_group(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path = rng.choice([path for path in nodes if path != "/"])
    nodes[
        rng.choice(("/x", "/trace/encoder", "/metrics", "/trace/a b", "/statistics/decoder", "/coverage"))
    ] = nodes.pop(path)


def renamed_variable(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    path, name = _variable(nodes, rng, "fiubO")
    target = rng.choice(("x", "residual", "mask", "gradient", "depth2", "layer"))
    if target in nodes[path].variables or target in nodes[path].dims:
        raise NotApplicable
    nodes[path] = nodes[path].rename({name: target})


def of_two_runs(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    """A group of one run with those of another: each is whole, together they are a lie."""
    from tests.models.synthetic_run import synthetic_run

    other = synthetic_run(
        rng.choice(("residual", "hc", "mhc")), layers=3, samples=1, tokens=4, features=4, seed=1
    )
    nodes[rng.choice(("/trace", "/statistics"))] = other[rng.choice(("trace", "statistics"))].to_dataset()


EDITS: tuple[Edit, ...] = (
    changed_value,
    scaled,
    all_of_one,
    other_dtype,
    reordered,
    duplicate_labels,
    doubled,
    shortened,
    other_dims,
    transposed,
    scalar,
    missing_variable,
    extra_variable,
    metric_of_other_shape,
    only_metrics,
    negative_counts,
    odd_text,
    odd_root_attribute,
    odd_group_attribute,
    odd_variable_attribute,
    missing_attribute,
    renamed_group,
    renamed_variable,
    of_two_runs,
)


def several(nodes: dict[str, xr.Dataset], rng: Random) -> None:
    """Two or three at once."""
    for edit in rng.sample(EDITS, rng.randint(2, 3)):
        edit(nodes, rng)


def special_path(rng: Random, material: Path, folder: Path) -> Subject:
    """The path of the run is a FIFO, a device, a folder, a sparse file, or has an odd name."""
    path = folder / "run.nc"
    kind = rng.choice(("fifo", "zero", "folder", "sparse", "loop", "name", "link"))
    base = choose(rng, material, ".nc")
    subject: Subject = {"path": str(path), "base": base.name, "refuse": kind}
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.write(b"\x89HDF\r\n\x1a\n" if rng.random() < 0.5 else b"CDF\x01")
            file.truncate(2**38)
    elif kind in ("zero", "loop"):
        path.symlink_to("/dev/zero" if kind == "zero" else path.name)
    else:
        name = rng.choice(("a b.nc", "é\u202e.nc", "-x.nc", "x\n.nc", "$(touch canary).nc", "%s.nc"))
        path = folder / name
        path.symlink_to(base) if kind == "link" else path.write_bytes(base.read_bytes())
        subject = {"path": str(path), "base": base.name}
    return subject


MUTATORS: dict[str, Mutator] = {
    **{f"data:{edit.__name__}": _editing(edit) for edit in (*EDITS, several)},
    "path:special": special_path,
}
