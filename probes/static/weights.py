"""What are the weights of a recognised connection at an input that adds nothing? Its row's formulas, computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.dialect import Dialect
from depthscope.probes.static.formula import Formula, FormulaError, sinkhorn
from depthscope.probes.static.recognition import Found, setting

LARGEST_SETTING = 10_000  # a heuristic: public models have 20 rounds of Sinkhorn and magnitudes of a few


@dataclass(frozen=True, eq=False)
class StaticWeights:
    """A connection at an input that adds nothing; None where the file does not determine it. Rows are destinations."""

    res: np.ndarray | None = None  # (n, n)
    pre: np.ndarray | None = None  # (n,)
    post: np.ndarray | None = None  # (n,)
    query: np.ndarray | None = None  # (k, D), of an attention over depth
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)  # the learned parameters by part
    gates: Mapping[str, float] = field(default_factory=dict)  # factors of the part that depends on the input
    logits: np.ndarray | None = None
    sinkhorn: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """The constants of a row for one checkpoint: values by the row's names, and what of them is only assumed."""

    values: Mapping[str, float]
    shown: Mapping[str, float]  # by the names of the configuration
    assumed: tuple[str, ...]


def settings_of(dialect: Dialect, config: Mapping[str, Any]) -> Settings:
    """The constants of a row, from ``config.json`` or the settings of a GGUF file.

    Raises CheckpointError: If a setting is no number that a model can have.
    """
    values, shown, assumed = {}, {}, []
    for name, constant in dialect.constants.items():
        given = [(key, value) for key in constant.keys if _is_number(value := setting(config, key))]
        key, value = given[0] if given else (constant.keys[0], constant.default)
        # Rounds of Sinkhorn among them, each of which takes a microsecond.
        if not abs(value) <= LARGEST_SETTING:
            size = f"{value:g}" if abs(value) < 1e300 else "beyond all numbers"
            raise CheckpointError(
                f"config.json gives a connection the setting {size}; expected at most {LARGEST_SETTING}: download it again"
            )
        values[name] = shown[key] = float(value)
        assumed += [] if given else [key]
    return Settings(values, shown, tuple(assumed))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def weigh(found: Found, values: Mapping[str, np.ndarray], constants: Mapping[str, float]) -> StaticWeights:
    """The weights of a connection where the input adds nothing; ``values``: its tensors, by role.

    Raises CheckpointError: If a formula of the row cannot be computed on these tensors.
    """
    row = found.dialect
    names: dict[str, Any] = {"n": found.streams, **found.sizes, **constants, **values}
    try:
        gates = {part: float(np.ravel(gate)[0]) for part, gate in _computed(row.gates, names).items()}
        parts = _computed(row.parts, names)
        biases = {part: _destinations_first(np.asarray(bias), row, part) for part, bias in parts.items()}
        if found.withheld:
            return StaticWeights(biases=biases, gates=gates)
        names |= parts
        results = _computed(row.formulas, names)
        logits, how = _sinkhorn(row, names)
        return StaticWeights(
            res=_of_streams(results, "mixing", (found.streams, found.streams), row),
            pre=_of_streams(results, "read", (found.streams,), row),
            post=_of_streams(results, "write", (found.streams,), row),
            query=np.atleast_2d(results["query"]) if "query" in results else None,
            biases=biases,
            gates=gates,
            logits=logits,
            sinkhorn=how,
        )
    except FormulaError as error:
        raise CheckpointError(f"dialect {row.name!r}, at {found.module}: {error}; correct the row") from error


def _computed(formulas: Mapping[str, Formula], names: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those formulas whose tensors exist: optional ones may be missing."""
    return {name: formula.value(names) for name, formula in formulas.items() if formula.names <= names.keys()}


def _sinkhorn(row: Dialect, names: Mapping[str, Any]) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The logits of H_res and how they become it, where the mixing is Sinkhorn's."""
    mixing = row.formulas.get("mixing")
    call = mixing.arguments(sinkhorn, names) if mixing and mixing.names <= names.keys() else None
    if call is None:
        return None, {}
    # The last side in the module's orientation; the rows of H_res are destinations.
    last_is_columns = call.get("last", "columns") == "columns"
    how = {
        "sinkhorn_steps": int(call["rounds"]),
        "last": "row" if last_is_columns == row.sources_in_rows else "column",
        "floor": float(call.get("floor", 0.0)),
    }
    return _destinations_first(call["logits"], row, "res"), how


def _destinations_first(values: np.ndarray, row: Dialect, part: str) -> np.ndarray:
    return values.T if part in ("res", "mixing") and values.ndim == 2 and row.sources_in_rows else values


def _of_streams(
    results: Mapping[str, Any], name: str, shape: tuple[int, ...], row: Dialect
) -> np.ndarray | None:
    if name not in results:
        return None
    values = np.asarray(results[name])
    if values.shape != shape:
        raise FormulaError(f"{name} gives the shape {values.shape}; expected {shape}")
    return _destinations_first(values, row, name)
