"""The contract of a run: variables, dimensions, versions; create, validate, save, open."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

SCHEMA_VERSION = "1.1"
GROUPS = ("trace", "statistics", "metrics", "coverage")
SITES = ("embed", "pre", "mid", "post", "final")
SUFFIXES = (".nc", ".zarr", ".zarr.zip")

WITHOUT_GRADIENT = "without_gradient"
"""Attribute of gradients: the depths that none reached, as below frozen weights; NaN there is no failure."""

NOT_FINITE = "not_finite_tokens"
"""Attribute of a metric: how many tokens hold NaN or infinities, by depth or connection."""

STATE = ("depth", "sample", "token", "stream", "feature")
ROUTE = ("connection", "sample", "token")
PROFILE = ("step", "depth", "stream")
GAIN = ("step", "direction", "connection")
MOTION = ("step", "weight")
SPECTRUM = ("centering", "depth", "component")
STREAM_SPECTRUM = ("centering", "depth", "stream", "component")


class SchemaError(ValueError):
    """A file or tree is not a run that this version can read."""


@dataclass(frozen=True)
class Variable:
    """One declared variable of a run.

    Parameters
    ----------
    dims : tuple of str
        Its dimensions, in order.
    kind : str
        Allowed numpy dtype kinds: ``"f"`` floating, ``"i"`` integer, ``"b"`` boolean, ``"O"`` text.
    meaning : str
        One line for people.
    """

    dims: tuple[str, ...]
    kind: str
    meaning: str


TRACE: dict[str, Variable] = {
    "residual": Variable(STATE, "f", "residual state of each stream"),
    "gradient": Variable(STATE, "f", "gradient of the loss with respect to the residual state"),
    "h_res": Variable(
        (*ROUTE, "stream_out", "stream_in"), "f", "stream mixing matrix, rows are destinations"
    ),
    "h_res_returned": Variable(
        (*ROUTE, "stream_out", "stream_in"),
        "f",
        "h_res as its module gives it, where the model rounds it to apply it",
    ),
    "initial_logits": Variable(
        ("connection", "stream_out", "stream_in"),
        "f",
        "static logits of h_res before training, rows are destinations",
    ),
    "h_pre": Variable((*ROUTE, "stream"), "f", "weights that read the branch input from the streams"),
    "h_post": Variable((*ROUTE, "stream"), "f", "weights that write the branch output to the streams"),
    "branch_in": Variable((*ROUTE, "feature"), "f", "input of the branch"),
    "branch_out": Variable((*ROUTE, "feature"), "f", "output of the branch"),
    "read": Variable(
        (*ROUTE, "view_in", "stream"), "f", "read weights of several branch inputs, in place of h_pre"
    ),
    "write": Variable(
        (*ROUTE, "stream", "view_out"), "f", "write weights of several branch outputs, in place of h_post"
    ),
    "views_in": Variable((*ROUTE, "view_in", "feature"), "f", "several branch inputs, in place of branch_in"),
    "views_out": Variable(
        (*ROUTE, "view_out", "feature"), "f", "several branch outputs, in place of branch_out"
    ),
    "final": Variable(
        ("sample", "token", "feature"), "f", "state behind the last norm, which the head reads"
    ),
    "final_gradient": Variable(("sample", "token", "feature"), "f", "gradient with respect to that state"),
    "mask": Variable(("sample", "token"), "b", "true where the token is real, false on padding"),
    "token_text": Variable(("sample", "token"), "OTU", "the token as text"),
}

TRACE_COORDS: dict[str, Variable] = {
    "layer": Variable(("depth",), "iu", "block number, -1 for the embedding"),
    "site": Variable(
        ("depth",), "OTU", "embed, mid (in a block), post (behind it), pre (changed before the next)"
    ),
    "module": Variable(("depth",), "OTU", "module path that produced the state"),
    "phase": Variable(("sample",), "OTU", "prefill, or decode where a cache already held tokens"),
    "connection_layer": Variable(("connection",), "iu", "block number of the connection"),
    "branch": Variable(("connection",), "OTU", "attn, mlp or block"),
    "connection_module": Variable(("connection",), "OTU", "module path of the connection"),
    "depth_in": Variable(("connection",), "iu", "depth index that the connection reads"),
    "depth_out": Variable(("connection",), "iu", "depth index that the connection writes"),
}

STATISTICS: dict[str, Variable] = {
    "token_count": Variable(("step",), "fiu", "real tokens seen in the step"),
    "sequence_count": Variable(("step",), "fiu", "sequences seen in the step"),
    "loss": Variable(("step",), "f", "the user's loss, where known"),
    "loss_scale": Variable(("step",), "f", "what a gradient scaler multiplied the loss by"),
    "norm_sum": Variable(PROFILE, "f", "Σ ‖x‖ over tokens"),
    "square_norm_sum": Variable(PROFILE, "f", "Σ ‖x‖² over tokens"),
    "norm_max": Variable(PROFILE, "f", "max ‖x‖ over tokens"),
    "abs_max": Variable(PROFILE, "f", "max |x| over tokens and features"),
    "unit_pair_sum": Variable(PROFILE, "f", "‖Σ x/‖x‖‖² − count: the sum of all off-diagonal cosines"),
    "adjacent_cosine_sum": Variable(PROFILE, "f", "Σ cos(x_depth, x_depth−1) over tokens"),
    "gradient_square_norm_sum": Variable(PROFILE, "f", "Σ ‖∂loss/∂x‖² over tokens"),
    "gain_sum": Variable(GAIN, "f", "Σ over tokens of the Amax gain of H_res"),
    "gain_max": Variable(GAIN, "f", "max over tokens of the Amax gain of H_res"),
    "weight_square_norm": Variable(MOTION, "f", "‖W‖² of the parameters that a module owns"),
    "weight_gradient_square_norm": Variable(MOTION, "f", "‖∂loss/∂W‖²"),
    "weight_update_square_norm": Variable(MOTION, "f", "‖ΔW‖² of one step of the optimiser"),
    "weight_count": Variable(("weight",), "fiu", "number of elements of W"),
    "weight_layer": Variable(("weight",), "iu", "block number of the module, -1 outside the blocks"),
    "feature_sum": Variable(("depth", "stream", "feature"), "f", "Σ x, since the weights last changed"),
    "unit_sum": Variable(("depth", "stream", "feature"), "f", "Σ x/‖x‖, since the weights last changed"),
    "streamed_count": Variable(("depth",), "f", "real tokens behind what is streamed"),
    "eigenvalue": Variable(
        SPECTRUM, "f", "eigenvalues of Σ x xᵀ, x the mean over streams, since the weights last changed"
    ),
    "eigenvalue_shaken": Variable(
        SPECTRUM, "f", "the same where the sums were moved by what float32 rounds: how well they are known"
    ),
    "stream_eigenvalue": Variable(
        STREAM_SPECTRUM, "f", "eigenvalues of Σ x xᵀ, x one stream; NaN where left out"
    ),
    "stream_eigenvalue_shaken": Variable(STREAM_SPECTRUM, "f", "the same, moved: how well they are known"),
    "sum_mean": Variable(
        ("depth", "view", "feature"), "f", "mean of the mean over streams, then of each stream"
    ),
    "sum_size": Variable(
        ("depth", "view", "feature"), "f", "√Σ (x − mean)² of each feature, 1 where it is 0"
    ),
    "sum_product": Variable(
        ("depth", "view", "pair"), "f", "Σ (x − mean)(x − mean)ᵀ over these, right of the diagonal"
    ),
    "sum_bucket": Variable(("depth", "bucket", "feature"), "f", "row sketch of x − mean, over the sizes"),
    "sum_sign": Variable(("bucket",), "f", "signed number of tokens in each bucket"),
    "sum_heavy": Variable(
        ("depth", "heavy", "feature"), "f", "heaviest tokens less the mean, over the sizes"
    ),
    "sum_index": Variable(("heavy",), "i", "their numbers, by sequence and position"),
    "sum_score": Variable(("heavy",), "f", "how heavy they are, in mean lengths; negative for none"),
    "hsic": Variable(
        ("depth", "other_depth"), "f", "unbiased HSIC₁, each depth in units of its mean square deviation"
    ),
    "hsic_without": Variable(
        ("group", "depth", "other_depth"), "f", "the same without one group of the sketch's buckets"
    ),
}

# The statistics that are metrics but for a root, module by module.
OF_WEIGHTS = tuple(name for name, variable in STATISTICS.items() if variable.dims == MOTION)
# Those that are of every token since the weights last changed, where they are streamed.
OF_STREAMING = (
    *("streamed_count", "eigenvalue", "eigenvalue_shaken", "stream_eigenvalue", "stream_eigenvalue_shaken"),
    *("hsic", "hsic_without"),
)

COVERAGE: dict[str, Variable] = {
    "place_name": Variable(("place",), "OTU", "the site's common name"),
    "site": Variable(("place",), "OTU", "what kind of site it is"),
    "module": Variable(("place",), "OTU", "the module that shows it"),
    "layer": Variable(("place",), "iu", "block number, -1 for none"),
    "chain": Variable(("place",), "OTU", "its chain, empty where there is one"),
    "expected": Variable(("place",), "iu", "forwards in which it was expected"),
    "fired": Variable(("place",), "iu", "forwards in which it was seen"),
    "why": Variable(("place",), "OTU", "why it was not captured, or how it was had"),
}

_REQUIRED = {"trace": ("residual", "mask"), "statistics": ("token_count",), "metrics": (), "coverage": ()}
_DECLARED: dict[str, dict[str, Variable]] = {
    "trace": TRACE | TRACE_COORDS,
    "statistics": STATISTICS,
    "coverage": COVERAGE,
}

Parts = xr.Dataset | Mapping[str, xr.Dataset] | None


def create_run(
    trace: Parts = None,
    *,
    statistics: Parts = None,
    metrics: Parts = None,
    coverage: xr.Dataset | None = None,
    attrs: Mapping[str, Any],
) -> xr.DataTree:
    """Put datasets together to a validated run.

    Parameters
    ----------
    trace, statistics, metrics : Dataset or mapping of chain name to Dataset, optional
        The groups; a mapping makes one child group per chain.
    coverage : Dataset, optional
        Which sites fired.
    attrs : mapping
        Attributes of the run; ``schema_version`` and ``created`` are added.

    Returns
    -------
    DataTree

    Raises
    ------
    SchemaError
        Where a group breaks the contract.
    """
    nodes: dict[str, xr.Dataset] = {}
    for group, part in zip(GROUPS, (trace, statistics, metrics, coverage), strict=True):
        if part is None:
            continue
        chained = {"": part} if isinstance(part, xr.Dataset) else part
        nodes |= {f"/{group}/{chain}".rstrip("/"): dataset for chain, dataset in chained.items()}
    stamped = {"schema_version": SCHEMA_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    run = xr.DataTree.from_dict({"/": xr.Dataset(attrs=stamped | dict(attrs)), **nodes})
    validate(run)
    return run


def chains(run: xr.DataTree) -> list[str]:
    """Names of the residual chains of a run; ``[""]`` where there is one.

    Parameters
    ----------
    run : DataTree
        A run.

    Returns
    -------
    list of str
    """
    for group in GROUPS:
        if group in run.children and run[group].children:
            return list(run[group].children)
    return [""]


def chain_dataset(run: xr.DataTree, group: str, chain: str = "") -> xr.Dataset | None:
    """The dataset of one group and chain, or None where the run does not hold it.

    Parameters
    ----------
    run : DataTree
        A run.
    group : str
        ``"trace"``, ``"statistics"`` or ``"metrics"``.
    chain : str
        A name of `chains`.

    Returns
    -------
    Dataset or None
    """
    path = f"{group}/{chain}".rstrip("/")
    if group not in run.children or (chain and chain not in run[group].children):
        return None
    dataset = run[path].to_dataset()
    return dataset if dataset.variables else None


def validate(run: xr.DataTree) -> None:
    """Check a run against the contract.

    Parameters
    ----------
    run : DataTree
        A tree that claims to be a run.

    Raises
    ------
    SchemaError
        For a foreign tree, a newer version, or a variable with the wrong dimensions or type.
    """
    check_version(run.attrs)
    for name in run.children:
        if name not in GROUPS:
            raise SchemaError(f"unknown group /{name}; expected some of {', '.join('/' + g for g in GROUPS)}")
    for group in GROUPS:
        for chain in chains(run):
            dataset = chain_dataset(run, group, chain)
            if dataset is not None:
                _validate_group(dataset, group, f"/{group}/{chain}".rstrip("/"))


def check_version(attrs: Mapping[Any, Any]) -> None:
    """Refuse a tree without a version, or with a newer major version than this one.

    Parameters
    ----------
    attrs : mapping
        The root's attributes.

    Raises
    ------
    SchemaError
        With what came, what was expected and what to do.
    """
    version = attrs.get("schema_version")
    if version is None:
        raise SchemaError(
            "not a depthscope run: the attribute schema_version is missing; "
            "make one with probes.capture(...) and diagnostics.save_run(...)"
        )
    try:
        major = int(str(version).split(".")[0])
    except ValueError:
        raise SchemaError(
            f"schema_version {version!r} is not a version; expected such as {SCHEMA_VERSION}"
        ) from None
    if major > int(SCHEMA_VERSION.split(".")[0]):
        raise SchemaError(
            f"the run has schema version {version}, this depthscope reads up to {SCHEMA_VERSION}; "
            "upgrade with: pip install --upgrade depthscope"
        )


def _validate_group(dataset: xr.Dataset, group: str, path: str) -> None:
    for required in _REQUIRED[group]:
        if required not in dataset:
            raise SchemaError(
                f"{path} has no variable {required!r}; it holds {sorted(map(str, dataset.variables))}"
            )
    for name, declared in _DECLARED.get(group, {}).items():
        if name in dataset.variables:
            _validate_variable(dataset.variables[name], declared, f"{path}/{name}")
    if group == "trace":
        _validate_trace(dataset, path)


def _validate_variable(variable: xr.Variable, declared: Variable, path: str) -> None:
    if variable.dims != declared.dims:
        raise SchemaError(f"{path} has dims {variable.dims}, expected {declared.dims}")
    if variable.dtype.kind not in declared.kind:
        raise SchemaError(f"{path} has dtype {variable.dtype}, expected kind {declared.kind!r}")


def _validate_trace(trace: xr.Dataset, path: str) -> None:
    missing = [name for name in ("layer", "site", "module") if name not in trace.coords]
    if missing:
        raise SchemaError(f"{path} lacks the coordinates {missing} on depth")
    unknown = set(map(str, trace["site"].values)) - set(SITES)
    if unknown:
        raise SchemaError(f"{path} has sites {sorted(unknown)}, expected some of {SITES}")
    streams = trace.sizes["stream"]
    for side in ("stream_out", "stream_in"):
        if trace.sizes.get(side, streams) != streams:
            raise SchemaError(
                f"{path}/h_res has {trace.sizes[side]} along {side}, but the run has {streams} streams"
            )
    if "initial_logits" in trace:
        _validate_replay(trace["initial_logits"].attrs, path)
    if "connection" in trace.dims and "depth_out" in trace.coords and _has_every_depth(trace):
        furthest = int(trace["depth_out"].max())
        if furthest >= trace.sizes["depth"]:
            raise SchemaError(
                f"{path}: a connection writes depth {furthest}, the last depth is {trace.sizes['depth'] - 1}"
            )


def _validate_replay(how: Mapping[Any, Any], path: str) -> None:
    """What is needed to replay initial logits: what weight decay left of them, and how they become matrices."""
    try:
        decay, steps, floor = (float(how[name]) for name in ("decay", "sinkhorn_steps", "floor"))
    except (KeyError, TypeError, ValueError):
        decay = steps = floor = math.nan
    if not (0 < decay <= 1 and steps >= 1 and floor >= 0 and how.get("last") in ("row", "column")):
        told = ", ".join(f"{name} {how.get(name)!r}" for name in ("decay", "sinkhorn_steps", "last", "floor"))
        raise SchemaError(
            f"{path}/initial_logits has {told}; expected a "
            "decay in (0, 1], at least 1 step, 'row' or 'column', and a floor of 0 or more: see diagnostics.with_replay"
        )


def _has_every_depth(trace: xr.Dataset) -> bool:
    """Whether the depths begin with 0 and leave none out, as where no sites were selected."""
    depths = trace["depth"].values
    return (
        "site" in trace.coords
        and trace["site"].values[-1] == "post"
        and list(depths) == list(range(len(depths)))
    )


# --- files ---


def save_run(run: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a run to one file or store, replacing an earlier one only when the new one is whole.

    Parameters
    ----------
    run : DataTree
        A run.
    path : path-like
        Ends in ``.nc`` (netCDF-4), ``.zarr`` (folder) or ``.zarr.zip``.

    Returns
    -------
    Path
        Where it lies.

    Raises
    ------
    SchemaError
        Where the run breaks the contract or the ending is unknown.
    """
    target = Path(path)
    suffix = _suffix(target)
    validate(run)
    encoded = run.map_over_datasets(_encode_dataset)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        fresh = Path(folder) / target.name
        _write(encoded, fresh, suffix)
        _replace(fresh, target, Path(folder) / "old")
    return target


