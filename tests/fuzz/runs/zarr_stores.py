"""Zarr folders of somebody else: other codecs, types and versions, special files, links, bombs, and torn chunks."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.kinds import Mutator, NotApplicable, Subject
from tests.fuzz.runs.files import copied

Edit = Callable[[Path, Random], str | None]
"""Changes a store; returns why it must be refused even where its data read the same."""
JsonEdit = Callable[[dict[str, Any], Random], str | None]


class Canary:
    """Unpickled, it makes a file: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def _editing(edit: Edit) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        path, subject = copied(rng, material, folder, ".zarr")
        reason = edit(path, rng)
        return {**subject, "refuse": reason} if reason else subject

    return mutate


def arrays(store: Path) -> list[Path]:
    found = []
    for file in sorted(store.rglob("zarr.json")):
        if json.loads(file.read_text())["node_type"] == "array":
            found.append(file.parent)
    return found


def chunks(array: Path) -> list[Path]:
    return [file for file in sorted(array.rglob("*")) if file.is_file() and file.name != "zarr.json"]


def _chunk(store: Path, rng: Random) -> Path:
    found = [chunk for array in arrays(store) for chunk in chunks(array)]
    if not found:
        raise NotApplicable
    return rng.choice(found)


def _array_json(edit: JsonEdit) -> Edit:
    """An edit of the metadata of one array."""

    def wrapped(store: Path, rng: Random) -> str | None:
        file = rng.choice(arrays(store)) / "zarr.json"
        metadata = json.loads(file.read_text())
        reason = edit(metadata, rng)
        file.write_text(json.dumps(metadata))
        return reason

    wrapped.__name__ = edit.__name__
    return wrapped


# --- metadata of arrays


