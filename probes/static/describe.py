"""What do a checkpoint's files alone show of its stream connections? Biases, gates, static mixing, and its products.

No model is built and no other tensor is read. The weights are those of an input that adds nothing to the learned biases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError, printable
from depthscope.probes.checkpoints.hub import hub_files, is_hub_name
from depthscope.probes.checkpoints.own_files import exists, given_path, own_file, read_json
from depthscope.probes.checkpoints.tensor_inventory import (
    Inventory,
    StoredTensor,
    read_values,
    take_inventory,
)
from depthscope.probes.static.depth import applied_reads, depth_read
from depthscope.probes.static.dialect import Dialect
from depthscope.probes.static.dialects import TABLE
from depthscope.probes.static.facts import (
    StaticConnection,
    composites,
    constraint_of,
    matrix_facts,
)
from depthscope.probes.static.page import StaticDescription
from depthscope.probes.static.recognition import STREAM_SETTINGS, Found, Place, place_of, recognise, setting
from depthscope.probes.static.remarks import remarks
from depthscope.probes.static.weights import Settings, settings_of, weigh


def describe_weights(path: str | Path, *, dialects: Sequence[Dialect] = ()) -> StaticDescription:
    """Describe a checkpoint's connections from its weight files, without building the model.

    Parameters
    ----------
    path : str or Path
        A transformers folder (``config.json``, and safetensors, sharded or not), one ``.safetensors`` or ``.gguf`` file
        or an index, or ``organisation/name`` on the Hugging Face hub. Shards may be missing: the connections in them
        are left out, and ``warnings`` names the shards.
    dialects : sequence of Dialect
        Your own rows: how your checkpoint names its connections and what they compute (docs/how_to/checkpoints.md).

    Returns
    -------
    StaticDescription
        Without connections where the checkpoint contains none; what looks like one and fits no dialect is in
        ``unrecognised``.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, torn or of another format, lacks shards and has no connection in the others, has the
        names of a dialect under a model type that is not one of its own, or if a row cannot be computed.
    """
    path = hub_files(str(path)).path if is_hub_name(str(path)) else given_path(path)
    rows = (*dialects, *TABLE)
    inventory = take_inventory(path)
    config = inventory.settings
    if config is None:
        config = _configuration(path if path.is_dir() else path.parent)
    found = recognise(inventory.tensors, rows, config, own=dialects)
    everything = (*found.connections, *found.heads)
    absent = _absent_connections(path, inventory, everything)
    # A setting that config.json lacks gets the dialect's default, and the page lists it as assumed.
    settings = {one.dialect: settings_of(one.dialect, config) for one in everything}
    values = read_values(tensor for one in everything for tensor in _read_tensors(one).values())
    described = [_connection(one, values, settings[one.dialect], inventory, config) for one in everything]
    # A head reads the streams and mixes nothing, so that it is no factor of the products.
    lacking = {place_of(name).chain for name in absent}
    connections, collapse = applied_reads(described[: len(found.connections)], lacking)
    products = tuple(
        composites(connections, lacking | {place_of(one.name).chain for one in found.unrecognised})
    )
    streams = _first_number(config, *STREAM_SETTINGS)
    return StaticDescription(
        checkpoint=str(path),
        model_type=printable(str(config.get("model_type", ""))),
        num_tensors=len(inventory.tensors) + len(inventory.absent),
        num_read=len(values),
        num_files=len(inventory.files),
        absent_files=tuple(sorted(set(inventory.absent.values()))),
        settings={name: value for each in settings.values() for name, value in each.shown.items()},
        assumed=tuple(dict.fromkeys(name for each in settings.values() for name in each.assumed)),
        connections=tuple(connections),
        heads=(*described[len(found.connections) :], *collapse),
        composites=products,
        warnings=(*_absence(absent), *remarks(connections, products, streams)),
        looked_for=tuple(row.looked_for for row in rows if not row.head),
        unrecognised=found.unrecognised,
    )


# --- the files


def _absent_connections(path: Path, inventory: Inventory, found: Sequence[Found]) -> dict[str, str]:
    """The files of the tensors in missing shards that are named like a recognised connection's, but for the numbers.

    Where no connection was found at all, every missing shard may contain one, which is refused.
    """
    if inventory.absent and not found:
        files = sorted(set(inventory.absent.values()))
        listed = ", ".join(files[:5]) + (", …" if len(files) > 5 else "")
        raise CheckpointError(
            f"'{path}': shards that may hold connections (none is in the others) and are not there: {listed}; complete the "
            "download"
        )
    kinds = {_without_numbers(name) for one in found for name in one.tensors}
    return {name: file for name, file in inventory.absent.items() if _without_numbers(name) in kinds}


def _absence(absent: Mapping[str, str]) -> list[str]:
    if not absent:
        return []
    files = sorted(set(absent.values()))
    listed = ", ".join(files[:5]) + (", …" if len(files) > 5 else "")
    return [
        f"{len(absent)} tensors of connections are in shards that are not there ({listed}): their connections are left out, "
        "and nothing is said of products over their chain; complete the download"
    ]


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
    values = (setting(config, name) for name in names)
    return next(
        (float(value) for value in values if isinstance(value, (int, float)) and abs(value) < 1e300), None
    )


# --- one connection


def _connection(
    found: Found,
    values: Mapping[str, np.ndarray],
    settings: Settings,
    inventory: Inventory,
    config: Mapping[str, Any],
) -> StaticConnection:
    row, read = found.dialect, _read_tensors(found)
    weights = weigh(found, {role: values[tensor.name] for role, tensor in read.items()}, settings.values)
    place = _place_in_network(found, inventory)
    floor = weights.sinkhorn.get("floor", 0.0)
    return StaticConnection(
        module=found.module,
        chain=place.chain,
        layer=place.layer,
        branch=place.branch,
        family=row.family,
        style=row.style or row.name,
        streams=found.streams,
        width=found.sizes.get("D"),
        constrained=row.doubly_stochastic,
        learns_mixing=row.learns_mixing,
        dtypes=tuple(sorted({each.dtype for each in found.roles.values()})),
        gates=dict(weights.gates),
        h_res=weights.res,
        h_pre=weights.pre,
        h_post=weights.post,
        logits=weights.logits,
        sinkhorn=dict(weights.sinkhorn),
        mixing=None if weights.res is None else matrix_facts(weights.res),
        constraint="" if weights.res is None else constraint_of([weights.res], floor),
        note="; ".join(filter(None, (found.withheld, *found.notes))),
        dialect=row.name,
        read_lag=found.read_lag,
        depth=None
        if weights.query is None
        else depth_read(
            weights.query, settings.values["block"], place.layer, place.branch, _layers(inventory, config)
        ),
    )


def _read_tensors(found: Found) -> dict[str, StoredTensor]:
    """The tensors whose values the row's functions use."""
    return {role: found.roles[role] for role in found.dialect.read_roles & found.roles.keys()}


def _layers(inventory: Inventory, config: Mapping[str, Any]) -> int:
    """Layers of the model: of its configuration, else one more than the last that has a tensor."""
    configured = _first_number(config, "num_hidden_layers", "block_count", "n_layers")
    if configured is not None:
        return int(configured)
    return 1 + max((place_of(name.rpartition(".")[0]).layer for name in inventory.tensors), default=-1)


def _place_in_network(found: Found, inventory: Inventory) -> Place:
    place = place_of(found.module)
    if found.dialect.head:
        return Place(place.chain, place.layer, "head")
    if place.branch != "block":
        return place
    # A connection whose own path names no branch may contain it, as lucidrains' do.
    prefix = f"{found.module}.branch."
    return place_of(
        found.module, [name.removeprefix(prefix) for name in inventory.tensors if name.startswith(prefix)]
    )
