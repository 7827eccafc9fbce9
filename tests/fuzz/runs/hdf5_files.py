"""netCDF files with the structure of somebody else: links, filters, types, shapes and dimensions that no run has."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import h5py
import numpy as np

from tests.fuzz.kinds import Mutator, NotApplicable, Subject
from tests.fuzz.runs.files import copied

Edit = Callable[[h5py.File, Random, Path], str | None]
"""Changes an open file; returns why it must be refused even where its data read the same."""


def _editing(edit: Edit) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        path, subject = copied(rng, material, folder, ".nc")
        with h5py.File(path, "r+") as file:
            reason = edit(file, rng, folder)
        return {**subject, "refuse": reason} if reason else subject

    return mutate


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(names)


def _dataset(file: h5py.File, rng: Random, *, kinds: str = "fiub") -> str:
    names = [name for name in _datasets(file) if file[name].dtype.kind in kinds and file[name].ndim]
    if not names:
        raise NotApplicable
    return rng.choice(names)


def _variable(file: h5py.File, rng: Random) -> str:
    """A variable that is no dimension, so that nothing else refers to it."""
    names = [name for name in _datasets(file) if "REFERENCE_LIST" not in file[name].attrs and file[name].ndim]
    return rng.choice(names)


def _replace(file: h5py.File, name: str, **options) -> h5py.Dataset:
    """The variable again, stored in another way, with its dimensions and attributes."""
    old = file[name]
    values, attrs = (
        old[()],
        {key: old.attrs[key] for key in old.attrs if key not in ("DIMENSION_LIST", "REFERENCE_LIST")},
    )
    scales = [old.dims[i][0].name if len(old.dims[i]) else None for i in range(old.ndim)]
    raw = old.attrs.get("DIMENSION_LIST")
    names = [file[entry[0]].name for entry in raw] if raw is not None else scales
    del file[name]
    options = {"data": values, **options}
    if options["data"] is None:
        del options["data"]
    new = file.create_dataset(name, **options)
    for key, value in attrs.items():
        new.attrs[key] = value
    for axis, scale in enumerate(names):
        if scale is not None and scale in file and scale != new.name and axis < new.ndim:
            new.dims[axis].attach_scale(file[scale])
    return new


# --- links


def soft_link_cycle(file: h5py.File, rng: Random, folder: Path) -> None:
    file["trace"]["again"] = h5py.SoftLink("/trace/again")


def soft_link_loop(file: h5py.File, rng: Random, folder: Path) -> None:
    file["trace"]["a"], file["trace"]["b"] = h5py.SoftLink("/trace/b"), h5py.SoftLink("/trace/a")


def soft_link_to_parent(file: h5py.File, rng: Random, folder: Path) -> None:
    file["trace"]["up"] = h5py.SoftLink("/trace")


def soft_link_dangling(file: h5py.File, rng: Random, folder: Path) -> None:
    file["trace"][rng.choice(("nowhere", "residual2"))] = h5py.SoftLink("/not/there")


def hard_link_cycle(file: h5py.File, rng: Random, folder: Path) -> None:
    file["trace"]["self"] = file["trace"]


def hard_link_to_root(file: h5py.File, rng: Random, folder: Path) -> None:
    file["trace"][rng.choice(("root", "metrics"))] = file["/"]


def two_groups_in_a_circle(file: h5py.File, rng: Random, folder: Path) -> None:
    a, b = file["trace"].create_group("a"), file["trace"].create_group("b")
    a["b"], b["a"] = b, a


def many_paths_to_one(file: h5py.File, rng: Random, folder: Path) -> None:
    """2 to the power of 40 paths through 40 groups."""
    group = file["trace"]
    for _ in range(40):
        below = group.create_group("a")
        group["b"] = below
        group = below


def variable_as_soft_link(file: h5py.File, rng: Random, folder: Path) -> None:
    name = _variable(file, rng)
    file.move(name, "moved")
    file[name] = h5py.SoftLink("/moved")


def variable_swapped_by_links(file: h5py.File, rng: Random, folder: Path) -> None:
    names = [name for name in _datasets(file) if file[name].ndim]
    same = [(a, b) for a in names for b in names if a < b and file[a].shape == file[b].shape]
    if not same:
        raise NotApplicable
    a, b = rng.choice(same)
    file.move(a, "kept")
    file.move(b, a)
    file.move("kept", b)


def external_link_to_variable(file: h5py.File, rng: Random, folder: Path) -> str:
    name = _variable(file, rng)
    outside = folder / "outside" / "other.nc"
    outside.parent.mkdir()
    file.flush()
    shutil.copyfile(file.filename, outside)
    del file[name]
    file[name] = h5py.ExternalLink(rng.choice((str(outside), "outside/other.nc")), "/" + name)
    return "an external link"


def external_link_to_group(file: h5py.File, rng: Random, folder: Path) -> str:
    outside = folder / "other.nc"
    file.flush()
    shutil.copyfile(file.filename, outside)
    del file["trace"]
    file["trace"] = h5py.ExternalLink("other.nc", "/trace")
    return "an external link"


def external_link_to_special(file: h5py.File, rng: Random, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    target = rng.choice(
        ("pipe", "/dev/zero", "/dev/stdin", "run.nc", "/proc/self/mem", "/dev/tty", "missing.nc")
    )
    file["trace"]["extra"] = h5py.ExternalLink(target, "/trace")


def user_defined_link(file: h5py.File, rng: Random, folder: Path) -> None:
    """A class of link that no library knows: the class of an external link is overwritten in the file."""
    file["trace"]["custom"] = h5py.ExternalLink("usercls.nc", "/x")


# --- storage


def external_storage(file: h5py.File, rng: Random, folder: Path) -> str:
    name = _dataset(file, rng, kinds="fiu")
    values = file[name][()]
    outside = folder / "raw.bin"
    outside.write_bytes(values.tobytes())
    place = rng.choice((str(outside), "raw.bin"))
    new = _replace(
        file, name, data=None, shape=values.shape, dtype=values.dtype, external=[(place, 0, values.nbytes)]
    )
    return None if new is None else "external storage"


def external_storage_special(file: h5py.File, rng: Random, folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    name = _dataset(file, rng, kinds="fiu")
    place = rng.choice((str(folder / "pipe"), "/dev/zero", "/etc/passwd", "/proc/self/environ", "/dev/stdin"))
    shape, dtype = file[name].shape, file[name].dtype
    _replace(file, name, data=None, shape=shape, dtype=dtype, external=[(place, 0, h5py.h5f.UNLIMITED)])
    return "external storage"


def virtual_dataset(file: h5py.File, rng: Random, folder: Path) -> str:
    name = _dataset(file, rng, kinds="fiu")
    file.flush()
    shutil.copyfile(file.filename, folder / "source.nc")
    old = file[name]
    layout = h5py.VirtualLayout(shape=old.shape, dtype=old.dtype)
    source = rng.choice((str(folder / "source.nc"), "source.nc", "."))
    layout[...] = h5py.VirtualSource(source, "moved" if source == "." else name, shape=old.shape)
    if source == ".":
        file["moved"] = old
    scales = [old.dims[axis][0].name if len(old.dims[axis]) else None for axis in range(old.ndim)]
    del file[name]
    new = file.create_virtual_dataset(name, layout)
    for axis, scale in enumerate(scales):
        if scale and scale in file:
            new.dims[axis].attach_scale(file[scale])
    return "a virtual dataset"


def other_filter(file: h5py.File, rng: Random, folder: Path) -> None:
    options = rng.choice(
        (
            {"compression": "gzip", "compression_opts": 9},
            {"compression": "lzf"},
            {"shuffle": True},
            {"fletcher32": True},
            {"scaleoffset": 2},
            {"compression": "gzip", "shuffle": True, "fletcher32": True},
        )
    )
    name = _dataset(file, rng, kinds="f" if "scaleoffset" in options else "fi")
    _replace(file, name, chunks=True, **options)


def unknown_filter(file: h5py.File, rng: Random, folder: Path) -> None:
    """A filter that is not installed: its number would make HDF5 look for a plugin to load."""
    name = _dataset(file, rng)
    number = rng.choice((32001, 32004, 32008, 32015, 32026, 305, 65535, 4, 256))
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(file[name].shape)
    properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (1, 2, 3))
    values = file[name][()]
    del file[name]
    space = h5py.h5s.create_simple(values.shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(values.dtype), space, properties)
    made.write_direct_chunk((0,) * values.ndim, values.tobytes(), 0)


def gzip_bomb(file: h5py.File, rng: Random, folder: Path) -> None:
    """Gigabytes of zeros in a few hundred kilobytes."""
    name = rng.choice(["trace/residual", "trace/bomb", _variable(file, rng)])
    if name in file:
        del file[name]
    size = rng.choice((2**28, 2**29))
    made = file.create_dataset(
        name, shape=(size,), dtype="f4", chunks=(2**22,), compression="gzip", compression_opts=9
    )
    zeros = np.zeros(2**22, "f4")
    import zlib

    packed = zlib.compress(zeros.tobytes(), 9)
    for start in range(0, size, 2**22):
        made.id.write_direct_chunk((start,), packed)


def never_written(file: h5py.File, rng: Random, folder: Path) -> None:
    """A shape of terabytes, of which not a byte is in the file."""
    size = rng.choice((10**9, 10**12, 2**40))
    name = rng.choice(["trace/residual", "trace/extra", _variable(file, rng)])
    if name in file:
        del file[name]
    chunks = rng.choice((None, (2**20,)))
    file.create_dataset(name, shape=(size,), dtype=rng.choice(("f4", "f8", "i1")), chunks=chunks, fillvalue=0)


def huge_shape_with_dims(file: h5py.File, rng: Random, folder: Path) -> None:
    """A dimension grows to 10¹⁰, and a variable with it."""
    name = _dataset(file, rng, kinds="f")
    shape = list(file[name].shape)
    shape[rng.randrange(len(shape))] = 10**10
    _replace(file, name, data=None, shape=tuple(shape), dtype="f4", chunks=tuple(min(n, 64) for n in shape))


def tiny_chunks(file: h5py.File, rng: Random, folder: Path) -> None:
    name = rng.choice(("trace/extra", "trace/residual"))
    if name in file:
        del file[name]
    made = file.create_dataset(name, shape=(10**6,), dtype="i1", chunks=(8,))
    made[:80_000] = 1


def truncated_chunk(file: h5py.File, rng: Random, folder: Path) -> None:
    """A chunk of fewer bytes than its shape needs."""
    name = _dataset(file, rng, kinds="f")
    new = _replace(
        file, name, data=None, shape=file[name].shape, dtype="f4", chunks=file[name].shape, compression="gzip"
    )
    import zlib

    new.id.write_direct_chunk((0,) * new.ndim, zlib.compress(rng.randbytes(rng.choice((0, 3, 16, 10**6)))))


# --- types


def other_type(file: h5py.File, rng: Random, folder: Path) -> None:
    """The values of a variable in another type, or something that is no number at all."""
    name = _dataset(file, rng)
    values = file[name][()]
    dtype = rng.choice(("f2", "f4", "f8", ">f4", "i1", "i4", "i8", "u8", ">i2", "S5", "b1", "c8", "V16"))
    made = values.astype("S5") if dtype == "S5" else np.zeros(values.shape, dtype) if dtype == "V16" else None
    if made is None:
        with np.errstate(all="ignore"):
            made = values.astype(dtype)
    _replace(file, name, data=made)


def odd_type(file: h5py.File, rng: Random, folder: Path) -> None:  # noqa: C901 (a table of kinds)
    name = _dataset(file, rng)
    shape = file[name].shape
    size = int(np.prod(shape))
    kind = rng.choice(
        ("compound", "vlen", "enum", "reference", "region", "array", "text", "opaque", "bitfield")
    )
    if kind == "compound":
        _replace(file, name, data=np.zeros(shape, [("a", "f4"), ("b", "i8")]))
    elif kind == "vlen":
        new = _replace(file, name, data=None, shape=shape, dtype=h5py.vlen_dtype("f4"))
        new[...] = np.frompyfunc(lambda _: np.ones(3, "f4"), 1, 1)(np.zeros(shape))
    elif kind == "enum":
        _replace(file, name, data=np.zeros(shape, h5py.enum_dtype({"a": 0, "b": 1}, "i1")))
    elif kind == "reference":
        data = np.array([file["trace"].ref] * size, dtype=h5py.ref_dtype).reshape(shape)
        _replace(file, name, data=data, dtype=h5py.ref_dtype)
    elif kind == "region":
        _replace(file, name, data=None, shape=shape, dtype=h5py.regionref_dtype)
    elif kind == "array":
        _replace(file, name, data=None, shape=shape, dtype=np.dtype(("f4", (3,))))
    elif kind == "text":
        _replace(file, name, data=np.full(shape, "1.5", object), dtype=h5py.string_dtype())
    elif kind == "opaque":
        _replace(file, name, data=None, shape=shape, dtype=h5py.opaque_dtype(np.dtype("V8")))
    else:
        values = file[name]
        space, plist = h5py.h5s.create_simple(values.shape), h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        del file[name]
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_B32LE, space, plist)


def text_of_another_kind(file: h5py.File, rng: Random, folder: Path) -> None:
    """Labels that are no UTF-8, contain NUL, or are very long."""
    name = _dataset(file, rng, kinds="O")
    values = file[name][()]
    new = rng.choice(
        (
            b"\xff\xfe\x80",
            b"x" * 10**6,
            "\u202e\u0007".encode(),
            b"",
            b"../../etc/passwd",
            b"<script>alert(1)</script>",
        )
    )
    values[rng.randrange(len(values))] = new
    file[name][...] = values


# --- dimensions


def without_dimension_list(file: h5py.File, rng: Random, folder: Path) -> None:
    name = rng.choice([name for name in _datasets(file) if "DIMENSION_LIST" in file[name].attrs])
    del file[name].attrs["DIMENSION_LIST"]


def dimension_list_elsewhere(file: h5py.File, rng: Random, folder: Path) -> None:
    name = rng.choice([name for name in _datasets(file) if "DIMENSION_LIST" in file[name].attrs])
    old = file[name].attrs["DIMENSION_LIST"]
    target = file[rng.choice(_datasets(file))].ref if rng.random() < 0.7 else h5py.Reference()
    made = np.empty(len(old) if rng.random() < 0.7 else len(old) + 1, dtype=h5py.vlen_dtype(h5py.ref_dtype))
    for index in range(len(made)):
        made[index] = np.array([target] * rng.choice((0, 1, 1, 2)), dtype=h5py.ref_dtype)
    del file[name].attrs["DIMENSION_LIST"]
    file[name].attrs.create("DIMENSION_LIST", made, dtype=h5py.vlen_dtype(h5py.ref_dtype))


def dimension_list_of_other_type(file: h5py.File, rng: Random, folder: Path) -> None:
    name = rng.choice([name for name in _datasets(file) if "DIMENSION_LIST" in file[name].attrs])
    del file[name].attrs["DIMENSION_LIST"]
    file[name].attrs["DIMENSION_LIST"] = rng.choice(("text", 5, [1.5, 2.5], "x" * 10_000))


def without_scale(file: h5py.File, rng: Random, folder: Path) -> None:
    name = rng.choice([name for name in _datasets(file) if "CLASS" in file[name].attrs])
    for key in rng.sample(("CLASS", "NAME", "REFERENCE_LIST", "_Netcdf4Dimid"), rng.randint(1, 4)):
        if key in file[name].attrs:
            del file[name].attrs[key]


def other_dimension_ids(file: h5py.File, rng: Random, folder: Path) -> None:
    names = [
        name
        for name in _datasets(file)
        if "_Netcdf4Dimid" in file[name].attrs or "_Netcdf4Coordinates" in file[name].attrs
    ]
    if not names:
        raise NotApplicable
    name = rng.choice(names)
    key = rng.choice([key for key in ("_Netcdf4Dimid", "_Netcdf4Coordinates") if key in file[name].attrs])
    value = rng.choice((-1, 0, 7, 10**6, 2**31 - 1, "text", [0, 0, 0]))
    file[name].attrs[key] = value


def conflicting_dimension(file: h5py.File, rng: Random, folder: Path) -> None:
    """A dimension that is one longer than the variables on it."""
    name = rng.choice(
        [name for name in _datasets(file) if "CLASS" in file[name].attrs and file[name].dtype.kind in "fiu"]
    )
    values = file[name][()]
    values = np.append(values, values[-1:]) if rng.random() < 0.5 else values[:-1]
    attrs = {key: file[name].attrs[key] for key in file[name].attrs if key != "REFERENCE_LIST"}
    references = file[name].attrs.get("REFERENCE_LIST")
    users = [(file[entry[0]].name, int(entry[1])) for entry in references] if references is not None else []
    del file[name]
    new = file.create_dataset(name, data=values)
    for key, value in attrs.items():
        new.attrs[key] = value
    for user, axis in users:
        # HDF5 itself does not look at the length; a scale of a scale it refuses.
        with contextlib.suppress(RuntimeError):
            file[user].dims[axis].attach_scale(new)


def other_shape(file: h5py.File, rng: Random, folder: Path) -> None:
    """A variable loses an axis, gets one, or has none."""
    name = _dataset(file, rng, kinds="f")
    values = file[name][()]
    made = rng.choice(
        (values[..., None], values.reshape(-1), values[:1], values[:0], np.float32(1), values.T)
    )
    attrs = {
        key: file[name].attrs[key]
        for key in file[name].attrs
        if key not in ("DIMENSION_LIST", "REFERENCE_LIST")
    }
    del file[name]
    new = file.create_dataset(name, data=made)
    for key, value in attrs.items():
        new.attrs[key] = value


def renamed(file: h5py.File, rng: Random, folder: Path) -> None:
    name = rng.choice(_datasets(file))
    group = name.rpartition("/")[0]
    others = ("x", "residual2", "a b", "é", ".hidden", "layer ", "x" * 5000, "trace", "integrity")
    target = f"{group}/{rng.choice(others)}"
    if target in file:
        raise NotApplicable
    file.move(name, target)


def removed(file: h5py.File, rng: Random, folder: Path) -> None:
    del file[rng.choice([*_datasets(file), *file])]


def copied_variable(file: h5py.File, rng: Random, folder: Path) -> None:
    names = [name for name in _datasets(file) if "CLASS" not in file[name].attrs]
    name = rng.choice(names)
    file.copy(name, name + "_copy")


# --- many and deep


def deep_groups(file: h5py.File, rng: Random, folder: Path) -> None:
    group = file[rng.choice(("/", "trace"))]
    for _ in range(rng.choice((60, 1000, 3000))):
        group = group.create_group(rng.choice(("a", "encoder")))


def many_groups(file: h5py.File, rng: Random, folder: Path) -> None:
    group = file[rng.choice(("/", "trace"))]
    for index in range(rng.choice((2000, 20_000))):
        group.create_group(f"g{index}")


def many_variables(file: h5py.File, rng: Random, folder: Path) -> None:
    for index in range(rng.choice((2000, 10_000))):
        file.create_dataset(f"trace/v{index}", data=0.0)


def many_attributes(file: h5py.File, rng: Random, folder: Path) -> None:
    place = file[rng.choice(("/", "trace", "trace/residual"))]
    for index in range(rng.choice((2000, 20_000))):
        place.attrs[f"a{index}"] = index


# --- attributes


def odd_attribute(file: h5py.File, rng: Random, folder: Path) -> None:
    place = file[rng.choice(["/", *file, rng.choice(_datasets(file))])]
    keys = [key for key in place.attrs if key not in ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME")]
    key = rng.choice(
        [
            *keys,
            "new",
            "_FillValue",
            "units",
            "calendar",
            "scale_factor",
            "coordinates",
            "dtype",
            "missing_value",
        ]
    )
    values = (
        np.float64("nan"),
        2**63 - 1,
        -1,
        np.arange(7),
        np.zeros((2, 3)),
        "",
        "x" * 60_000,
        b"\xff\xfe",
        "json:" + "[" * 5000,
        "json:" + "[" * 100_000 + "]" * 100_000,
        "json:{",
        "json:NaN",
        'json:{"a":1,"a":2}',
        "json:1e999",
        "json:" + "9" * 5000,
        "days since 1970-01-01",
        "layer site nothing",
        h5py.Empty("f4"),
        np.zeros(0),
        np.array([b"a", b"b"]),
        True,
        "\x00",
        "object",
    )
    if key in place.attrs:
        del place.attrs[key]
    place.attrs[key] = rng.choice(values)


def odd_version(file: h5py.File, rng: Random, folder: Path) -> None:
    values = (
        "2.0",
        "99.0",
        "1",
        "1.99",
        "",
        "one",
        "-1",
        "1.1.1",
        "1e3",
        "١",
        1,
        1.1,
        float("nan"),
        "0.9",
        "1" * 5000,
        " 1.1",
    )
    file.attrs["schema_version"] = rng.choice(values)


def odd_reference_attribute(file: h5py.File, rng: Random, folder: Path) -> None:
    place = file[rng.choice(["/", "trace", rng.choice(_datasets(file))])]
    kind = rng.choice(("object", "region", "compound", "vlen", "enum", "bytes"))
    residual = next(file[name] for name in _datasets(file) if file[name].ndim)
    value = {
        "object": file["trace"].ref,
        "region": residual.regionref[:1],
        "compound": np.zeros(2, [("a", "f4"), ("b", "S3")]),
        "vlen": None,
        "enum": None,
        "bytes": np.void(b"\x00\xff"),
    }[kind]
    if kind == "vlen":
        made = np.empty(2, dtype=object)
        made[:] = [np.arange(2), np.arange(3)]
        place.attrs.create("odd", made, dtype=h5py.vlen_dtype("i4"))
    elif kind == "enum":
        place.attrs.create("odd", 1, dtype=h5py.enum_dtype({"a": 1}, "i1"))
    else:
        place.attrs["odd"] = value


def fill_value(file: h5py.File, rng: Random, folder: Path) -> None:
    """A value of the array becomes the one that means «missing»."""
    name = _dataset(file, rng, kinds="fi")
    values = file[name]
    key = rng.choice(("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned"))
    # h5netcdf writes _FillValue of floats by itself.
    if key in values.attrs:
        del values.attrs[key]
    value = {"scale_factor": 2.0, "add_offset": 1.0, "_Unsigned": "true"}.get(key)
    values.attrs[key] = value if value is not None else values[()].ravel()[0]


EDITS: tuple[Edit, ...] = (
    soft_link_cycle,
    soft_link_loop,
    soft_link_to_parent,
    soft_link_dangling,
    hard_link_cycle,
    hard_link_to_root,
    two_groups_in_a_circle,
    many_paths_to_one,
    variable_as_soft_link,
    variable_swapped_by_links,
    external_link_to_variable,
    external_link_to_group,
    external_link_to_special,
    external_storage,
    external_storage_special,
    virtual_dataset,
    other_filter,
    unknown_filter,
    gzip_bomb,
    never_written,
    huge_shape_with_dims,
    tiny_chunks,
    truncated_chunk,
    other_type,
    odd_type,
    text_of_another_kind,
    without_dimension_list,
    dimension_list_elsewhere,
    dimension_list_of_other_type,
    without_scale,
    other_dimension_ids,
    conflicting_dimension,
    other_shape,
    renamed,
    removed,
    copied_variable,
    deep_groups,
    many_groups,
    many_variables,
    many_attributes,
    odd_attribute,
    odd_version,
    odd_reference_attribute,
    fill_value,
)


def several(file: h5py.File, rng: Random, folder: Path) -> str | None:
    """Two or three small edits at once."""
    small = [
        edit
        for edit in EDITS
        if not edit.__name__.startswith(("many", "deep", "external", "gzip", "virtual"))
    ]
    for edit in rng.sample(small, rng.randint(2, 3)):
        edit(file, rng, folder)
    return None


def edited_link_class(rng: Random, material: Path, folder: Path) -> Subject:
    """A user-defined link: the class byte of an external link is overwritten."""
    path, subject = copied(rng, material, folder, ".nc")
    with h5py.File(path, "r+") as file:
        user_defined_link(file, rng, folder)
    data = bytearray(path.read_bytes())
    place = data.find(b"usercls.nc")
    # Somewhere before the name stands the link's class, 64.
    for offset in range(place - 1, max(0, place - 40), -1):
        if data[offset] == 64:
            data[offset] = rng.choice((65, 100, 255, 2))
            break
    path.write_bytes(data)
    return subject


MUTATORS: dict[str, Mutator] = {
    **{f"hdf5:{edit.__name__}": _editing(edit) for edit in (*EDITS, several)},
    "hdf5:user_defined_link": edited_link_class,
}
