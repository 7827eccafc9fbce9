"""How does the static description of a checkpoint read? A heading, a row for each connection, products and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from depthscope.probes.static.facts import StaticComposite, StaticConnection

if TYPE_CHECKING:  # describe imports this file
    from depthscope.probes.static.describe import StaticDescription

COLUMNS = (
    "connection", "gates pre/post/res", "logits", "H_pre", "H_post", "row sums", "column sums", "σ₂", "gap", "off-diag",
    "to I", "to J/n",
)  # fmt: skip
PARTS = ("pre", "post", "res")
NOTHING = "–"  # the files do not determine it, or it is the same in every model


def page(found: StaticDescription) -> str:
    """The description as text.

    Parameters
    ----------
    found : StaticDescription
        What was found.

    Returns
    -------
    str
    """
    if not found.connections:
        return heading(found)
    table = [list(COLUMNS), *rows(found)]
    widths = [max(len(line[at]) for line in table) for at in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([heading(found), "", *lines, "", ending(found)])


def heading(found: StaticDescription) -> str:
    """What the checkpoint is, and what was read of it.

    Parameters
    ----------
    found : StaticDescription
        What was found.

    Returns
    -------
    str
        Lines.
    """
    files = f"{found.num_files} file" + ("s" if found.num_files > 1 else "")
    absent = f", {len(found.absent_files)} of them not there" if found.absent_files else ""
    name = found.checkpoint + (f" ({found.model_type})" if found.model_type else "")
    if not found.connections:
        return "\n".join(
            [
                f"{name}: no stream connection in {found.num_tensors} tensors of {files}{absent}",
                "  A plain residual network has none; nor does a connection without parameters, which only a run shows "
                "(describe without --weights-only).",
                "  Looked for:",
                *(f"  - {words}" for words in found.looked_for),
            ]
        )
    return "\n".join(
        [
            f"{name}: {', '.join(_connection_kinds(found.connections))}",
            f"  read         {found.num_read} of {found.num_tensors} tensors in {files}{absent}; no model was built",
            "  values       at an input that adds nothing: biases through the family's own constraint; "
            "rows of H_res are destinations",
            *([f"  settings     {', '.join(_settings(found))}"] if found.settings else []),
        ]
    )


def _connection_kinds(connections: Sequence[StaticConnection]) -> list[str]:
    kinds: dict[str, int] = {}
    for one in connections:
        fractions = f" × {one.fractions} fractions" if one.fractions > 1 else ""
        width = f" of width {one.width}" if one.width else ""
        dtypes = "/".join(sorted({parameter.dtype for parameter in one.parameters}))
        kind = f"{one.family} connections ({one.style}), {one.streams} streams{fractions}{width}, {dtypes}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{count} {kind}" for kind, count in kinds.items()]


def _settings(found: StaticDescription) -> list[str]:
    return [
        f"{name} {value:g}" + (" (assumed: config.json does not tell)" if name in found.assumed else "")
        for name, value in found.settings.items()
    ]


def rows(found: StaticDescription) -> list[list[str]]:
    """A row for each connection and head, of the cells under `COLUMNS`.

    Parameters
    ----------
    found : StaticDescription
        What was found.

    Returns
    -------
    list of list of str
    """
    return [_row(one) for one in (*found.connections, *found.heads)]


def _row(one: StaticConnection) -> list[str]:
    gates = "/".join(f"{one.gates[part]:.2g}" if part in one.gates else NOTHING for part in PARTS)
    described = [
        one.module,
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


def _value_range(values: np.ndarray | None, *, digits: int = 2) -> str:
    if values is None:
        return NOTHING
    low, high = f"{values.min():.{digits}g}", f"{values.max():.{digits}g}"
    return low if low == high else f"{low}…{high}"


def ending(found: StaticDescription) -> str:
    """Products over depth, warnings, and what the files do not determine.

    Parameters
    ----------
    found : StaticDescription
        What was found.

    Returns
    -------
    str
        Lines.
    """
    # as a set in order: the note of a family would come once for each connection
    notes = dict.fromkeys(one.note for one in (*found.connections, *found.heads) if one.note)
    return "\n".join(
        [
            *(f"  parameters   {words}" for words in _other_parameters(found.connections)),
            *(_composite_line(composite) for composite in found.composites),
            *(f"  warning      {words}" for words in found.warnings),
            *(f"  note         {words}" for words in notes),
        ]
    )


def _other_parameters(connections: Sequence[StaticConnection]) -> list[str]:
    """Parameters without a column of their own, over all connections."""
    parts = dict.fromkeys(part for one in connections for part in one.biases if part not in PARTS)
    spreads = {part: [one.biases[part] for one in connections if part in one.biases] for part in parts}
    return [
        f"{part} {min(each.minimum for each in found):.3g}…{max(each.maximum for each in found):.3g}"
        for part, found in spreads.items()
    ]


def _composite_line(one: StaticComposite) -> str:
    sigma = ", ".join(f"{value:.3g}" for value in one.singular_values[:2])
    streams = "" if one.effective_streams is None else f", effective streams {one.effective_streams:.3g}"
    return (
        f"  composite    {one.chain or 'one chain'}: {one.connections} matrices, gain forward {one.forward_gain:.3g} "
        f"backward {one.backward_gain:.3g}, σ₁ σ₂ {sigma}, effective rank {one.effective_rank:.3g} of {one.streams}{streams}"
    )