def other_codecs(metadata: dict[str, Any], rng: Random) -> None:
    """Codecs that the chunks were not written with, some of which run code or allocate."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    shape = metadata["shape"]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": rng.choice(([1] * len(shape), shape, [10**9] * len(shape))),
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": rng.choice(("end", "start")),
        },
    }
    options = (
        [little],
        [little, {"name": "gzip", "configuration": {"level": 5}}],
        [
            little,
            {
                "name": "blosc",
                "configuration": {
                    "cname": "zstd",
                    "clevel": 5,
                    "shuffle": "shuffle",
                    "typesize": 4,
                    "blocksize": 0,
                },
            },
        ],
        [{"name": "vlen-bytes"}],
        [{"name": "vlen-utf8"}],
        [{"name": "numcodecs.pickle", "configuration": {}}],
        [{"name": "pickle"}],
        [{"name": "numcodecs.json2"}],
        [{"name": "numcodecs.zlib", "configuration": {"level": 1}}, little],
        [little, {"name": "numcodecs.lz4", "configuration": {}}],
        [{"name": "transpose", "configuration": {"order": list(range(len(shape)))[::-1]}}, little],
        [{"name": "transpose", "configuration": {"order": [0] * len(shape)}}, little],
        [{"name": "bytes", "configuration": {"endian": "big"}}, *metadata["codecs"][1:]],
        [sharding],
        [little, {"name": "crc32c"}],
        [little, {"name": "no.such.codec"}],
        [little, {"name": "os.system"}],
        [{"name": "cast_value", "configuration": {"data_type": "int8"}}, little],
        [],
        ["bytes"],
        [None],
        metadata["codecs"] * 50,
        metadata["codecs"][::-1],
        {"name": "bytes"},
        "bytes",
        [{"name": "zstd", "configuration": {"level": 10**9, "checksum": "maybe"}}],
        [{"name": "zstd", "configuration": [1]}],
    )
    metadata["codecs"] = rng.choice(options)


def other_data_type(metadata: dict[str, Any], rng: Random) -> None:
    options = (
        "float16",
        "float32",
        "float64",
        "int8",
        "int64",
        "uint64",
        "bool",
        "complex64",
        "string",
        "bytes",
        "object",
        "O",
        "<f4",
        "variable_length_bytes",
        "r64",
        "r999999999999",
        {"name": "fixed_length_utf32", "configuration": {"length_bytes": rng.choice((4, 10**12))}},
        {"name": "null_terminated_bytes", "configuration": {"length_bytes": 10**12}},
        {"name": "raw_bytes", "configuration": {"length_bytes": 8}},
        {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}},
        {"name": "structured", "configuration": {"fields": [["a", "float32"], ["b", "int32"]]}},
        {"name": "numpy.void"},
        None,
        7,
        ["float32"],
    )
    metadata["data_type"] = rng.choice(options)


def other_shape(metadata: dict[str, Any], rng: Random) -> None:
    shape = metadata["shape"]
    if not shape:
        raise NotApplicable
    axis = rng.randrange(len(shape))
    value = rng.choice(
        (0, 1, shape[axis] + 1, shape[axis] * 2, 10**6, 10**12, 2**63, 2**64, -1, 1.5, "3", None, True)
    )
    metadata["shape"] = [*shape[:axis], value, *shape[axis + 1 :]]


def huge_shape(metadata: dict[str, Any], rng: Random) -> None:
    """10¹² elements in one chunk, or in 10¹² chunks; none of them is in the store."""
    shape = metadata["shape"] or [1]
    metadata["shape"] = [10**12, *shape[1:]]
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = rng.choice(
        (metadata["shape"], [1] * len(shape), shape)
    )


def other_chunks(metadata: dict[str, Any], rng: Random) -> None:
    shape = metadata["shape"] or [1]
    value = rng.choice(
        (
            [1] * len(shape),
            [0] * len(shape),
            [-1] * len(shape),
            [10**12] * len(shape),
            shape * 2,
            [],
            "auto",
            None,
            [1.5] * len(shape),
        )
    )
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = value


def other_grid(metadata: dict[str, Any], rng: Random) -> None:
    metadata["chunk_grid"] = rng.choice(
        (
            {"name": "irregular"},
            {"name": "rectilinear", "configuration": {"kind": "inline", "chunk_shapes": [[1, 10**9]]}},
            {},
            None,
            [],
        )
    )


def other_keys(metadata: dict[str, Any], rng: Random) -> None:
    """The names of chunks lead elsewhere."""
    metadata["chunk_key_encoding"] = rng.choice(
        (
            {"name": "v2", "configuration": {"separator": "."}},
            {"name": "default", "configuration": {"separator": "../"}},
            {"name": "default", "configuration": {"separator": "/../../"}},
            {"name": "default", "configuration": {"separator": "\x00"}},
            {"name": "suffix"},
            {},
            None,
            "default",
        )
    )


def other_fill_value(metadata: dict[str, Any], rng: Random) -> None:
    metadata["fill_value"] = rng.choice(
        (
            0,
            1,
            "NaN",
            "Infinity",
            "-Infinity",
            "0x7fc00000",
            None,
            True,
            [],
            {},
            "x" * 10**6,
            10**400,
            "AAAA",
            [1, 2],
            float("nan"),
            "0x",
        )
    )


def storage_transformers(metadata: dict[str, Any], rng: Random) -> None:
    metadata["storage_transformers"] = rng.choice(
        ([{"name": "sharding"}], [{"name": "x", "configuration": {}}], {"a": 1}, "x", [None])
    )


def other_dimension_names(metadata: dict[str, Any], rng: Random) -> None:
    names = metadata.get("dimension_names") or []
    metadata["dimension_names"] = rng.choice(
        (
            None,
            [],
            [None] * len(names),
            names[::-1] or ["x"],
            ["same"] * len(names),
            [*names, "more"],
            [1] * len(names),
            "depth",
            ["depth"] * len(names),
            [""] * len(names),
            ["a/b"] * len(names),
        )
    )


def unknown_field(metadata: dict[str, Any], rng: Random) -> None:
    metadata[rng.choice(("must_understand", "extra", "zarr_format2", ""))] = rng.choice(
        ({"must_understand": True}, 1, "x", None, {"name": "x"})
    )


def missing_field(metadata: dict[str, Any], rng: Random) -> None:
    del metadata[rng.choice(sorted(metadata))]


def field_of_other_type(metadata: dict[str, Any], rng: Random) -> None:
    metadata[rng.choice(sorted(metadata))] = rng.choice(
        (None, 0, -1, 3.5, "", "x", [], {}, [[]], True, {"name": []})
    )


def other_format(metadata: dict[str, Any], rng: Random) -> None:
    metadata["zarr_format"] = rng.choice((1, 2, 4, "3", None, 3.0, 10**30))


def other_node_type(metadata: dict[str, Any], rng: Random) -> None:
    metadata["node_type"] = rng.choice(("group", "file", "", None, 1))


def odd_attributes(metadata: dict[str, Any], rng: Random) -> None:
    deep: Any = 1
    for _ in range(rng.choice((50, 900))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    value = rng.choice(
        (
            deep,
            float("nan"),
            float("inf"),
            10**4000,
            "x" * 10**6,
            "json:" + "[" * 10**5,
            None,
            True,
            [1, "a", None],
            {},
            "json:1e999",
        )
    )
    key = rng.choice(
        (
            "new",
            "_FillValue",
            "units",
            "coordinates",
            "scale_factor",
            "add_offset",
            "dtype",
            "_ARRAY_DIMENSIONS",
            "missing_value",
        )
    )
    metadata["attributes"] = {**metadata.get("attributes", {}), key: value}


def attributes_of_other_type(metadata: dict[str, Any], rng: Random) -> None:
    metadata["attributes"] = rng.choice((None, [], "x", 1, [["a", 1]]))


ARRAY_JSON: tuple[JsonEdit, ...] = (
    other_codecs,
    other_data_type,
    other_shape,
    huge_shape,
    other_chunks,
    other_grid,
    other_keys,
    other_fill_value,
    storage_transformers,
    other_dimension_names,
    unknown_field,
    missing_field,
    field_of_other_type,
    other_format,
    other_node_type,
    odd_attributes,
    attributes_of_other_type,
)


# --- metadata as text


def _json_file(store: Path, rng: Random) -> Path:
    return rng.choice(sorted(store.rglob("zarr.json")))


def nested_json(store: Path, rng: Random) -> None:
    """Brackets in brackets, as deep as the parser's stack or deeper."""
    file = _json_file(store, rng)
    depth = rng.choice((500, 990, 5000, 10**6))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    middle = rng.choice(("", "1"))
    text = file.read_text()
    bomb = f"{opening * depth}{middle or 1}{closing * depth}"
    file.write_text(
        bomb
        if rng.random() < 0.3
        else text.replace('"attributes": {', f'"attributes": {{"deep": {bomb}, ', 1).replace(", }", "}")
    )


