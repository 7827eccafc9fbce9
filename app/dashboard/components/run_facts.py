"""What is known about each run? Model, size, proof of the connections, software: one column a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.figures import Selection
from depthscope.app.figures.build.captions import selection_words
from depthscope.app.readings.readings import Reading, memory_sentence
from depthscope.app.tables.tables import column_of
from depthscope.app.text.numbers import number

_DIGEST_LENGTH = len("sha256:") + 12
"""Twelve hexadecimal digits distinguish data sets at a glance; the run has all of them."""


def facts_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Facts as rows, runs as columns; a fact that no run has is left out.

    Returns: Of escaped text, with a dash where a run lacks a fact.
    """
    table = pd.DataFrame({escaped(reading.name): _facts(reading) for reading in readings})
    # A row of dashes would only lengthen the table.
    table = table[table.notna().any(axis=1)].fillna("–")
    return table.map(lambda value: escaped(str(value))).rename_axis("fact")


def _facts(reading: Reading) -> dict[str, Any]:
    attrs = reading.attrs
    facts = {
        "Model": attrs.get("model"),
        "Family": attrs.get("family"),
        "Streams": attrs.get("n_streams"),
        "Mixing matrices": attrs.get("constraint"),
        "Reading": attrs.get("proof"),
        **_sizes(reading.analysis),
        "Effective rank of the last state": _last_value(reading, "effective_rank", Selection(scope="data")),
        **_evidence(attrs),
        "Memory": memory_sentence(attrs),
        "Precision": attrs.get("dtype"),
        "Loss reduction": attrs.get("loss_reduction"),
        "Seed": attrs.get("seed"),
        "Commit": attrs.get("commit"),
        "Data": _shortened(str(attrs.get("data_digest") or "")),
        "Parts": (attrs.get("parts") or {}).get("sentence"),
        "Created": attrs.get("created"),
        "Software": _versions(attrs.get("software")),
    }
    return {name: None if value in (None, "") else value for name, value in facts.items()}


def _sizes(analysis: Any) -> dict[str, str | None]:
    """Number of states, and of the tokens that the pooled metrics rest on."""
    tokens = None
    if "num_tokens" in analysis:
        # The largest over depth: stages of a convolutional network have fewer tokens further down.
        tokens = f"{float(analysis['num_tokens'].sel(scope='data', tokens='all').max()):g}"
    depth = f"{analysis.sizes['depth']} states" if "depth" in analysis.sizes else None
    return {"Depth": depth, "Tokens analysed": tokens}


def _evidence(attrs: Mapping[str, Any]) -> dict[str, str | None]:
    """Whether the reported connections are those that the model applies, and what was not seen."""
    # A run without connections to prove has no such attribute.
    proof = attrs.get("reconstruction_error")
    expected = attrs.get("sites_expected")
    changes = attrs.get("changes_outside") or ()
    # A file of another tool may have anything there, which is shown as it is.
    known = isinstance(changes, list) and all(_is_change(change) for change in changes)
    if known:
        changes = ", ".join(f"before {change['module']} by {change['change']:.1%}" for change in changes)
    return {
        "Reconstruction proof": None if proof is None else _proof_words(proof),
        # Which axis of H_res is the source is known only where the connections were proven.
        "Orientation": None if proof is None else str(attrs.get("orientation", "unknown")).replace("_", " "),
        "Sites": None if expected is None else f"{attrs.get('sites_fired')} of {expected} expected fired",
        "Changed outside connections": str(changes) if changes else None,
        "Not covered": _not_covered(attrs.get("not_covered") or ()),
    }


def _not_covered(parts: Any) -> str | None:
    """The parts of the model that ran and lie in no chain, each with its reason."""
    if not parts:
        return None
    known = isinstance(parts, list) and all(isinstance(part, dict) and "sentence" in part for part in parts)
    return "; ".join(str(part["sentence"]) for part in parts) if known else str(parts)


def _is_change(change: Any) -> bool:
    return isinstance(change, dict) and "module" in change and isinstance(change.get("change"), float)


def _proof_words(proof: Any) -> str:
    return f"states rebuilt to {number(proof, digits=2)}" if isinstance(proof, (int, float)) else str(proof)


def _last_value(reading: Reading, metric: str, selection: Selection) -> str | None:
    """A metric at the last depth where it is defined, with its error, its null and its scope."""
    column = column_of(reading.analysis, metric, selection)
    if column is None:
        return None
    # `column_of` has made sure that there is one.
    last = int(np.flatnonzero(np.isfinite(column.value.values))[-1])
    where = "" if last == column.value.size - 1 else f", at depth {last}"
    # A chart of the same page may show it within sequences.
    return f"{column.text()[last]}{where}, {selection_words({'scope'}, selection)}"


def _shortened(digest: str) -> str:
    return f"{digest[:_DIGEST_LENGTH]}…" if len(digest) > _DIGEST_LENGTH else digest


def _versions(software: Any) -> str | None:
    """Such as "numpy 2.1, torch 2.9"; text where a run of another tool has text there."""
    if not isinstance(software, dict):
        return None if software is None else str(software)
    return ", ".join(f"{name} {version}" for name, version in software.items())
