"""What is known about each run? Model, size, proof of the connections, software: one column a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from depthscope.app.dashboard.components.markdown import escaped
from depthscope.app.readings.readings import Reading, memory_sentence
from depthscope.app.text.numbers import number

_DIGEST_LENGTH = len("sha256:") + 12
"""Twelve hexadecimal digits distinguish data sets at a glance; the run has all of them."""

_PLAIN = {
    "Model": "model",
    "Family": "family",
    "Streams": "n_streams",
    "Mixing matrices": "constraint",
    "Reading": "proof",
    "Precision": "dtype",
    "Loss reduction": "loss_reduction",
    "Seed": "seed",
    "Commit": "commit",
    "Created": "created",
}
"""Fact → attribute that is shown as it is."""


def facts_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Facts as rows, runs as columns; a fact that no run has is left out.

    Returns: Of escaped text, with a dash where a run lacks a fact.
    """
    table = pd.DataFrame({escaped(reading.name): _facts(reading) for reading in readings})
    # A row of dashes would only lengthen the table.
    table = table[table.notna().any(axis=1)].fillna("–")
    return table.map(lambda value: escaped(str(value))).rename_axis("fact")


def _facts(reading: Reading) -> dict[str, Any]:
    attrs, analysis = reading.attrs, reading.analysis
    proof, expected, digest = (
        attrs.get(name) for name in ("reconstruction_error", "sites_expected", "data_digest")
    )
    digest = str(digest or "")
    software = attrs.get("software")
    facts = {name: attrs.get(attribute) for name, attribute in _PLAIN.items()} | {
        "Depth": f"{analysis.sizes['depth']} states" if "depth" in analysis.sizes else None,
        # The largest over depth: stages of a convolutional network have fewer tokens further down.
        "Tokens analysed": f"{float(analysis['num_tokens'].sel(scope='data', tokens='all').max()):g}"
        if "num_tokens" in analysis
        else None,
        "Reconstruction proof": f"states rebuilt to {number(proof, digits=2)}"
        if isinstance(proof, (int, float))
        else proof,
        # Which axis of H_res is the source is known only where the connections were proven.
        "Orientation": None if proof is None else str(attrs.get("orientation", "unknown")).replace("_", " "),
        "Sites": None if expected is None else f"{attrs.get('sites_fired')} of {expected} expected fired",
        "Changed outside connections": _sentences(attrs.get("changes_outside"), "module"),
        "Not covered": _sentences(attrs.get("not_covered"), "sentence"),
        "Memory": memory_sentence(attrs),
        "Data": f"{digest[:_DIGEST_LENGTH]}…" if len(digest) > _DIGEST_LENGTH else digest,
        "Parts": _sentences([attrs.get("parts")], "sentence"),
        "Software": ", ".join(f"{name} {version}" for name, version in software.items())
        if isinstance(software, Mapping)
        else software,
    }
    return {name: None if value in (None, "") else value for name, value in facts.items()}


def _sentences(parts: Any, name: str) -> str | None:
    """One entry of each of some mappings; what else a file of another tool has there is shown as it is."""
    if not parts or parts == [None]:
        return None
    known = isinstance(parts, list) and all(isinstance(part, Mapping) and name in part for part in parts)
    return "; ".join(str(part[name]) for part in parts) if known else str(parts)