def huge_json(store: Path, rng: Random) -> None:
    file = _json_file(store, rng)
    metadata = json.loads(file.read_text())
    metadata["attributes"] = (
        {"many": list(range(2_000_000))}
        if rng.random() < 0.5
        else {f"k{i}": "x" * 50 for i in range(300_000)}
    )
    file.write_text(json.dumps(metadata))


def huge_number(store: Path, rng: Random) -> None:
    file = _json_file(store, rng)
    number = rng.choice(
        ("9" * 4000, "9" * 10**6, "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e-5000")
    )
    metadata = json.loads(file.read_text())
    metadata.setdefault("attributes", {})["number"] = "HERE"
    file.write_text(json.dumps(metadata).replace('"HERE"', number))


def duplicate_keys(store: Path, rng: Random) -> None:
    """Two values under one name: which one counts is anybody's guess."""
    file = rng.choice(arrays(store)) / "zarr.json"
    text = file.read_text().strip()
    other = rng.choice(
        (
            '"shape": [1]',
            '"data_type": "float64"',
            '"attributes": {}',
            '"node_type": "group"',
            '"fill_value": 1',
        )
    )
    file.write_text(text[:-1] + ", " + other + "}")


def other_encoding(store: Path, rng: Random) -> None:
    file = _json_file(store, rng)
    text = file.read_text()
    file.write_bytes(
        rng.choice(
            (
                text.encode("utf-16"),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-32"),
                text.encode() + b"\x00",
            )
        )
    )


