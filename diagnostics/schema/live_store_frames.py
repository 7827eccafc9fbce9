"""What is a row log? Frames, each with its length and a checksum, that are only ever appended."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c

MAGIC = b"DSr1"
_HEAD = struct.Struct(
    "<4sIII"
)  # magic, kind, bytes of the payload, CRC-32C of the kind, that number and the payload
_CHECKED = struct.Struct("<II")
BEGIN, DECLARE, ROW, NOTE, LATER = 1, 2, 3, 4, 5
"""Kinds of frames: what a log goes on from, further variables, a step's numbers, what happened, numbers that came later."""

MAX_PAYLOAD = 256 << 20


@dataclass(frozen=True)
class Frame:
    """One frame whose checksum fits.

    Parameters
    ----------
    offset : int
        Byte of the log at which it begins.
    kind : int
        One of `BEGIN`, `DECLARE`, `ROW`, `NOTE` and `LATER`.
    payload : memoryview
        What it carries.
    """

    offset: int
    kind: int
    payload: memoryview


@dataclass(frozen=True)
class Scan:
    """The frames of a log up to the first byte that is none.

    Parameters
    ----------
    frames : list of Frame
        In their order.
    end : int
        Bytes that they take.
    torn : int
        Bytes after them where no whole frame follows: a frame whose writer died.
    damaged : bool
        Whether whole frames follow after bytes that are none.
    """

    frames: list[Frame]
    end: int
    torn: int
    damaged: bool


def packed(kind: int, payload: bytes) -> bytes:
    """One frame as bytes.

    Parameters
    ----------
    kind : int
        One of `BEGIN`, `DECLARE`, `ROW`, `NOTE` and `LATER`.
    payload : bytes
        What it carries.

    Returns
    -------
    bytes

    Raises
    ------
    ValueError
        For a payload above `MAX_PAYLOAD`.
    """
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame of {len(payload)} bytes; expected at most {MAX_PAYLOAD}")
    return _HEAD.pack(MAGIC, kind, len(payload), _checksum(kind, payload)) + payload


def _checksum(kind: int, payload: bytes | memoryview) -> int:
    begun = google_crc32c.value(_CHECKED.pack(kind, len(payload)))
    return int(google_crc32c.extend(begun, bytes(payload)))


def scan(content: bytes) -> Scan:
    """Read the frames of a log.

    Parameters
    ----------
    content : bytes
        Of the whole file.

    Returns
    -------
    Scan

    Examples
    --------
    >>> log = packed(NOTE, b"one") + packed(NOTE, b"two")
    >>> [bytes(frame.payload) for frame in scan(log).frames], scan(log).torn
    ([b'one', b'two'], 0)
    >>> cut = scan(log[:-1])
    >>> len(cut.frames), cut.torn, cut.damaged
    (1, 18, False)
    >>> scan(b"?" + log[1:]).damaged
    True
    """
    view = memoryview(content)
    frames: list[Frame] = []
    end = 0
    while (found := _frame_at(view, end)) is not None:
        frames.append(found)
        end += _HEAD.size + len(found.payload)
    return Scan(frames, end, len(content) - end, _any_later(content, view, end))


def _frame_at(view: memoryview, offset: int) -> Frame | None:
    if len(view) - offset < _HEAD.size:
        return None
    magic, kind, size, checksum = _HEAD.unpack_from(view, offset)
    start = offset + _HEAD.size
    if magic != MAGIC or size > min(MAX_PAYLOAD, len(view) - start):
        return None
    payload = view[start : start + size]
    return Frame(offset, kind, payload) if _checksum(kind, payload) == checksum else None


def _any_later(content: bytes, view: memoryview, end: int) -> bool:
    """Whether a whole frame follows somewhere after bytes that are none."""
    # Bounded: a hostile log may be full of magic numbers, each with a length up to its end.
    left = 4 * len(content)
    for offset in _occurrences(content, end + 1):
        size = (
            min(_HEAD.unpack_from(view, offset)[2], len(view) - offset)
            if len(view) - offset >= _HEAD.size
            else 0
        )
        left -= size
        if left < 0:
            return True  # no torn frame looks like this
        if _frame_at(view, offset) is not None:
            return True
    return False


def _occurrences(content: bytes, start: int) -> Iterator[int]:
    found = content.find(MAGIC, start)
    while found >= 0:
        yield found
        found = content.find(MAGIC, found + 1)
