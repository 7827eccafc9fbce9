"""How does the static description of a checkpoint read? A heading, a row for each connection, products and warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from depthscope.probes.static.facts import (
    StaticComposite,
    StaticConnection,
    Unrecognised,
    by_stem,
    constraint_of,
)

COLUMNS = (
    "connection", "gates pre/post/res", "logits", "H_pre", "H_post", "row sums", "column sums", "σ₂", "gap", "off-diag",
    "to I", "to J/n",
)  # fmt: skip
DEPTH_COLUMNS = ("connection", "sources", "‖query‖", "layers in a block", "state")
PARTS = ("pre", "post", "res")
NOTHING = "–"  # the files do not determine it, or it is the same in every model
WIDTH = 120  # characters of a line of words
MOST_NAMED = 12  # groups of tensors that fit no dialect; JSON has all of them

Table = tuple[tuple[str, ...], list[list[str]]]


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
    unrecognised: tuple[Unrecognised, ...]

    def as_dict(self) -> dict[str, Any]:
        """The description as plain values."""
        return _plain_values(self)

    def __str__(self) -> str:
        return page(self)


def page(found: StaticDescription) -> str:
    """The description as text."""
    if not found.connections:
        return heading(found)
    parts = [heading(found), *(_aligned(columns, rows) for columns, rows in tables(found)), ending(found)]
    return "\n\n".join(part for part in parts if part)


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [list(columns), *rows]
    widths = [max(len(line[at]) for line in table) for at in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def heading(found: StaticDescription) -> str:
    """What the checkpoint is, and what was read of it."""
    files = f"{found.num_files} file" + ("s" if found.num_files > 1 else "")
    absent = f", {len(found.absent_files)} of them not there" if found.absent_files else ""
    name = found.checkpoint + (f" ({found.model_type})" if found.model_type else "")
    if not found.connections:
        none = "no stream connection that a dialect knows" if found.unrecognised else "no stream connection"
        return "\n".join(
            [f"{name}: {none} in {found.num_tensors} tensors of {files}{absent}", *_why_none(found)]
        )
    lines = [
        f"{name}: {', '.join(_connection_kinds(found.connections))}",
        f"  dialect      {', '.join(dict.fromkeys(one.dialect for one in (*found.connections, *found.heads)))}",
        f"  read         {found.num_read} of {found.num_tensors} tensors in {files}{absent}; no model was built",
    ]
    if any(one.h_res is not None for one in found.connections):
        lines.append(
            "  values       at an input that adds nothing: biases through the family's own constraint; "
            "rows of H_res are destinations"
        )
    if found.settings:
        assumed = {name: " (assumed: config.json does not tell)" for name in found.assumed}
        known = (f"{name} {value:g}{assumed.get(name, '')}" for name, value in found.settings.items())
        lines.append(f"  settings     {', '.join(known)}")
    return "\n".join(lines)


def _why_none(found: StaticDescription) -> list[str]:
    if found.unrecognised:
        return [
            *_named_tensors(found),
            "  They look like a connection, so this need not be a plain residual network: run the model (describe without "
            "--weights-only),",
            "  or give a row of your own (describe_weights(path, dialects=[...]), docs/how_to/checkpoints.md).",
        ]
    known = "; ".join(words.split("; ")[0].partition(": ")[2] for words in found.looked_for)
    return [
        "  A plain residual network has none; nor does a connection without parameters, which only a run shows "
        "(describe without --weights-only).",
        "  Looked for:",
        *textwrap.wrap(known, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False),
    ]


def _connection_kinds(connections: Sequence[StaticConnection]) -> list[str]:
    kinds: dict[str, int] = {}
    for one in connections:
        width = f" of width {one.width}" if one.width else ""
        dtypes = "/".join(one.dtypes)
        streams = f"{one.streams} streams" if one.streams > 1 else "1 stream"
        kind = f"{one.family} connections ({one.style}), {streams}{width}, {dtypes}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{count} {kind}" for kind, count in kinds.items()]


def tables(found: StaticDescription) -> list[Table]:
    """A table of the connections of streams, and one of the attention over depth.

    Returns: Columns, and a row of cells for each connection and head. Columns in which nothing is known are left out.
    """
    everything = [*found.connections, *found.heads]
    depth = [_depth_row(one) for one in everything if one.depth]
    streams = [_row(one) for one in everything if not one.depth]
    return [_without_empty_columns(*each) for each in ((COLUMNS, streams), (DEPTH_COLUMNS, depth)) if each[1]]


def _without_empty_columns(columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    empty = {NOTHING, "/".join([NOTHING] * len(PARTS))}
    kept = [at for at in range(len(columns)) if any(row[at] not in empty for row in rows)]
    return tuple(columns[at] for at in kept), [[row[at] for at in kept] for row in rows]


def _name(one: StaticConnection) -> str:
    return f"{one.module} (head)" if one.branch == "head" and "head" not in one.module else one.module


def _row(one: StaticConnection) -> list[str]:
    gates = "/".join(f"{one.gates[part]:.2g}" if part in one.gates else NOTHING for part in PARTS)
    described = [
        _name(one),
        gates,
        _value_range(one.logits),
        _value_range(one.h_pre),
        _value_range(one.h_post),
    ]
    facts = one.mixing
    if facts is None or not one.learns_mixing:  # a matrix that is the same in every model is no news
        return described + [NOTHING] * (len(COLUMNS) - len(described))
    # σ₂ and not σ₁, which is 1 for every doubly stochastic matrix.
    numbers = (
        facts.singular_values[1], facts.spectral_gap, facts.off_diagonal,
        facts.identity_distance, facts.uniform_distance,
    )  # fmt: skip
    # Four digits: sums are near 1, and how near is what the columns show.
    sums = [_value_range(sums, digits=4) for sums in (facts.row_sums, facts.column_sums)]
    return described + sums + [f"{number:.2g}" for number in numbers]


def _depth_row(one: StaticConnection) -> list[str]:
    depth = one.depth
    assert depth is not None
    sources = str(depth.sources) if depth.sources else "not applied"
    norms = ", ".join(f"{norm:.3g}" for norm in depth.query_norms)
    state = "begins anew" if depth.resets else "goes on"
    return [_name(one), sources, norms, str(depth.block), NOTHING if one.branch == "head" else state]


def _value_range(values: np.ndarray | None, *, digits: int = 2) -> str:
    if values is None:
        return NOTHING
    low, high = f"{values.min():.{digits}g}", f"{values.max():.{digits}g}"
    return low if low == high else f"{low}…{high}"


def ending(found: StaticDescription) -> str:
    """Products over depth, warnings, and what the files do not determine."""
    # as a set in order: the note of a family would come once for each connection
    notes = dict.fromkeys(one.note for one in (*found.connections, *found.heads) if one.note)
    return "\n".join(
        [
            *(f"  H_res        {words}, as measured" for words in _constraints(found.connections)),
            *(_composite_line(composite) for composite in found.composites),
            *(f"  warning      {words}" for words in found.warnings),
            *_named_tensors(found),
            *(f"  note         {words}" for words in notes),
        ]
    )


def _constraints(connections: Sequence[StaticConnection]) -> list[str]:
    """What the learned mixing matrices satisfy, those of as many streams together."""
    stacks: dict[tuple[int, float], list[np.ndarray]] = {}
    for one in connections:
        if one.h_res is not None and one.learns_mixing:
            stacks.setdefault((len(one.h_res), one.sinkhorn.get("floor", 0.0)), []).append(one.h_res)
    return [constraint_of(matrices, floor) for (_, floor), matrices in stacks.items()]


def _named_tensors(found: StaticDescription) -> list[str]:
    """The tensors that look like a connection and fit no dialect, those of all layers in one line."""
    groups = list(by_stem(found.unrecognised).values())
    lines = []
    for group in groups[:MOST_NAMED]:
        shape = ", ".join(map(str, group[0].shape)) or "1 number"
        others = f" and {len(group) - 1} alike" if len(group) > 1 else ""
        lines.append(f"  not read     {group[0].name} ({shape}) {group[0].dtype}{others}: {group[0].reason}")
    if len(groups) > MOST_NAMED:
        lines.append(
            f"  not read     … and {len(groups) - MOST_NAMED} more kinds of tensors (--json names all)"
        )
    return lines


def _composite_line(one: StaticComposite) -> str:
    sigma = ", ".join(f"{value:.3g}" for value in one.singular_values[:2])
    streams = "" if one.effective_streams is None else f", effective streams {one.effective_streams:.3g}"
    return (
        f"  composite    {one.chain or 'one chain'}: {one.connections} matrices, gain forward {one.forward_gain:.3g} "
        f"backward {one.backward_gain:.3g}, σ₁ σ₂ {sigma}, effective rank {one.effective_rank:.3g} of {one.streams}{streams}"
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
