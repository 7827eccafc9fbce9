"""Is a netCDF file built only of what a run is written with? Its links, types, filters and sizes, before any array is read."""

# netCDF-4 is HDF5, which can do more than store arrays: links that open other files, arrays in external or virtual files,
# filters that are loaded from shared libraries, groups that contain themselves. A run has none of these.

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5t, h5z

from depthscope.diagnostics.schema.limits import (
    MAX_ATTRIBUTES,
    MAX_DEPTH,
    MAX_GROUPS,
    MAX_TEXT,
    MAX_VARIABLES,
    Limit,
)
from depthscope.diagnostics.schema.validation import SchemaError

# With dimensions in netCDF's own words: which scales a variable has, and which variables a scale. They are references to
# objects of the same file, which h5netcdf follows.
_NETCDF_REFERENCES = {b"DIMENSION_LIST", b"REFERENCE_LIST"}
_DIMENSION_WITHOUT_VARIABLE = b"This is a netCDF dimension but not a netCDF variable"


def check_hdf5(path: Path, max_bytes: int | None) -> None:
    """Refuse an HDF5 file that has anything else in it than groups, plain arrays and short attributes."""
    size = path.stat().st_size
    declared = stored = 0
    with h5py.File(path, "r") as file:
        for name, variable in _variables(file.id):
            _check_attributes(variable, name)
            declared_here, stored_here = _check_variable(variable, name)
            _read_labels(variable, name)
            declared += declared_here
            stored += stored_here
    # More than the file has: several variables that share bytes.
    if stored > size:
        raise SchemaError(f"its arrays store {stored} bytes, more than the file has ({size})")
    Limit.of(size, max_bytes).check(declared)


def _variables(file: Any) -> Iterator[tuple[str, Any]]:
    """Every dataset of a file with its path; groups are checked on the way."""
    root = h5g.open(file, b"/")
    waiting = [("", root, 0)]
    # By address: a group may be linked from several places, itself among them.
    seen = {h5o.get_info(root).addr}
    num_variables = 0
    while waiting:
        path, group, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise SchemaError(f"{path} is {depth} groups deep; a run has at most {MAX_DEPTH}")
        _check_attributes(group, path or "/")
        for link in _links(group, path):
            name = f"{path}/{link.decode('utf-8', 'replace')}"
            child = h5o.open(group, link)
            address = h5o.get_info(child).addr
            if address in seen:
                raise SchemaError(f"{name} is a second link to an object; expected one each")
            seen.add(address)
            if isinstance(child, h5g.GroupID):
                waiting.append((name, child, depth + 1))
            elif isinstance(child, h5d.DatasetID):
                num_variables += 1
                yield name, child
            else:
                raise SchemaError(f"{name} is a named type; expected groups and variables only")
        if num_variables > MAX_VARIABLES or len(seen) - num_variables > MAX_GROUPS:
            raise SchemaError(
                f"it has more than {MAX_VARIABLES} variables or {MAX_GROUPS} groups, which no run has"
            )


def _links(group: Any, path: str) -> list[bytes]:
    names: list[bytes] = []
    if group.get_num_objs() > MAX_VARIABLES:  # before the names are listed
        raise SchemaError(
            f"{path or '/'} has {group.get_num_objs()} entries; at most {MAX_VARIABLES} are read"
        )
    group.links.iterate(names.append)
    kinds = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}
    for name in names:
        kind = group.links.get_info(name).type
        if kind != h5l.TYPE_HARD:
            raise SchemaError(
                f"{path}/{name.decode('utf-8', 'replace')} is {kinds.get(kind, 'a link of an unknown kind')}; a run has "
                "everything in its own file"
            )
    return names


def _check_variable(variable: Any, name: str) -> tuple[int, int]:
    """Bytes that a variable has by its shape and type, and bytes that are stored of it."""
    plist = variable.get_create_plist()
    if plist.get_layout() == h5d.VIRTUAL or plist.get_external_count():
        raise SchemaError(f"{name} is stored in other files; a run has everything in its own file")
    for index in range(plist.get_nfilters()):
        identifier, *_, label = plist.get_filter(index)
        # Others are decompressors, which a run does not need, or plug-ins, which are loaded from shared libraries.
        if identifier != h5z.FILTER_FLETCHER32:
            raise SchemaError(
                f"{name} has the filter {label.decode('ascii', 'replace') or identifier}; expected none but checksums"
            )
    _check_type(variable.get_type(), name)
    declared = variable.get_type().get_size() * int(np.prod(variable.shape, dtype=object))
    stored = variable.get_storage_size()
    # Never written: reading it would give fill values, as many as it declares.
    if stored < declared:
        # netCDF writes no values for a dimension without labels, and none are read.
        if _is_dimension(variable):
            return 0, stored
        raise SchemaError(f"{name} has {declared} bytes by its shape, but {stored} are stored")
    return declared, stored


def _read_labels(variable: Any, name: str) -> None:
    """Read a short one-dimensional array: xarray does when it opens the file, and its error names no variable."""
    if len(variable.shape) == 1 and variable.get_storage_size() <= MAX_TEXT:
        try:
            h5py.Dataset(variable)[()]
        except (OSError, RuntimeError, ValueError) as error:
            raise SchemaError(f"{name} is damaged ({error})") from error


def _is_dimension(variable: Any) -> bool:
    if not h5a.exists(variable, b"NAME"):
        return False
    return bytes(_attribute_value(h5a.open(variable, b"NAME"))).startswith(_DIMENSION_WITHOUT_VARIABLE)


def _check_type(kind: Any, name: str) -> None:
    is_complex = kind.get_class() == h5t.COMPOUND and kind.dtype.kind == "c"
    if kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.STRING) or is_complex:
        return
    raise SchemaError(f"{name} has the type {kind.dtype}; expected numbers or text")


def _check_attributes(owner: Any, name: str) -> None:
    count = h5a.get_num_attrs(owner)
    if count > MAX_ATTRIBUTES:
        raise SchemaError(f"{name} has {count} attributes; at most {MAX_ATTRIBUTES} are read")
    for index in range(count):
        attribute = h5a.open(owner, index=index)
        kind = attribute.get_type()
        label = f"attribute {attribute.name.decode('utf-8', 'replace')!r} of {name}"
        if attribute.get_storage_size() > MAX_TEXT:
            raise SchemaError(
                f"the {label} has {attribute.get_storage_size()} bytes; at most {MAX_TEXT} are read"
            )
        if attribute.name not in _NETCDF_REFERENCES:
            _check_type(kind, f"the {label}")


def _attribute_value(attribute: Any) -> bytes:
    values = np.empty(attribute.shape, attribute.dtype)
    attribute.read(values)
    value = values[()]
    return value if isinstance(value, bytes) else bytes(str(value), "utf-8")
