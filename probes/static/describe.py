"""What do a checkpoint's files alone show of its stream connections? Biases, gates, static mixing, and its products.

No model is built and no other tensor is read. The weights are those of an input that adds nothing to the learned biases.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import printable
from depthscope.probes.checkpoints.hub import hub_files, is_hub_name
from depthscope.probes.checkpoints.own_files import exists, given_path, own_file, read_json
from depthscope.probes.checkpoints.tensor_inventory import (
    Inventory,
    StoredTensor,
    read_values,
    take_inventory,
)
from depthscope.probes.static.connections import (
    StaticComposite,
    StaticConnection,
    composites,
    connection_of,
    constraint_of,
    settings_of,
)
from depthscope.probes.static.dialect import PARTS, Dialect
from depthscope.probes.static.dialects import TABLE
from depthscope.probes.static.recognition import (
    NUMBERS,
    STREAM_SETTINGS,
    Found,
    Place,
    Unrecognised,
    place_of,
    recognise,
    setting,
)

COLUMNS = (
    "connection", "gates pre/post/res", "H_pre", "H_post", "row sums", "column sums", "σ₂",
)  # fmt: skip
UNKNOWN = "–"  # the files do not determine it, or it is the same in every model
MOST_NAMED = 12  # groups of tensors that fit no dialect; JSON has all of them


@dataclass(frozen=True, eq=False)
class StaticDescription:
    """What the weight files show of a checkpoint's stream connections; prints as a page."""

    checkpoint: str
    model_type: str
    num_tensors: int
    num_read: int
    num_files: int
    settings: dict[str, float]
    assumed: tuple[str, ...]
    connections: tuple[StaticConnection, ...]
    heads: tuple[StaticConnection, ...]
    composites: tuple[StaticComposite, ...]
    warnings: tuple[str, ...]
    unrecognised: tuple[Unrecognised, ...]

    def as_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return _plain_values(self)

    def __str__(self) -> str:
        return "\n".join(_page(self))


def describe_weights(path: str | Path, *, dialects: Sequence[Dialect] = ()) -> StaticDescription:
    """Describe a checkpoint's connections from its weight files, without building the model.

    Parameters
    ----------
    path : str or Path
        A transformers folder (``config.json``, and safetensors, sharded or not), one ``.safetensors`` or ``.gguf`` file
        or an index, or ``organisation/name`` on the Hugging Face hub.
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
        If the checkpoint is missing, torn, of another format or lacks shards, has the names of a dialect under a model type
        that is not one of its own, or if a row cannot be computed.
    """
    path = hub_files(str(path)).path if is_hub_name(str(path)) else given_path(path)
    rows = (*dialects, *TABLE)
    inventory = take_inventory(path)
    config = inventory.settings
    if config is None:
        # A lone .safetensors file may have no configuration next to it: the families' defaults then stand for all settings.
        folder = path if path.is_dir() else path.parent
        has_config = exists(folder / "config.json")
        config = (
            read_json(own_file(folder, "config.json"), "transformers configuration") if has_config else {}
        )
    found = recognise(inventory.tensors, rows, config, own=dialects)
    everything = (*found.connections, *found.heads)
    # A setting that config.json lacks gets the dialect's default, and the page lists it as assumed.
    settings = {one.dialect: settings_of(one.dialect, config) for one in everything}
    read = {one: _read_tensors(one) for one in everything}
    values = read_values(tensor for of in read.values() for tensor in of.values())
    described = [
        connection_of(
            one,
            _place_in_network(one, inventory),
            {role: values[tensor.name] for role, tensor in read[one].items()},
            settings[one.dialect].values,
        )
        for one in everything
    ]
    # A head reads the streams and mixes nothing, so that it is no factor of the products.
    connections = described[: len(found.connections)]
    broken = {place_of(one.name).chain for one in found.unrecognised}
    warnings = []
    configured = next((n for key in STREAM_SETTINGS if (n := setting(config, key)) is not None), None)
    streams = sorted({one.streams for one in connections if one.streams > 1})
    if configured is not None and streams and streams != [configured]:
        warnings.append(
            f"config.json gives {printable(str(configured))} streams, the shapes of the tensors "
            f"{', '.join(map(str, streams))}: the configuration is another model's"
        )
    return StaticDescription(
        checkpoint=str(path),
        model_type=printable(str(config.get("model_type", ""))),
        num_tensors=len(inventory.tensors),
        num_read=len(values),
        num_files=len(inventory.files),
        settings={name: value for each in settings.values() for name, value in each.shown.items()},
        assumed=tuple(dict.fromkeys(name for each in settings.values() for name in each.assumed)),
        connections=tuple(connections),
        heads=tuple(described[len(found.connections) :]),
        composites=tuple(composites(connections, broken)),
        warnings=tuple(warnings),
        unrecognised=found.unrecognised,
    )


# --- the files


def _read_tensors(found: Found) -> dict[str, StoredTensor]:
    """The tensors whose values the row's functions use."""
    row = found.dialect
    known = (*row.tensors, *(role for role in row.optional if role not in row.unread))
    return {role: found.roles[role] for role in known if role in found.roles}


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


# --- the page


