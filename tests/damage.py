"""Damage to files, drawn by hypothesis: to their bytes, to values of their JSON, to members of an archive."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from random import Random
from typing import Any

from hypothesis import strategies as st

# Values that a field may have where nobody expects them, the simplest first: hypothesis shrinks towards it.
ODD = (
    *(None, True, -1, 0, 1.5, 10**7, 1 << 70, -(10**18), 1e308, float("nan"), float("inf")),
    *("", "x", "10000000", "x\x00\ud800", "../../etc/passwd", "a" * 100_000),
    *([], [1], ["a", 1], [[]], [[1], [1, 2]], {}, {"a": 1}, {"a": []}),
)
odd_values = st.sampled_from(ODD)
# A place in a file: numbers that hypothesis draws itself are small ones first, and most damage would be to the first bytes.
seeds = st.integers(0, 2**32).map(Random)
KINDS = ("flip", "zero", "ones", "noise", "repeat", "cut")


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes, times: int = 4) -> bytes:
    """The bytes with some places flipped, overwritten, doubled, or the rest cut off."""
    for _ in range(draw(st.integers(1, times))):
        if not data:
            break
        # Half of the damage of a large file in its first bytes, where headers are.
        last = draw(st.sampled_from((256 if len(data) > 4096 else len(data), len(data)))) - 1
        place, kind = draw(seeds).randint(0, last), draw(st.sampled_from(KINDS))
        part = data[place : place + draw(st.sampled_from((1, 4, 16, 64)))]
        if kind == "cut":
            data = data[:place]
            continue
        if kind == "flip":
            new = bytes([part[0] ^ 1 << draw(st.integers(0, 7))]) + part[1:]
        elif kind == "noise":
            new = draw(st.binary(min_size=len(part), max_size=len(part)))
        else:
            new = {"zero": bytes(len(part)), "ones": b"\xff" * len(part), "repeat": part * 2}[kind]
        data = data[:place] + new + data[place + len(part) :]
    return data


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to every value within nested JSON, the outermost first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """Nested JSON with one value removed, put into a list, or replaced by an odd one."""
    path = draw(seeds).choice(places(value))
    kind = draw(st.sampled_from(("set", "set", "nest", "remove")))
    if not path:
        return [value] if kind == "nest" else draw(odd_values)
    found = copy.deepcopy(value)
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    if kind == "remove":
        del holder[path[-1]]
    else:
        holder[path[-1]] = [holder[path[-1]]] if kind == "nest" else draw(odd_values)
    return found


@st.composite
def damaged_content(draw: st.DrawFn, data: bytes) -> bytes:
    """A file's content, damaged as JSON where it is some, as the header of safetensors, or as bytes."""
    if draw(st.booleans()):
        for start in (0, 8):  # JSON; or behind its length
            end = len(data) if start == 0 else 8 + int.from_bytes(data[:8], "little")
            try:
                value = json.loads(data[start:end])
            except ValueError:
                continue
            text = json.dumps(draw(damaged_json(value))).encode()
            return (len(text).to_bytes(8, "little") if start else b"") + text + data[end:]
    return draw(damaged_bytes(data))


class Files(dict[str, bytes]):
    """Files by their names; a failing test prints their sizes, and not what is in them."""

    def __repr__(self) -> str:
        return str({name: len(data) for name, data in self.items()})


@st.composite
def damaged_files(draw: st.DrawFn, files: dict[str, bytes]) -> Files:
    """Files by their names with one of them damaged, removed, or given under another name."""
    name = draw(st.sampled_from(sorted(files)))
    rest = {other: data for other, data in files.items() if other != name}
    kind = draw(st.sampled_from(("content", "content", "content", "remove", "rename"))) if rest else "content"
    if kind == "remove":
        return Files(rest)
    found = {f"{name}2": files[name]} if kind == "rename" else {name: draw(damaged_content(files[name]))}
    return Files(rest | found)


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The members of an archive."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {entry.filename: opened.read(entry) for entry in opened.infolist()}


def packed(members: dict[str, bytes]) -> bytes:
    """An archive of members, each with its right sum."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    return out.getvalue()


@st.composite
def damaged_file(draw: st.DrawFn, data: bytes) -> Files:
    """The content of one file, named ".", that is damaged; an archive also by being written anew with a damaged member."""
    if zipfile.is_zipfile(io.BytesIO(data)) and draw(st.booleans()):
        return Files({".": packed(draw(damaged_files(unpacked(data))))})
    return Files({".": draw(damaged_content(data))})
