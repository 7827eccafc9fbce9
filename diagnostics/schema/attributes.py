"""How are attributes and texts stored? As JSON has them, and texts as every reader can show them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError

# Runs of earlier versions have what is no text and no number as JSON text with this prefix; a user's own text that begins with
# it is stored like that, so that it is never parsed.
_JSON = "json:"


def encode_dataset(dataset: xr.Dataset) -> xr.Dataset:
    """A copy of a dataset that Zarr stores; its attributes are what JSON can express."""
    encoded = dataset.copy()
    encoded.attrs = _encode_attrs(dataset.attrs)
    as_objects: dict[Hashable, xr.Variable] = {}
    for name, variable in encoded.variables.items():
        variable.attrs = _encode_attrs(dataset.variables[name].attrs)
        # Chunks and filters of the file that it was read from do not fit another one.
        variable.encoding = {}
        # Fixed-width text is stored at its own width.
        if variable.dtype.kind in "OUT":
            texts = np.array([_storable(text) for text in variable.values.ravel().tolist()], object)
            as_objects[name] = xr.Variable(variable.dims, texts.reshape(variable.shape), variable.attrs)
    return encoded.assign(as_objects)  # at once: each time all indexes are compared


def decode_dataset(dataset: xr.Dataset) -> xr.Dataset:
    """The inverse of `encode_dataset`."""
    decoded = dataset.copy()
    decoded.attrs = _decode_attrs(dataset.attrs)
    for name, variable in decoded.variables.items():
        variable.attrs = _decode_attrs(dataset.variables[name].attrs)
    return decoded


def _encode_attrs(attrs: Mapping[Hashable, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps({str(key): value for key, value in attrs.items()}, default=json_default))
    return {key: _JSON + json.dumps(of) if _has_prefix(of) else of for key, of in plain.items()}


def _decode_attrs(attrs: Mapping[Hashable, Any]) -> dict[str, Any]:
    return {
        str(key): json.loads(of.removeprefix(_JSON)) if _has_prefix(of) else of for key, of in attrs.items()
    }


def _has_prefix(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_JSON)


def _storable(text: Any) -> Any:
    """A text that every format gives back as it was: half of a surrogate pair is no UTF-8, and NUL ends a text in C."""
    if not isinstance(text, str):
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\N{SYMBOL FOR NULL}")


def storable_texts(content: Any) -> Any:
    """What was read from JSON, with each text in it as every format can store it."""
    if isinstance(content, dict):
        return {_storable(key): storable_texts(value) for key, value in content.items()}
    if isinstance(content, list):
        return [storable_texts(value) for value in content]
    return _storable(content)


def storable_attributes(attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes that a caller asks for; InputError, with the name, for one that could not be saved."""
    for name, value in (attrs or {}).items():
        try:
            json.dumps(value, default=json_default)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"attrs contain {name!r}, which no file takes ({error}); give text, numbers, and lists and dicts of them"
            ) from None
    return dict(attrs or {})


def json_default(value: Any) -> Any:
    """What an attribute that JSON has no word for is written as: arrays, numbers of numpy, paths, tuples and sets."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    raise TypeError(
        f"an attribute has the type {type(value).__name__}; expected text, numbers, lists and dicts of them"
    )
