"""What do a checkpoint's files alone tell of its stream connections? Their biases, gates, static mixing, and its products.

No model is built and no other tensor is read. The weights are those of an input that adds nothing to the learned biases.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.kernels import rank
from depthscope.probes.checkpoints.tensor_inventory import Inventory, read_values, take_inventory
from depthscope.probes.checkpoints.weight_files import CheckpointError
from depthscope.probes.static.families import FAMILIES, HEAD, Family, Found, Place, find_connections, place_of
from depthscope.probes.static.formulas import weigh
from depthscope.probes.static.page import page
from depthscope.probes.static.remarks import remarks

COLLAPSED = 0.01  # share of the differences between streams below which they count as one


@dataclass(frozen=True)
class Parameter:
    """A tensor of a connection, as its file tells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: bool


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest value of some parameters."""

    minimum: float
    mean: float
    maximum: float


@dataclass(frozen=True, eq=False)
class MatrixFacts:
    """A static mixing matrix in numbers; distances are Frobenius norms over √n."""

    singular_values: np.ndarray
    spectral_gap: float
    row_sums: np.ndarray
    column_sums: np.ndarray
    off_diagonal: float
    identity_distance: float
    uniform_distance: float


@dataclass(frozen=True, eq=False)
class StaticConnection:
    """A connection at an input that adds nothing; rows of ``h_res`` are destinations, None is not told."""

    module: str
    chain: str
    layer: int
    branch: str
    family: str
    style: str
    streams: int
    fractions: int
    width: int | None
    constrained: bool
    learns_mixing: bool
    parameters: tuple[Parameter, ...]
    biases: dict[str, Spread]
    gates: dict[str, float]
    h_res: np.ndarray | None
    h_pre: np.ndarray | None
    h_post: np.ndarray | None
    logits: np.ndarray | None
    mixing: MatrixFacts | None
    note: str


@dataclass(frozen=True, eq=False)
class StaticComposite:
    """The product of the static matrices of a chain, first to last."""

    chain: str
    connections: int
    streams: int
    forward_gain: float
    backward_gain: float
    singular_values: np.ndarray
    effective_rank: float
    effective_streams: float | None
    collapsed_after: int | None


@dataclass(frozen=True, eq=False)
class StaticDescription:
    """What the weight files tell of a checkpoint's stream connections; prints as a page."""

    checkpoint: str
    model_type: str
    num_tensors: int
    num_read: int
    num_files: int
    absent_files: tuple[str, ...]
    settings: dict[str, float]
    assumed: tuple[str, ...]
    connections: tuple[StaticConnection, ...]
    heads: tuple[StaticConnection, ...]
    composites: tuple[StaticComposite, ...]
    warnings: tuple[str, ...]
    looked_for: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return _plain(self)

    def __str__(self) -> str:
        return page(self)


def describe_weights(path: str | Path) -> StaticDescription:
    """Say what the weight files of a checkpoint tell of its stream connections, without building the model.

    Parameters
    ----------
    path : str or Path
        A transformers folder (``config.json``, and safetensors, sharded or not), one ``.safetensors`` file
        or an index. Shards that hold no connection may be absent.

    Returns
    -------
    StaticDescription
        Without connections where the checkpoint holds none.

    Raises
    ------
    CheckpointError
        If the checkpoint is absent, torn or no safetensors, or lacks a shard that holds a connection.
    """
    path = Path(path).expanduser()
    inventory = take_inventory(path)
    found = find_connections(inventory.tensors)
    _require_no_absent_connection(path, inventory, [one for _, one in found])
    config = _config(path if path.is_dir() else path.parent)
    settings, assumed = _settings([family for family, _ in found], config)
    values = read_values(tensor for _, one in found for tensor in one.roles.values())
    described = [_connection(family, one, values, settings, inventory) for family, one in found]
    connections = tuple(one for one in described if one.family != HEAD.name)
    composites = tuple(_composites(connections))
    return StaticDescription(
        checkpoint=str(path),
        model_type=str(config.get("model_type", "")),
        num_tensors=len(inventory.tensors) + len(inventory.absent),
        num_read=len(values),
        num_files=len(inventory.files),
        absent_files=tuple(sorted(set(inventory.absent.values()))),
        settings=settings,
        assumed=assumed,
        connections=connections,
        heads=tuple(one for one in described if one.family == HEAD.name),
        composites=composites,
        warnings=tuple(
            remarks(connections, composites, _told(config, "hc_mult", "hc_count", "altup_num_inputs"))
        ),
        looked_for=tuple(family.looked_for for family in FAMILIES),
    )


# --- what the files hold


def _require_no_absent_connection(path: Path, inventory: Inventory, found: Sequence[Found]) -> None:
    """A tensor named like a connection's, but for the numbers, must not lie in a shard that is not there."""
    if not inventory.absent:
        return
    kinds = {_kind(tensor.name) for one in found for tensor in (*one.roles.values(), *one.unread)}
    lacking = sorted({file for name, file in inventory.absent.items() if _kind(name) in kinds or not found})
    if not lacking:
        return
    listed = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
    what = "hold connections and are" if found else "may hold connections (none is in the others) and are"
    raise CheckpointError(f"'{path}': shards that {what} not there: {listed}; complete the download")


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"'{file}' is no JSON ({error}); copy or download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"'{file}' holds a {type(config).__name__}; expected a transformers configuration"
        )
    return config