def open_run(path: str | os.PathLike[str]) -> xr.DataTree:
    """Open a saved run; arrays are read when they are used.

    Parameters
    ----------
    path : path-like
        A ``.nc`` file, a ``.zarr`` folder or a ``.zarr.zip`` file.

    Returns
    -------
    DataTree

    Raises
    ------
    FileNotFoundError
        Where nothing lies at the path.
    SchemaError
        For a torn, foreign or newer file.
    """
    source = Path(path)
    suffix = _suffix(source)
    if not source.exists():
        raise FileNotFoundError(
            f"no run at {source}; list the runs of a folder with: depthscope dashboard FOLDER"
        )
    try:
        tree = _read(source, suffix)
    except Exception as error:  # every backend has its own error for a torn file
        raise SchemaError(
            f"{source} cannot be read as {suffix}: {type(error).__name__}: {error}. "
            "It is torn or of another format; save the run again"
        ) from error
    try:
        run = tree.map_over_datasets(_decode_dataset)
        run.attrs = _decode_attrs(tree.attrs)
        validate(run)
    except SchemaError as error:
        tree.close()
        raise SchemaError(f"{source}: {error}") from None
    run.set_close(tree.close)
    return run


def list_runs(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Saved runs below a folder, by their path without the ending; a run's own path gives itself.

    Parameters
    ----------
    root : path-like
        A folder, or one run.

    Returns
    -------
    dict of str to Path
        In alphabetical order; links that leave the root are left out.
    """
    base = Path(root).resolve()
    if base.name.endswith(SUFFIXES):
        return {_stem(base.name): base} if base.exists() else {}
    found: dict[str, Path] = {}
    for entry in sorted(_walk(base)):
        if entry.resolve().is_relative_to(base):
            found[_stem(str(entry.relative_to(base)))] = entry
    return found


def _walk(folder: Path) -> Iterable[Path]:
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith("."):
            continue
        if entry.name.endswith(SUFFIXES):
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)


def _suffix(path: Path) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return suffix
    raise SchemaError(f"a run's name ends in {', '.join(SUFFIXES)}; got {path.name!r}")


def _stem(name: str) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name


def _write(run: xr.DataTree, path: Path, suffix: str) -> None:
    if suffix == ".nc":
        run.to_netcdf(path, engine="h5netcdf")
    elif suffix == ".zarr":
        run.to_zarr(path, consolidated=False)
    else:
        # a zip cannot be rewritten, and zarr writes its metadata twice
        folder = path.with_name("folder.zarr")
        run.to_zarr(folder, consolidated=False)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for entry in sorted(folder.rglob("*")):
                archive.write(entry, entry.relative_to(folder))
        shutil.rmtree(folder)


def _read(path: Path, suffix: str) -> xr.DataTree:
    if suffix == ".nc":
        return xr.open_datatree(path, engine="h5netcdf")
    if suffix == ".zarr":
        return xr.open_datatree(path, engine="zarr", consolidated=False)
    from zarr.storage import ZipStore

    store: Any = ZipStore(path, mode="r")  # xarray takes a store, though its annotation does not say so
    return xr.open_datatree(store, engine="zarr", consolidated=False)


def _replace(fresh: Path, target: Path, aside: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # a folder cannot be replaced in one call: the old one lies aside until the new one stands
        target.rename(aside)
        try:
            fresh.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside)
    else:
        os.replace(fresh, target)


# --- attributes: netCDF takes no None, bool or dict, so everything but text and numbers is JSON ---

_JSON = "json:"


def _encode_dataset(dataset: xr.Dataset) -> xr.Dataset:
    encoded = dataset.copy()
    encoded.attrs = _encode_attrs(dataset.attrs)
    for name, variable in encoded.variables.items():
        variable.attrs = _encode_attrs(dataset.variables[name].attrs)
        variable.encoding = {}
        if variable.dtype.kind in "UT":
            encoded[name] = (variable.dims, variable.values.astype(object), variable.attrs)
    return encoded


def _decode_dataset(dataset: xr.Dataset) -> xr.Dataset:
    decoded = dataset.copy()
    decoded.attrs = _decode_attrs(dataset.attrs)
    for name, variable in decoded.variables.items():
        variable.attrs = _decode_attrs(dataset.variables[name].attrs)
    return decoded


def _encode_attrs(attrs: Mapping[Hashable, Any]) -> dict[str, Any]:
    return {str(key): _encode_value(value) for key, value in attrs.items()}


def _encode_value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain or (isinstance(value, str) and value and not value.startswith(_JSON)):
        return value
    return _JSON + json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Path, tuple, set, frozenset)):
        return str(value) if isinstance(value, Path) else list(value)
    raise TypeError(
        f"an attribute holds {type(value).__name__}; expected text, numbers, lists and dicts of them"
    )


def _decode_attrs(attrs: Mapping[Hashable, Any]) -> dict[str, Any]:
    return {str(key): _decode_value(value) for key, value in attrs.items()}


def _decode_value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_JSON):
        return json.loads(value.removeprefix(_JSON))
    return value.item() if isinstance(value, np.generic) else value