# --- zarr 2


def _as_version_2(
    store: Path, rng: Random, *, compressor: Any, filters: Any, dtype: Any, payload: bytes
) -> None:
    """One array becomes an array of format 2 with these codecs; or the whole store becomes one."""
    everything = rng.random() < 0.5
    if everything:
        shutil.rmtree(store)
        (store / "trace").mkdir(parents=True)
        array = store / "trace" / "residual"
        for group in (store, store / "trace"):
            (group / ".zgroup").write_text('{"zarr_format": 2}')
        (store / ".zattrs").write_text('{"schema_version": "1.1", "family": "residual"}')
    else:
        array = rng.choice(arrays(store))
        shutil.rmtree(array)
    array.mkdir()
    metadata = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": dtype,
        "order": "C",
        "fill_value": rng.choice((None, 0)),
        "compressor": compressor,
        "filters": filters,
    }
    (array / ".zarray").write_text(json.dumps(metadata))
    (array / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["depth"]}')
    (array / "0").write_bytes(payload)


def _canary(store: Path) -> bytes:
    return pickle.dumps([Canary(store.parent / "canary"), [1], (1,)])


def pickle_filter_version_2(store: Path, rng: Random) -> None:
    _as_version_2(store, rng, compressor=None, filters=[{"id": "pickle"}], dtype="|O", payload=_canary(store))


def pickle_compressor_version_2(store: Path, rng: Random) -> None:
    dtype = rng.choice(("|O", "<f4", "|u1"))
    _as_version_2(store, rng, compressor={"id": "pickle"}, filters=None, dtype=dtype, payload=_canary(store))


def pickle_behind_other_codec(store: Path, rng: Random) -> None:
    codec, pack = rng.choice(
        (({"id": "zlib", "level": 1}, zlib.compress), ({"id": "gzip", "level": 1}, gzip.compress))
    )
    _as_version_2(
        store, rng, compressor=codec, filters=[{"id": "pickle"}], dtype="|O", payload=pack(_canary(store))
    )


def object_array_version_2(store: Path, rng: Random) -> None:
    filters = rng.choice(
        ([{"id": "vlen-utf8"}], [{"id": "json2"}], [{"id": "msgpack2"}], None, [{"id": "vlen-bytes"}])
    )
    _as_version_2(
        store,
        rng,
        compressor=None,
        filters=filters,
        dtype="|O",
        payload=rng.choice((b"", b"[1]", rng.randbytes(40))),
    )


def pickle_in_version_3(store: Path, rng: Random) -> None:
    """The same attack in the metadata of format 3."""
    array = rng.choice(arrays(store))
    file = array / "zarr.json"
    metadata = json.loads(file.read_text())
    name = rng.choice(("numcodecs.pickle", "pickle", "https://zarr.dev/numcodecs/pickle"))
    metadata["codecs"] = rng.choice(
        ([{"name": name, "configuration": {"protocol": 5}}], [{"name": "bytes"}, {"name": name}])
    )
    file.write_text(json.dumps(metadata))
    for chunk in chunks(array):
        chunk.write_bytes(_canary(store))


def consolidated_version_2(store: Path, rng: Random) -> None:
    (store / ".zmetadata").write_text(
        json.dumps({"zarr_consolidated_format": 1, "metadata": {".zgroup": {"zarr_format": 2}}})
    )
    if rng.random() < 0.5:
        (store / "zarr.json").unlink()


def consolidated_disagrees(store: Path, rng: Random) -> None:
    """Consolidated metadata with another shape than the array's own."""
    file = store / "zarr.json"
    metadata = json.loads(file.read_text())
    array = rng.choice(arrays(store))
    own = json.loads((array / "zarr.json").read_text())
    own["shape"] = [10**9] * len(own["shape"])
    inner = {str(array.relative_to(store)): own}
    metadata["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": rng.choice((inner, {}, None, [], {"x": 1})),
    }
    file.write_text(json.dumps(metadata))


# --- chunks


def deleted_chunk(store: Path, rng: Random) -> None:
    _chunk(store, rng).unlink()


