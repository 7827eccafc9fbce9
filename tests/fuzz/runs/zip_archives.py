"""Zip files of somebody else: names that leave the archive, bombs, overlaps, lies about sizes, encryption."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.kinds import Mutator, NotApplicable, Subject
from tests.fuzz.runs import zarr_stores
from tests.fuzz.runs.base_runs import choose

Edit = Callable[[Path, Random], str | None]


def _editing(edit: Edit) -> Mutator:
    def mutate(rng: Random, material: Path, folder: Path) -> Subject:
        base = choose(rng, material, ".zarr.zip")
        path = folder / "run.zarr.zip"
        path.write_bytes(base.read_bytes())
        reason = edit(path, rng)
        subject = {"path": str(path), "base": base.name}
        return {**subject, "refuse": reason} if reason else subject

    return mutate


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def write(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def _record(data: bytes, rng: Random, mark: bytes) -> int:
    """The place of a random central or local header."""
    places = [index for index in range(len(data)) if data[index : index + 4] == mark]
    if not places:
        raise NotApplicable
    return rng.choice(places)


def _patch_central(path: Path, rng: Random, offset: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    place = _record(data, rng, b"PK\x01\x02") + offset
    data[place : place + len(value)] = value
    path.write_bytes(data)


def deflated(path: Path, rng: Random) -> None:
    write(path, entries(path), rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


def deflated_bomb(path: Path, rng: Random) -> None:
    """A gigabyte of zeros or blanks in a megabyte, as a chunk, as metadata, or as an extra file."""
    files = entries(path)
    name = rng.choice([*files, "extra", "zarr.json", "trace/zarr.json"])
    kept = files.get(name, b"")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, data in files.items():
            if other != name:
                archive.writestr(other, data)
        with archive.open(name, "w", force_zip64=True) as entry:
            entry.write(kept)
            for _ in range(16):
                entry.write((b" " if name.endswith("json") else b"\0") * 2**26)


def quine(path: Path, rng: Random) -> None:
    """An entry that contains the archive itself."""
    files = entries(path)
    files[rng.choice(("run.zarr.zip", "trace/run.zarr.zip"))] = path.read_bytes()
    write(path, files)


def overlapping(path: Path, rng: Random) -> None:
    """Two entries of the directory point to the same data."""
    data = bytearray(path.read_bytes())
    first, second = (_record(data, rng, b"PK\x01\x02") for _ in range(2))
    data[first + 42 : first + 46] = data[second + 42 : second + 46]
    path.write_bytes(data)


def huge_directory(path: Path, rng: Random) -> None:
    """A hundred thousand and more entries of nothing."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for index in range(rng.choice((70_000, 120_000))):
            archive.writestr(f"trace/e{index}", b"")


def claimed_entries(path: Path, rng: Random) -> None:
    """The end of the archive declares another number of entries, size or place of the directory."""
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    offset, size = rng.choice(((8, 2), (10, 2), (12, 4), (16, 4), (4, 2), (6, 2)))
    data[end + offset : end + offset + size] = rng.choice((b"\xff" * size, bytes(size), rng.randbytes(size)))
    path.write_bytes(data)


def leaving_names(path: Path, rng: Random) -> str:
    files = entries(path)
    name = rng.choice(
        (
            "../outside",
            "/etc/passwd",
            "trace/../../x",
            "C:\\x",
            "..\\x",
            "trace//residual/zarr.json",
            "./zarr.json",
            "a\x00b",
            "//x",
        )
    )
    if rng.random() < 0.5:
        files[name] = b"{}"
        write(path, files)
        return None
    old = rng.choice(list(files))
    write(path, {name if key == old else key: data for key, data in files.items()})
    return None


def duplicate_names(path: Path, rng: Random) -> None:
    """Two entries of one name with different contents."""
    files = entries(path)
    name = rng.choice(list(files))
    other = rng.choice(list(files.values()))
    with zipfile.ZipFile(path, "a") as archive:
        import warnings

        warnings.simplefilter("ignore")
        archive.writestr(name, other)


def encrypted_flag(path: Path, rng: Random) -> None:
    _patch_central(path, rng, 8, rng.choice((1, 0x41, 0x2000, 0x20)).to_bytes(2, "little"))


def other_method(path: Path, rng: Random) -> None:
    _patch_central(path, rng, 10, rng.choice((8, 9, 12, 14, 93, 95, 99, 65535)).to_bytes(2, "little"))


