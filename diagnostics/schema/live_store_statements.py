"""What JSON may the log of a live store contain? Variables, coordinates, attributes, attempts: parsed into checked types.

Each function raises ValueError, with what came and what was expected. The writer asks the same before it writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.attributes import json_default, storable_texts
from depthscope.diagnostics.schema.groups import GROUPS
from depthscope.diagnostics.schema.limits import MAX_ATTRIBUTES, MAX_JSON_DEPTH
from depthscope.diagnostics.schema.live_store_frames import MAX_PAYLOAD

MAX_JSON = 4 << 20
"""Bytes of JSON in a frame, and of all that is in memory: parsed, they take up to 54 times as much."""

_GROUP = rf"({'|'.join(GROUPS)})(/[^/\x00]{{1,200}})?"
_PATH = re.compile(rf"({_GROUP})?")
_NAME = re.compile(rf"{_GROUP}/[^/\x00]{{1,200}}")
_FIELDS = {"dims", "values", "attrs"}
# What `datetime` knows: up to the year 9999.
_LAST_SECOND = 253_402_300_799


def parsed(payload: bytes) -> dict[str, Any]:
    """The JSON object of a frame; its texts can be printed and saved."""
    if len(payload) > MAX_JSON:
        raise InputError(f"{len(payload)} bytes of JSON, expected at most {MAX_JSON}")
    content = json.loads(payload)
    _require_depth(content)
    # Half of a surrogate pair and NUL come escaped.
    return _mapping(storable_texts(content) if b"\\u" in payload else content, "a frame")


def as_json(content: Mapping[str, Any]) -> bytes:
    """A payload that `parsed` reads."""
    payload = json.dumps(content, default=json_default).encode()
    parsed(payload)
    return payload


def _require_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        inner = [each for each in level if isinstance(each, (list, dict)) and each]
        if not inner:
            return
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
    raise InputError(f"JSON of more than {MAX_JSON_DEPTH} levels")


def _mapping(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{what} is a {type(content).__name__}, expected an object")
    return content


def is_count(value: Any) -> bool:
    """Whether a value of a file is an integer from 0 on that a file can have."""
    return type(value) is int and 0 <= value < 1 << 48


def step_of(value: Any) -> int:
    """A step: an integer of 64 bits."""
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise InputError(f"the step is {value!r}, expected a whole number")
    return value


def time_of(value: Any) -> float:
    """Seconds since 1970."""
    if type(value) not in (int, float) or not 0 <= value <= _LAST_SECOND:
        raise InputError(f"the time is {value!r}, expected seconds since 1970")
    return float(value)


def created_of(value: Any) -> str:
    """A time as text."""
    datetime.fromisoformat(value)
    return str(value)


# --- variables and coordinates


@dataclass(frozen=True)
class Declared:
    """A variable that has one value per step."""

    dims: tuple[str, ...]  # without the step
    shape: tuple[int, ...]  # of one step
    dtype: str  # ``"<f8"`` or ``"<f4"``
    attrs: Mapping[str, Any] = field(default_factory=dict)  # of the variable

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype, made once: a row is written every few milliseconds."""
        return np.dtype(self.dtype)

    @cached_property
    def num_bytes(self) -> int:
        """Of one step."""
        return math.prod(self.shape) * int(self.dtype[-1])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"dims": self.dims, "shape": self.shape, "dtype": self.dtype, "attrs": dict(self.attrs)}


def declared_of(name: str, fields: Any) -> Declared:
    """What is said of a variable ``group/name`` or ``group/chain/name``."""
    fields = _mapping(fields, name)
    shape = fields["shape"]
    if not isinstance(shape, (list, tuple)) or not all(map(is_count, shape)):
        raise InputError(f"{name} has the shape {shape!r}")
    dims = _dims(name, fields["dims"], len(shape))
    if fields["dtype"] not in ("<f8", "<f4"):
        raise InputError(f"{name} has the dtype {fields['dtype']!r}, expected <f8 or <f4")
    found = Declared(dims, tuple(shape), fields["dtype"], attributes_of(name, fields["attrs"]))
    if found.num_bytes > MAX_PAYLOAD:
        raise InputError(f"{name} has {found.num_bytes} bytes per row, expected at most {MAX_PAYLOAD}")
    return found


def _dims(name: str, dims: Any, number: int) -> tuple[str, ...]:
    if not _NAME.fullmatch(name) or name.endswith("/step"):
        raise InputError(f"{name!r} is not a name of a variable in {', '.join(GROUPS)}")
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, str) for dim in dims):
        raise InputError(f"{name} has the dims {dims!r}")
    if len(dims) != number or len({*dims, "step"}) != number + 1:
        raise InputError(f"{name} has the dims {tuple(dims)}, expected {number}, each once, without the step")
    return tuple(dims)


def coordinate_of(name: str, fields: Any) -> dict[str, Any]:
    """A coordinate: its ``dims``, ``values`` as an array of numbers or of texts, and ``attrs``."""
    fields = _mapping(fields, name)
    if set(fields) != _FIELDS:
        raise InputError(f"the coordinate {name} has {sorted(fields)}, expected {sorted(_FIELDS)}")
    # As objects first: an array of texts takes for each as much as for the longest one.
    values = np.array(fields["values"], dtype=object)
    kinds = {type(value) for value in values.ravel().tolist()}
    if not (kinds <= {int, float} or kinds in ({str}, {bool})):
        kind = sorted(kind.__name__ for kind in kinds)
        raise InputError(f"the values of {name} are {', '.join(kind)}; expected numbers or texts")
    if kinds != {str}:
        dtype = bool if kinds == {bool} else np.int64 if kinds == {int} else np.float64
        values = values.astype(dtype)
    dims = _dims(name, fields["dims"], values.ndim)
    return {"dims": dims, "values": values, "attrs": attributes_of(name, fields["attrs"])}


# --- notes


def attributes_of(path: str, attrs: Any) -> dict[str, Any]:
    """Attributes of a group, or of the variable of that name."""
    if not (_PATH.fullmatch(path) or _NAME.fullmatch(path)):
        raise InputError(f"{path!r} is not a group of a run")
    if len(_mapping(attrs, f"the attributes of {path or 'the run'}")) > MAX_ATTRIBUTES:
        raise InputError(f"{len(attrs)} attributes of {path or 'the run'}, expected at most {MAX_ATTRIBUTES}")
    return dict(attrs)


def attempt_of(fields: Any) -> dict[str, Any]:
    """One attempt at the training: who wrote from when on, and where it went on."""
    fields = _mapping(fields, "an attempt")
    pid, host, resumed = fields["pid"], fields["host"], fields.get("resumed", [])
    if not is_count(pid) or not isinstance(host, str) or not isinstance(resumed, list):
        raise InputError(f"an attempt of process {pid!r} on {host!r} with {type(resumed).__name__}")
    return {
        "time": time_of(fields["time"]),
        "pid": pid,
        "host": host[:255],
        "resumed": [
            {"step": step_of(one["step"]), "superseded": _count(one["superseded"])} for one in resumed
        ],
    }


def _count(value: Any) -> int:
    if not is_count(value):
        raise InputError(f"{value!r} rows, expected a number of them")
    return int(value)