def emptied_chunk(store: Path, rng: Random) -> None:
    _chunk(store, rng).write_bytes(b"")


def renamed_chunk(store: Path, rng: Random) -> None:
    chunk = _chunk(store, rng)
    chunk.rename(chunk.with_name(rng.choice(("1", "00", "0.tmp", "-1", "x"))))


def extra_chunk(store: Path, rng: Random) -> None:
    chunk = _chunk(store, rng)
    shutil.copyfile(chunk, chunk.with_name(rng.choice(("7", "1", ".hidden", "0.bak"))))


def chunk_of_another_array(store: Path, rng: Random) -> None:
    first, second = rng.sample([chunk for array in arrays(store) for chunk in chunks(array)], 2)
    shutil.copyfile(first, second)


def zstd_bomb(store: Path, rng: Random) -> None:
    """A frame of a gigabyte of zeros where a chunk should be."""
    from numcodecs import Zstd

    frame = bytes(Zstd(level=19).encode(bytes(2**28)))
    _chunk(store, rng).write_bytes(frame * rng.choice((1, 4)))


def zstd_declares_much(store: Path, rng: Random) -> None:
    """A frame header that declares terabytes, with nothing after it."""
    size = rng.choice((2**33, 2**40, 2**62))
    _chunk(store, rng).write_bytes(b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00")


def wrong_text_lengths(store: Path, rng: Random) -> None:
    """The lengths inside a chunk of text: billions of strings, or strings beyond its end; its checksum fits."""
    import google_crc32c

    texts = [
        array
        for array in arrays(store)
        if json.loads((array / "zarr.json").read_text())["data_type"] == "string"
    ]
    if not texts:
        raise NotApplicable
    for chunk in chunks(rng.choice(texts)):
        data = bytearray(chunk.read_bytes()[:-4])
        place = rng.choice((0, 4, rng.randrange(0, len(data) - 4)))
        data[place : place + 4] = rng.choice((2**31 - 1, 2**32 - 1, 10**6, 0)).to_bytes(4, "little")
        chunk.write_bytes(data + google_crc32c.value(bytes(data)).to_bytes(4, "little"))


def sparse_chunk(store: Path, rng: Random) -> None:
    """A chunk file of a terabyte without a block on the disc."""
    with open(_chunk(store, rng), "r+b") as file:
        file.truncate(rng.choice((2**33, 2**38)))


# --- what is not a file


def special_file(store: Path, rng: Random) -> str:
    """A FIFO, a socket, a device or a folder where a chunk or metadata should be."""
    target = _chunk(store, rng) if rng.random() < 0.6 else _json_file(store, rng)
    target.unlink()
    kind = rng.choice(("fifo", "fifo", "socket", "zero", "random", "tty", "folder", "mem", "stdin", "full"))
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "socket":
        os.chdir(target.parent)  # the path of a socket is short
        socket.socket(socket.AF_UNIX).bind(target.name)
    elif kind == "folder":
        target.mkdir()
    else:
        places = {
            "zero": "/dev/zero",
            "random": "/dev/urandom",
            "tty": "/dev/tty",
            "mem": "/proc/self/mem",
            "stdin": "/dev/stdin",
        }
        target.symlink_to(places.get(kind, "/dev/full"))
    return "a special file"


def whole_store_is_special(store: Path, rng: Random) -> str:
    shutil.rmtree(store)
    kind = rng.choice(("fifo", "file", "zero", "loop", "empty", "dangling"))
    if kind == "fifo":
        os.mkfifo(store)
    elif kind == "file":
        store.write_bytes(rng.randbytes(100))
    elif kind == "empty":
        store.mkdir()
    else:
        store.symlink_to({"zero": "/dev/zero", "loop": store.name, "dangling": "nothing"}[kind])
    return "no store"


def link_outside(store: Path, rng: Random) -> str:
    """A chunk, an array or a group outside of the store, reached by a link."""
    place = rng.choice(
        (_chunk(store, rng), rng.choice(arrays(store)), store / "trace", _json_file(store, rng))
    )
    outside = store.parent / "outside" / place.name
    outside.parent.mkdir()
    shutil.move(place, outside)
    place.symlink_to(outside if rng.random() < 0.5 else os.path.relpath(outside, place.parent))
    return "a link to outside"


def link_inside(store: Path, rng: Random) -> None:
    first, second = rng.sample(arrays(store), 2)
    shutil.rmtree(first)
    first.symlink_to(os.path.relpath(second, first.parent))


def link_cycle(store: Path, rng: Random) -> None:
    place = rng.choice((store, store / "trace", rng.choice(arrays(store))))
    (place / rng.choice(("again", "encoder", "c2"))).symlink_to(rng.choice((".", "..", str(store), "again")))


def hard_link_outside(store: Path, rng: Random) -> None:
    os.link(_chunk(store, rng), store.parent / "same")


def without_permission(store: Path, rng: Random) -> None:
    """Has no effect for root, who may read everything."""
    os.chmod(rng.choice((_chunk(store, rng), _json_file(store, rng), store / "trace")), 0)


# --- many and deep


def deep_folders(store: Path, rng: Random) -> None:
    depth = rng.choice((100, 900))
    place = os.path.join("trace", "a") if rng.random() < 0.5 else "a"
    os.chdir(store)
    os.makedirs(place, exist_ok=True)
    os.chdir(place)
    for _ in range(depth):
        Path("zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        os.mkdir("a")
        os.chdir("a")
    Path("zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')


def many_groups(store: Path, rng: Random) -> None:
    place = rng.choice((store, store / "trace"))
    for index in range(rng.choice((500, 5000))):
        (place / f"g{index}").mkdir()
        (place / f"g{index}" / "zarr.json").write_text(
            '{"zarr_format": 3, "node_type": "group", "attributes": {}}'
        )


def many_files(store: Path, rng: Random) -> None:
    place = rng.choice((store, store / "trace", rng.choice(arrays(store))))
    for index in range(20_000):
        (place / f"f{index}").touch()


def removed_node(store: Path, rng: Random) -> None:
    place = rng.choice([*arrays(store), store / "trace"])
    shutil.rmtree(place) if rng.random() < 0.5 else (place / "zarr.json").unlink()


def renamed_node(store: Path, rng: Random) -> None:
    place = rng.choice([*arrays(store), store / "trace"])
    target = place.with_name(rng.choice(("x", "a b", "é", ".hidden", "__x", "con", "a\nb", "-rf", "<b>")))
    place.rename(target)


def swapped_nodes(store: Path, rng: Random) -> None:
    first, second = rng.sample(arrays(store), 2)
    first.rename(store / "kept")
    second.rename(first)
    (store / "kept").rename(second)


EDITS: tuple[Edit, ...] = (
    *map(_array_json, ARRAY_JSON),
    nested_json,
    huge_json,
    huge_number,
    duplicate_keys,
    other_encoding,
    pickle_filter_version_2,
    pickle_compressor_version_2,
    pickle_behind_other_codec,
    object_array_version_2,
    pickle_in_version_3,
    consolidated_version_2,
    consolidated_disagrees,
    deleted_chunk,
    emptied_chunk,
    renamed_chunk,
    extra_chunk,
    chunk_of_another_array,
    zstd_bomb,
    zstd_declares_much,
    wrong_text_lengths,
    sparse_chunk,
    special_file,
    whole_store_is_special,
    link_outside,
    link_inside,
    link_cycle,
    hard_link_outside,
    without_permission,
    deep_folders,
    many_groups,
    many_files,
    removed_node,
    renamed_node,
    swapped_nodes,
)


def several(store: Path, rng: Random) -> None:
    """Two or three edits of metadata and chunks at once."""
    for edit in rng.sample(
        [*map(_array_json, ARRAY_JSON), deleted_chunk, chunk_of_another_array, renamed_node],
        rng.randint(2, 3),
    ):
        edit(store, rng)


MUTATORS: dict[str, Mutator] = {f"zarr:{edit.__name__}": _editing(edit) for edit in (*EDITS, several)}
