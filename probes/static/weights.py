"""What are the weights of a recognised connection at an input that adds nothing? The functions of its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.dialect import Dialect, Values
from depthscope.probes.static.dialects import sinkhorn
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

    Raises CheckpointError: Where a function of the row cannot be computed on these tensors.
    """
    row, n = found.dialect, found.streams
    given = Values(**{"n": n, **found.sizes, **constants, **values})
    try:
        gates = {} if row.gates is None else row.gates(given)
        parts = {} if row.parts is None else row.parts(given)
        known = StaticWeights(
            biases={part: _oriented(bias, row, part) for part, bias in parts.items() if bias is not None},
            gates={part: float(np.ravel(gate)[0]) for part, gate in gates.items() if gate is not None},
        )
        if found.withheld:
            return known
        given = Values(**vars(given), **parts)
        functions = {"pre": row.read, "post": row.write, "res": row.mixing}
        how = {} if row.sinkhorn is None else row.sinkhorn(given)
        if how:
            functions["res"] = lambda given: sinkhorn(given.res, **how)
        results: dict[str, Any] = {
            part: _of_streams(function(given), part, (n, n) if part == "res" else (n,), row)
            for part, function in functions.items()
            # Without an optional tensor there is nothing to compute from.
            if function is not None and parts.get(part, ()) is not None
        }
        query = None if row.query is None else np.atleast_2d(row.query(given))
    except AttributeError as error:
        raise CheckpointError(
            f"dialect {row.name!r}, at {found.module}: {error.name!r} is not a tensor, size, constant or part of the row; "
            "correct the row"
        ) from error
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"dialect {row.name!r}, at {found.module}: {error}; correct the row") from error
    if how:
        known = replace(known, logits=known.biases["res"], sinkhorn=_described(how, row))
    return replace(known, **results, query=query)


def _described(how: Mapping[str, Any], row: Dialect) -> dict[str, Any]:
    """How logits become H_res, whose rows are destinations: the last side is in the orientation of the module."""
    last_is_columns = how.get("last", "columns") == "columns"
    return {
        "sinkhorn_steps": int(how["rounds"]),
        "last": "row" if last_is_columns == row.sources_in_rows else "column",
        "floor": float(how.get("floor", 0.0)),
    }


def _oriented(values: np.ndarray, row: Dialect, part: str) -> np.ndarray:
    """With destinations in the rows."""
    values = np.asarray(values)
    return values.T if part == "res" and values.ndim == 2 and row.sources_in_rows else values


def _of_streams(values: np.ndarray, part: str, shape: tuple[int, ...], row: Dialect) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != shape:
        raise InputError(f"H_{part} has the shape {values.shape}; expected {shape}")
    return _oriented(values, row, part)
