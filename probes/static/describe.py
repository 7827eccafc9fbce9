"""What do a checkpoint's files alone show of its stream connections? Biases, gates, static mixing, and its products.

No model is built and no other tensor is read. The weights are those of an input that adds nothing to the learned biases.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os.path import exists
from pathlib import Path
from typing import Any

import numpy as np

from depthscope.diagnostics.schema.attributes import json_default
from depthscope.probes.checkpoints.errors import printable
from depthscope.probes.checkpoints.hub import hub_files, is_hub_name
from depthscope.probes.checkpoints.own_files import given_path, own_file, read_json
from depthscope.probes.checkpoints.tensor_inventory import (
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
        return json.loads(json.dumps(asdict(self), default=json_default))

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
    inventory = take_inventory(path)
    config = inventory.settings
    if config is None:
        # A lone .safetensors file may have no configuration next to it: the families' defaults then stand for all settings.
        file = own_file(path if path.is_dir() else path.parent, "config.json")
        config = read_json(file, "transformers configuration") if exists(file) else {}
    found = recognise(inventory.tensors, (*dialects, *TABLE), config, own=dialects)
    everything = (*found.connections, *found.heads)
    # A setting that config.json lacks gets the dialect's default, and the page lists it as assumed.
    settings = {one.dialect: settings_of(one.dialect, config) for one in everything}
    read = {one: one.read for one in everything}
    values = read_values(tensor for of in read.values() for tensor in of.values())
    described = [
        connection_of(
            one,
            place_of(one.module, is_head=one.dialect.head),
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
    kinds = Counter(
        f"{one.family} connections, {one.streams} stream{'s' if one.streams > 1 else ''}"
        f"{f' of width {one.width}' if one.width else ''}, {'/'.join(one.dtypes)}"
        for one in found.connections
    )
    yield f"{name}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
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
    learned: dict[int, list[np.ndarray]] = defaultdict(list)  # by the number of streams
    for one in found.connections:
        if one.h_res is not None and one.learns_mixing:
            learned[one.streams].append(one.h_res)
    yield from (f"  H_res        {constraint_of(each)}, as measured" for each in learned.values())
    for product in found.composites:
        sigma = ", ".join(f"{value:.3g}" for value in product.singular_values[:2])
        yield (
            f"  composite    {product.chain or 'one chain'}: {product.connections} matrices, gain forward "
            f"{product.forward_gain:.3g} backward {product.backward_gain:.3g}, σ₁ σ₂ {sigma}, effective rank "
            f"{product.effective_rank:.3g} of {product.streams}"
        )
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
