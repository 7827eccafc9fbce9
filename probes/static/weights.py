"""What are the weights of a recognised connection at an input that adds nothing? Its row's formulas, computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.dialect import Constant, Dialect
from depthscope.probes.static.formula import Formula, FormulaError
from depthscope.probes.static.recognition import Found, setting

Values = Mapping[str, np.ndarray]  # by role
LARGEST_SETTING = 10_000  # a heuristic: public models have 20 rounds of Sinkhorn and magnitudes of a few


@dataclass(frozen=True, eq=False)
class StaticWeights:
    """A connection at an input that adds nothing; None where the file does not determine it. Rows are destinations."""

    res: np.ndarray | None = None  # (n·f, n·f)
    pre: np.ndarray | None = None  # (n,), or (reads, n·f)
    post: np.ndarray | None = None  # (n,), or (n·f, writes)
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
    notes: tuple[str, ...]


def settings_of(dialect: Dialect, config: Mapping[str, Any]) -> Settings:
    """The constants of a row, from a configuration.

    ``config``: ``config.json``, or the settings of a GGUF file.
    Raises CheckpointError: If a setting is no number that a model can have.
    """
    values, shown, assumed, notes = {}, {}, [], []
    for name, constant in dialect.constants.items():
        key, value = _configured(constant, config)
        values[name] = shown[key] = constant.default if value is None else value
        if value is None:
            assumed.append(key)
            notes += [constant.assumed] if constant.assumed else []
    return Settings(values, shown, tuple(assumed), tuple(notes))


def _configured(constant: Constant, config: Mapping[str, Any]) -> tuple[str, float | None]:
    for key in constant.keys:
        value = setting(config, key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            # Rounds of Sinkhorn among them, each of which takes a microsecond
            if not abs(value) <= LARGEST_SETTING:
                shown = f"{value:g}" if abs(value) < 1e300 else "beyond all numbers"
                raise CheckpointError(
                    f"config.json gives a connection the setting {shown}; expected at most {LARGEST_SETTING}: download it "
                    "again"
                )
            return key, float(value)
    return constant.name, None


def weigh(found: Found, values: Values, constants: Mapping[str, float]) -> StaticWeights:
    """The weights of a connection where the input adds nothing.

    Raises CheckpointError: If a formula of the row cannot be computed on these tensors.
    """
    try:
        return _weigh(found, values, constants)
    except FormulaError as error:
        raise CheckpointError(
            f"dialect {found.dialect.name!r}, at {found.candidate.module}: {error}; correct the row"
        ) from error


def _weigh(found: Found, values: Values, constants: Mapping[str, float]) -> StaticWeights:
    row, sizes = found.dialect, found.sizes or {}
    names: dict[str, Any] = {"n": found.streams, **sizes, **constants, **values}
    gates = {part: float(np.ravel(gate)[0]) for part, gate in _computed(row.gates, names).items()}
    if not found.sizes:
        return StaticWeights(gates=gates)
    parts = _computed(row.parts, names)
    biases = {part: _destinations_first(np.asarray(bias), row, part) for part, bias in parts.items()}
    if found.withheld:
        return StaticWeights(biases=biases, gates=gates)
    results = _computed(row.formulas, {**names, **parts})
    mixing = results.get("mixing")
    query = results.get("query")
    logits, sinkhorn = _sinkhorn(row, {**names, **parts})
    size = found.streams * found.fractions
    return StaticWeights(
        res=None if mixing is None else _square(mixing, size, row),
        pre=_weights(results.get("read"), size, "read", axis=-1),
        post=_weights(results.get("write"), size, "write", axis=0),
        query=None if query is None else np.atleast_2d(query),
        biases=biases,
        gates=gates,
        logits=logits,
        sinkhorn=sinkhorn,
    )


def _computed(formulas: Mapping[str, Formula], names: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those formulas whose tensors exist: optional ones may be missing."""
    return {name: formula.value(names) for name, formula in formulas.items() if formula.names <= names.keys()}


def _sinkhorn(row: Dialect, names: Mapping[str, Any]) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The logits of H_res and how they become it, where the mixing is Sinkhorn's."""
    mixing = row.formulas.get("mixing")
    call = mixing.arguments("sinkhorn", names) if mixing and mixing.names <= names.keys() else None
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
    return values.T if part == "res" and values.ndim == 2 and row.sources_in_rows else values


def _square(mixing: Any, size: int, row: Dialect) -> np.ndarray:
    mixing = np.asarray(mixing)
    if mixing.shape != (size, size):
        raise FormulaError(f"mixing gives the shape {mixing.shape}; expected {(size, size)}")
    return mixing.T if row.sources_in_rows else mixing


def _weights(weights: Any, size: int, name: str, axis: int) -> np.ndarray | None:
    """Weights of a single read or write as a vector, of several as a matrix."""
    if weights is None:
        return None
    weights = np.asarray(weights)
    if weights.ndim not in (1, 2) or weights.shape[axis] != size:
        raise FormulaError(
            f"{name} gives the shape {weights.shape}; expected {size} weights, for each stream one"
        )
    return weights.ravel() if weights.size == size else weights