def lying_sizes(path: Path, rng: Random) -> None:
    value = rng.choice((0, 1, 10**9, 2**32 - 1, 2**32 - 2))
    _patch_central(path, rng, rng.choice((20, 24)), value.to_bytes(4, "little"))


def lying_offset(path: Path, rng: Random) -> None:
    _patch_central(
        path, rng, 42, rng.choice((0, 4, 2**31, 2**32 - 1, rng.randrange(10**5))).to_bytes(4, "little")
    )


def lying_crc(path: Path, rng: Random) -> None:
    _patch_central(path, rng, 16, rng.randbytes(4))


def zip64_lies(path: Path, rng: Random) -> None:
    """An entry whose true size is said to be in an extra field, which says terabytes or is torn."""
    files = entries(path)
    name = rng.choice(list(files))
    info = zipfile.ZipInfo(name)
    size = rng.choice((2**40, 2**63, 2**64 - 1, 0))
    info.extra = struct.pack("<HHQQ", 1, 16, size, size)[: rng.choice((20, 20, 7, 3))]
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in files.items():
            archive.writestr(info if other == name else other, data)
    if rng.random() < 0.7:
        data = bytearray(path.read_bytes())
        place = data.find(b"PK\x01\x02")
        while place >= 0 and data[place + 46 : place + 46 + len(name)] != name.encode():
            place = data.find(b"PK\x01\x02", place + 4)
        data[place + 20 : place + 28] = b"\xff" * 8
        path.write_bytes(data)


def data_before(path: Path, rng: Random) -> None:
    path.write_bytes(
        rng.choice((b"#!/bin/sh\n", rng.randbytes(1000), b"\x89HDF\r\n\x1a\n" + bytes(500)))
        + path.read_bytes()
    )


def data_after(path: Path, rng: Random) -> None:
    path.write_bytes(
        path.read_bytes() + rng.choice((rng.randbytes(10), rng.randbytes(70_000), b"PK\x05\x06" + bytes(18)))
    )


def two_archives(path: Path, rng: Random) -> None:
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    path.write_bytes(rng.choice((other.getvalue() + path.read_bytes(), path.read_bytes() + other.getvalue())))


def commented(path: Path, rng: Random) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = rng.choice((b"hello", b"PK\x05\x06" * 4000, bytes(65_535), b"PK\x01\x02"))


def removed_entry(path: Path, rng: Random) -> None:
    files = entries(path)
    del files[rng.choice(list(files))]
    write(path, files)


def nested_folder(path: Path, rng: Random) -> None:
    """The store is one folder down, as `zip -r` of a folder makes it."""
    write(path, {f"run.zarr/{name}": data for name, data in entries(path).items()})


def link_entry(path: Path, rng: Random) -> None:
    """An entry that claims to be a symbolic link."""
    files = entries(path)
    name = rng.choice(list(files))
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in files.items():
            archive.writestr(info if other == name else other, b"/etc/passwd" if other == name else data)


def folder_entries(path: Path, rng: Random) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("trace/", "trace/residual/", "metrics/", "x/"):
            archive.writestr(name, b"" if rng.random() < 0.7 else b"data")


def whole_is_special(path: Path, rng: Random) -> str:
    import os

    path.unlink()
    kind = rng.choice(("fifo", "folder", "zero", "loop"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"zero": "/dev/zero", "loop": path.name}[kind])
    return "no archive"


def metadata_edit(path: Path, rng: Random) -> None:
    """One of the edits of an array's metadata, inside of the archive."""
    files = entries(path)
    names = [
        name
        for name, data in files.items()
        if name.endswith("zarr.json") and json.loads(data)["node_type"] == "array"
    ]
    name = rng.choice(names)
    metadata = json.loads(files[name])
    rng.choice(zarr_stores.ARRAY_JSON)(metadata, rng)
    files[name] = json.dumps(metadata).encode()
    write(path, files)


EDITS: tuple[Edit, ...] = (
    deflated,
    deflated_bomb,
    quine,
    overlapping,
    huge_directory,
    claimed_entries,
    leaving_names,
    duplicate_names,
    encrypted_flag,
    other_method,
    lying_sizes,
    lying_offset,
    lying_crc,
    zip64_lies,
    data_before,
    data_after,
    two_archives,
    commented,
    removed_entry,
    nested_folder,
    link_entry,
    folder_entries,
    whole_is_special,
    metadata_edit,
)

MUTATORS: dict[str, Mutator] = {f"zip:{edit.__name__}": _editing(edit) for edit in EDITS}
