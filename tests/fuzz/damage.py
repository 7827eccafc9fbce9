"""Random damage to a file or a folder: its bytes, the values of its JSON, members of its archives, objects of its HDF5."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**30, -(10**18), float("nan"), float("inf")),
    *("x", "", "\x00", "10000000", "../../etc/passwd", "a" * 100_000, "\ud800"),
    *([], [1], [None], [[[]]], {}, {"a": 1}),
)
"""Values that a field of a file may have where nobody expects them."""


def damage(path: Path, rng: Random) -> str:
    """Damage one place of a file, or of one of a folder's files; returns what was done."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    file = rng.choice(files)
    if rng.random() < 0.1:
        return f"{file.name}: {_replaced(file, rng)}"
    whole = file.read_bytes()
    try:
        if h5py.is_hdf5(file) and rng.random() < 0.7:
            return f"{file.name}: {_hdf5(file, rng)}"
        data, what = _content(whole, rng)
    except Exception:  # what is damaged already has no structure that could be edited
        data, what = _bytes(whole, rng)
    file.write_bytes(data)
    return f"{file.name}: {what}"


def _replaced(file: Path, rng: Random) -> str:
    """Something else with the name of the file."""
    kind = rng.choice(("nothing", "empty", "pipe", "folder", "link to outside", "link to itself"))
    file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind.startswith("link"):
        file.symlink_to("/etc/passwd" if kind == "link to outside" else file)
    return kind


def _content(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The content of a file with one place damaged, by what it is."""
    if rng.random() < 0.7:
        if zipfile.is_zipfile(io.BytesIO(data)):
            return _archive(data, rng)
        for start in (0, 8):  # a file of JSON; the header of a safetensors file behind its length
            end = len(data) if start == 0 else 8 + int.from_bytes(data[:8], "little")
            try:
                value = json.loads(data[start:end])
            except ValueError:
                continue
            if isinstance(value, (dict, list)) and value:
                what = _odd_value(value, rng)
                text = json.dumps(value).encode()
                head = len(text).to_bytes(8, "little") if start else b""
                return head + text + data[end:], what
    return _bytes(data, rng)


def _bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    kind = rng.choice(("flip", "noise", "cut", "zero", "repeat", "large"))
    # Half of the damage in the first bytes, where headers are.
    place = rng.randrange(max(1, min(len(data), 256) if rng.random() < 0.5 else len(data)))
    length = rng.choice((1, 4, 16, 64))
    before, part, after = data[:place], data[place : place + length], data[place + length :]
    if kind == "flip":
        part = bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:] if part else b""
    elif kind == "cut":
        part = after = b""
    else:
        new = {"noise": rng.randbytes(length), "zero": bytes(length), "repeat": part * 2}
        part = new.get(kind, b"\xff" * length)
    return before + part + after, f"{kind} at {place}"


def _odd_value(value: Any, rng: Random) -> str:
    """Set, remove or add a random place of nested JSON."""
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
        return f"{key}/{_odd_value(value[key], rng)}"
    kind = rng.choice(("set", "set", "remove", "nest"))
    if kind == "remove":
        del value[key]
    elif kind == "nest":
        value[key] = [value[key]]
    else:
        value[key] = rng.choice(ODD)
    return f"{key}: {kind} {str(value[key])[:40]!r}" if kind == "set" else f"{key}: {kind}"


def _archive(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The archive written anew with a member that is damaged, removed, doubled or named otherwise: each sum is right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    place = rng.randrange(len(members))
    name, content = members[place]
    kind = rng.choice(("content", "content", "remove", "double", "outside", "inflate"))
    if kind == "content":
        content, what = _content(content, rng)
        members[place] = (name, content)
        kind = what
    elif kind == "remove":
        del members[place]
    elif kind == "double":
        members.append((name + "2", content))
    else:
        members[place] = ("../" + name, content) if kind == "outside" else (name, bytes(1 << 28))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if kind == "inflate" else zipfile.ZIP_STORED) as new:
        for each in members:
            new.writestr(*each)
    return out.getvalue(), f"{name}: {kind}"


def _hdf5(path: Path, rng: Random) -> str:
    """Edit one object through the library that wrote the file."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = rng.choice(names)
        found = file[name]
        kind = rng.choice(("attribute", "remove", "values", "link", "external", "circle", "shape", "huge"))
        if kind == "attribute":
            attribute = rng.choice([*found.attrs, "new"])
            value = rng.choice([each for each in ODD if isinstance(each, (bool, float, str))])
            found.attrs[attribute] = value.encode("utf-8", "replace") if isinstance(value, str) else value
        elif kind == "values" and isinstance(found, h5py.Dataset) and found.dtype.kind in "fiu":
            found[...] = np.roll(found[...], 1) + 1
        elif kind in ("link", "external", "circle"):
            del file[name]
            outside = h5py.ExternalLink("/etc/passwd", "/x")
            file[name] = {"link": h5py.SoftLink("/nowhere"), "external": outside}.get(kind, file["/"])
        else:
            del file[name]
            if kind == "shape":
                file[name] = np.zeros((3, 2))
            elif kind == "huge":
                file.create_dataset(name, (1 << 40,), "f8", chunks=(1 << 20,))
        return f"{name}: {kind}"


def damaged_copy(source: Path, folder: Path, rng: Random, times: int) -> tuple[Path, list[str]]:
    """A copy of a file or folder with so many places damaged."""
    target = folder / source.name
    shutil.copytree(source, target, symlinks=True) if source.is_dir() else shutil.copy(source, target)
    done: list[str] = []
    for _ in range(times):
        if target.is_file() or (target.is_dir() and any(entry.is_file() for entry in target.rglob("*"))):
            done.append(damage(target, rng))
    return target, done
