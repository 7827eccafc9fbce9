"""What do a checkpoint's files alone show of its stream connections? Biases, gates, static mixing, and its products.

No model is built and no other tensor is read. The weights are those of an input that adds nothing to the learned biases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError, printable
from depthscope.probes.checkpoints.own_files import exists, given_path, own_file, read_json
from depthscope.probes.checkpoints.tensor_inventory import Inventory, read_values, take_inventory
from depthscope.probes.connections.weight_pattern import FoundTensors, WeightPattern
from depthscope.probes.static.facts import (
    Parameter,
    StaticComposite,
    StaticConnection,
    composites,
    matrix_facts,
    spread_of,
)
from depthscope.probes.static.page import page
from depthscope.probes.static.recognition import CONNECTIONS, Place, find_connections, place_of
from depthscope.probes.static.remarks import remarks

# Settings that give the number of streams, by model type; they only serve to warn where the shapes disagree.
STREAM_SETTINGS = ("hc_mult", "hc_count", "altup_num_inputs")
LARGEST_SETTING = 10_000  # a heuristic: public models have 20 rounds of Sinkhorn and magnitudes of a few


@dataclass(frozen=True, eq=False)
class StaticDescription:
    """What the weight files show of a checkpoint's stream connections; prints as a page."""

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
        return _plain_values(self)

    def __str__(self) -> str:
        return page(self)


def describe_weights(path: str | Path) -> StaticDescription:
    """Describe a checkpoint's stream connections from its weight files, without building the model.

    Parameters
    ----------
    path : str or Path
        A transformers folder (``config.json``, and safetensors, sharded or not), one ``.safetensors`` file
        or an index. Shards that contain no connection may be missing.

    Returns
    -------
    StaticDescription
        Without connections where the checkpoint contains none.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, torn or no safetensors, or lacks a shard that contains a connection.
    """
    path = given_path(path)
    inventory = take_inventory(path)
    found = find_connections(inventory.tensors)
    _require_no_absent_connection(path, inventory, [one for _, one in found])
    # A setting that config.json lacks gets the family's default, and the page lists it as assumed.
    config = _configuration(path if path.is_dir() else path.parent)
    defaults = {name: value for pattern, _ in found for name, value in pattern.settings.items()}
    settings = {name: _first_number(config, name) for name in defaults}
    known = {name: value for name, value in settings.items() if value is not None}
    values = read_values(tensor for _, one in found for tensor in one.roles.values())
    described = [
        (pattern, _connection(pattern, one, values, {**defaults, **known}, inventory))
        for pattern, one in found
    ]
    # A head reads the streams and mixes nothing, so that it is no factor of the products.
    connections = tuple(one for pattern, one in described if not pattern.head)
    products = tuple(composites(connections))
    return StaticDescription(
        checkpoint=str(path),
        model_type=printable(str(config.get("model_type", ""))),
        num_tensors=len(inventory.tensors) + len(inventory.absent),
        num_read=len(values),
        num_files=len(inventory.files),
        absent_files=tuple(sorted(set(inventory.absent.values()))),
        settings={**defaults, **known},
        assumed=tuple(name for name in defaults if name not in known),
        connections=connections,
        heads=tuple(one for pattern, one in described if pattern.head),
        composites=products,
        warnings=tuple(remarks(connections, products, _first_number(config, *STREAM_SETTINGS))),
        looked_for=tuple(pattern.looked_for for pattern in CONNECTIONS),
    )


# --- the files


def _require_no_absent_connection(path: Path, inventory: Inventory, found: Sequence[FoundTensors]) -> None:
    """Refuse where a missing shard contains a tensor that is named like a connection's, but for the numbers."""
    if not inventory.absent:
        return
    kinds = {_without_numbers(tensor.name) for one in found for tensor in (*one.roles.values(), *one.unread)}
    # where no connection was found at all, every missing shard may contain one
    lacking = sorted(
        {file for name, file in inventory.absent.items() if _without_numbers(name) in kinds or not found}
    )
    if not lacking:
        return
    listed = ", ".join(lacking[:5]) + (", …" if len(lacking) > 5 else "")
    what = "hold connections and are" if found else "may hold connections (none is in the others) and are"
    raise CheckpointError(f"'{path}': shards that {what} not there: {listed}; complete the download")


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _configuration(folder: Path) -> dict[str, Any]:
    # A lone .safetensors file may have no configuration next to it: the families' defaults then stand for all settings.
    file = folder / "config.json"
    if not exists(file):
        return {}
    return read_json(own_file(folder, "config.json"), "transformers configuration")


def _first_number(config: Mapping[str, Any], *names: str) -> float | None:
    """The first of some numbers in the configuration or in a part of it (``text_config``); None where there is none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    values = (part[name] for name in names for part in parts if name in part)
    return next((_setting(value) for value in values if isinstance(value, (int, float))), None)


def _setting(value: float) -> float:
    # Rounds of Sinkhorn among them, each of which takes a microsecond
    if not abs(value) <= LARGEST_SETTING:
        shown = f"{value:g}" if abs(value) < 1e300 else "beyond all numbers"
        raise CheckpointError(
            f"config.json gives a connection the setting {shown}; expected at most {LARGEST_SETTING}: download it again"
        )
    return float(value)


# --- one connection


def _connection(
    pattern: WeightPattern,
    found: FoundTensors,
    values: Mapping[str, np.ndarray],
    settings: Mapping[str, float],
    inventory: Inventory,
) -> StaticConnection:
    by_role = {role: values[tensor.name] for role, tensor in found.roles.items()}
    weights = pattern.weigh(found, by_role, settings)
    place = _place_in_network(pattern, found, inventory)
    return StaticConnection(
        module=found.module,
        chain=place.chain,
        layer=place.layer,
        branch=place.branch,
        family=pattern.name,
        style=pattern.style,
        streams=found.streams,
        fractions=found.fractions,
        width=found.width,
        constrained=pattern.constrained,
        learns_mixing=pattern.learns_mixing,
        composes=pattern.composes,
        parameters=tuple(_parameters(found)),
        biases={part: spread_of(bias) for part, bias in weights.biases.items()},
        gates=dict(weights.gates),
        h_res=weights.res,
        h_pre=weights.pre,
        h_post=weights.post,
        logits=weights.biases.get("res") if pattern.sinkhorn else None,
        sinkhorn=pattern.sinkhorn(settings) if pattern.sinkhorn else {},
        mixing=None if weights.res is None else matrix_facts(weights.res),
        note=weights.note,
    )


def _place_in_network(pattern: WeightPattern, found: FoundTensors, inventory: Inventory) -> Place:
    place = place_of(found.module)
    if pattern.head:
        return Place(place.chain, place.layer, pattern.name)
    if place.branch != "block":
        return place
    # a connection whose own path names no branch may contain it, as lucidrains' do
    prefix = f"{found.module}.branch."
    inside = [name.removeprefix(prefix) for name in inventory.tensors if name.startswith(prefix)]
    return place_of(found.module, inside)


def _parameters(found: FoundTensors) -> list[Parameter]:
    read = list(found.roles.values())
    return [
        Parameter(tensor.name, tensor.shape, tensor.dtype, tensor in read)
        for tensor in sorted((*read, *found.unread), key=lambda tensor: tensor.name)
    ]


def _plain_values(value: Any) -> Any:
    # Not dataclasses.asdict, which leaves arrays as they are: json does not write them.
    if is_dataclass(value):
        return {field.name: _plain_values(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain_values(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain_values(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