def _page(found: StaticDescription) -> Iterator[str]:
    """The lines of the page: what was read, a row for each connection, products, warnings, and what is not known."""
    files = f"{found.num_files} file" + ("s" if found.num_files > 1 else "")
    name = found.checkpoint + (f" ({found.model_type})" if found.model_type else "")
    if not found.connections:
        none = "no stream connection that a dialect knows" if found.unrecognised else "no stream connection"
        yield f"{name}: {none} in {found.num_tensors} tensors of {files}"
        yield from _why_none(found)
        return
    everything = (*found.connections, *found.heads)
    yield f"{name}: {', '.join(_connection_kinds(found.connections))}"
    yield f"  dialect      {', '.join(dict.fromkeys(one.dialect for one in everything))}"
    yield f"  read         {found.num_read} of {found.num_tensors} tensors in {files}; no model was built"
    if any(one.h_res is not None for one in found.connections):
        yield (
            "  values       at an input that adds nothing: biases through the family's own constraint; "
            "rows of H_res are destinations"
        )
    if found.settings:
        assumed = {name: " (assumed: config.json does not tell)" for name in found.assumed}
        known = (f"{name} {value:g}{assumed.get(name, '')}" for name, value in found.settings.items())
        yield f"  settings     {', '.join(known)}"
    yield from ("", *_table([_row(one) for one in everything]), "")
    yield from (f"  H_res        {words}, as measured" for words in _constraints(found.connections))
    yield from map(_composite_line, found.composites)
    yield from (f"  warning      {words}" for words in found.warnings)
    yield from _named_tensors(found.unrecognised)
    # Once: the note of a family would come for each connection.
    yield from (
        f"  note         {words}" for words in dict.fromkeys(one.note for one in everything if one.note)
    )


def _why_none(found: StaticDescription) -> Iterator[str]:
    if found.unrecognised:
        yield from _named_tensors(found.unrecognised)
        yield (
            "  They look like a connection, so this need not be a plain residual network: run the model (describe without "
            "--weights-only),"
        )
        yield "  or give a row of your own (describe_weights(path, dialects=[...]), docs/how_to/checkpoints.md)."
        return
    yield (
        "  A plain residual network has none; nor does a connection without parameters, which only a run shows "
        f"(describe without --weights-only). Looked for the dialects {', '.join(row.name for row in TABLE if not row.head)}."
    )


def _connection_kinds(connections: Iterable[StaticConnection]) -> list[str]:
    kinds = Counter(
        f"{one.family} connections, {one.streams} stream{'s' if one.streams > 1 else ''}"
        f"{f' of width {one.width}' if one.width else ''}, {'/'.join(one.dtypes)}"
        for one in connections
    )
    return [f"{count} {kind}" for kind, count in kinds.items()]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, without the columns in which nothing is known."""
    unknown = {UNKNOWN, "/".join([UNKNOWN] * len(PARTS))}
    columns = [column for column in zip(COLUMNS, *rows, strict=True) if set(column[1:]) - unknown]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _row(one: StaticConnection) -> list[str]:
    is_head = one.branch == "head" and "head" not in one.module
    gates = "/".join(f"{one.gates[part]:.2g}" if part in one.gates else UNKNOWN for part in PARTS)
    cells = [
        f"{one.module} (head)" if is_head else one.module,
        gates,
        *map(_value_range, (one.h_pre, one.h_post)),
    ]
    facts = one.mixing
    if facts is None or not one.learns_mixing:  # a matrix that is the same in every model is no news
        return cells + [UNKNOWN] * (len(COLUMNS) - len(cells))
    # Four digits: sums are near 1, and how near is what the columns show.
    cells += [_value_range(sums, digits=4) for sums in (facts.row_sums, facts.column_sums)]
    return [*cells, f"{facts.singular_values[1]:.2g}"]  # σ₁ is 1 for every doubly stochastic matrix


def _value_range(values: np.ndarray | None, *, digits: int = 2) -> str:
    if values is None:
        return UNKNOWN
    low, high = f"{values.min():.{digits}g}", f"{values.max():.{digits}g}"
    return low if low == high else f"{low}…{high}"


def _constraints(connections: Iterable[StaticConnection]) -> list[str]:
    """What the learned mixing matrices satisfy, those of as many streams together."""
    stacks: dict[int, list[np.ndarray]] = defaultdict(list)
    for one in connections:
        if one.h_res is not None and one.learns_mixing:
            stacks[len(one.h_res)].append(one.h_res)
    return [constraint_of(matrices) for matrices in stacks.values()]


def _named_tensors(unrecognised: Iterable[Unrecognised]) -> Iterator[str]:
    """The tensors that look like a connection and fit no dialect, those of all layers in one line."""
    groups: dict[str, list[Unrecognised]] = defaultdict(list)
    for one in unrecognised:
        groups[f"{NUMBERS.sub('#', one.name)} {one.shape} {one.reason}"].append(one)
    for first, *others in list(groups.values())[:MOST_NAMED]:
        shape = ", ".join(map(str, first.shape)) or "1 number"
        alike = f" and {len(others)} alike" if others else ""
        yield f"  not read     {first.name} ({shape}) {first.dtype}{alike}: {first.reason}"
    if len(groups) > MOST_NAMED:
        yield f"  not read     … and {len(groups) - MOST_NAMED} more kinds of tensors (--json names all)"


def _composite_line(one: StaticComposite) -> str:
    sigma = ", ".join(f"{value:.3g}" for value in one.singular_values[:2])
    return (
        f"  composite    {one.chain or 'one chain'}: {one.connections} matrices, gain forward {one.forward_gain:.3g} "
        f"backward {one.backward_gain:.3g}, σ₁ σ₂ {sigma}, effective rank {one.effective_rank:.3g} of {one.streams}"
    )


def _plain_values(value: Any) -> Any:
    # Not dataclasses.asdict, which leaves arrays as they are: json does not write them.
    if is_dataclass(value):
        return {field.name: _plain_values(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain_values(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain_values(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