def _told(config: Mapping[str, Any], *names: str) -> float | None:
    """The first of some numbers that the configuration or a part of it (``text_config``) holds."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    told = (part[name] for name in names for part in parts if name in part)
    return next((float(value) for value in told if isinstance(value, (int, float))), None)


def _settings(
    families: Sequence[Family], config: Mapping[str, Any]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the formulas need besides the tensors, and which of it is a default that the files do not tell."""
    defaults = {name: value for family in families for name, value in family.settings.items()}
    told = {name: value for name in defaults if (value := _told(config, name)) is not None}
    return defaults | told, tuple(name for name in defaults if name not in told)


# --- one connection


def _connection(
    family: Family,
    found: Found,
    values: Mapping[str, np.ndarray],
    settings: Mapping[str, float],
    inventory: Inventory,
) -> StaticConnection:
    by_role = {role: values[tensor.name] for role, tensor in found.roles.items()}
    weights = weigh(
        family.name, family.style, n=found.streams, f=found.fractions, values=by_role, settings=settings
    )
    place = _place(family, found, inventory)
    return StaticConnection(
        module=found.module,
        chain=place.chain,
        layer=place.layer,
        branch=place.branch,
        family=family.name,
        style=family.style,
        streams=found.streams,
        fractions=found.fractions,
        width=found.width,
        constrained=family.constrained,
        learns_mixing=family.learns_mixing,
        parameters=tuple(_parameters(found)),
        biases={part: _spread(bias) for part, bias in weights.biases.items()},
        gates=dict(weights.gates),
        h_res=weights.res,
        h_pre=weights.pre,
        h_post=weights.post,
        logits=weights.biases.get("res") if family.constrained else None,
        mixing=None if weights.res is None else _matrix_facts(weights.res),
        note=weights.note,
    )


def _place(family: Family, found: Found, inventory: Inventory) -> Place:
    place = place_of(found.module)
    if family is HEAD:
        return Place(place.chain, place.layer, HEAD.name)
    if place.branch != "block":
        return place
    wrapped = f"{found.module}.branch."
    inside = [name.removeprefix(wrapped) for name in inventory.tensors if name.startswith(wrapped)]
    return place_of(found.module, inside)


def _parameters(found: Found) -> list[Parameter]:
    read = list(found.roles.values())
    return [
        Parameter(tensor.name, tensor.shape, tensor.dtype, tensor in read)
        for tensor in sorted((*read, *found.unread), key=lambda tensor: tensor.name)
    ]


def _spread(values: np.ndarray) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


def _matrix_facts(h_res: np.ndarray) -> MatrixFacts:
    n = len(h_res)
    size = np.abs(h_res)
    return MatrixFacts(
        singular_values=kernel.singular_values(h_res),
        spectral_gap=float(kernel.spectral_gap(h_res)),
        row_sums=h_res.sum(axis=1),
        column_sums=h_res.sum(axis=0),
        off_diagonal=float(1.0 - np.trace(size) / size.sum()) if size.any() else math.nan,
        identity_distance=float(kernel.identity_distance(h_res)),
        uniform_distance=float(np.linalg.norm(h_res - 1.0 / n) / math.sqrt(n)),
    )


# --- all of them, one after the other


def _composites(connections: Sequence[StaticConnection]) -> list[StaticComposite]:
    """One product for each chain and number of streams in which every matrix is known.

    None for AltUp: there the branch output holds the active stream, so the products of H_res alone tell nothing.
    """
    chains: dict[tuple[str, int], list[StaticConnection]] = defaultdict(list)
    for connection in connections:
        chains[connection.chain, connection.streams * max(connection.fractions, 1)].append(connection)
    return [
        _composite(chain, members)
        for (chain, _), members in chains.items()
        if all(member.h_res is not None and member.family != "altup" for member in members)
    ]


def _composite(chain: str, members: Sequence[StaticConnection]) -> StaticComposite:
    h_res = np.stack([member.h_res for member in members if member.h_res is not None])
    product, log_scale = kernel.composite(h_res, return_log_scale=True)
    with np.errstate(over="ignore"):  # a gain beyond float64 is shown as infinite
        forward = np.exp(kernel.log_forward_gain(product, log_scale))
        backward = np.exp(kernel.log_backward_gain(product, log_scale))
        singular_values = kernel.singular_values(product) * np.exp(log_scale)
    return StaticComposite(
        chain=chain,
        connections=len(members),
        streams=h_res.shape[-1],
        forward_gain=float(forward),
        backward_gain=float(backward),
        singular_values=singular_values,
        effective_rank=float(rank.effective_rank_of(kernel.singular_values(product))),
        effective_streams=_effective_streams(h_res, members),
        collapsed_after=_collapsed_after(h_res) if all(member.constrained for member in members) else None,
    )


def _effective_streams(h_res: np.ndarray, members: Sequence[StaticConnection]) -> float | None:
    """At the narrowest cut between two connections; None where reads or writes are not told."""
    reads = [member.h_pre for member in members if member.h_pre is not None and member.h_pre.ndim == 1]
    writes = [member.h_post for member in members if member.h_post is not None and member.h_post.ndim == 1]
    if len(members) < 2 or len(reads) < len(members) or len(writes) < len(members):
        return None
    weights = kernel.depth_kernel(h_res, np.stack(reads), np.stack(writes))
    if not np.isfinite(weights).all():  # free matrices can amplify beyond float64
        return None
    cuts = kernel.effective_streams(weights)
    return None if np.isnan(cuts).all() else float(np.nanmin(cuts))


def _collapsed_after(h_res: np.ndarray) -> int | None:
    """The number of connections after which hardly anything of the differences between streams is left."""
    below = kernel.deflated_gain(h_res) < math.log(COLLAPSED)
    return int(np.argmax(below)) + 1 if below.any() else None


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
