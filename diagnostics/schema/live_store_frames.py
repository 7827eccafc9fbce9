"""What is a row log? Frames that are only ever appended, each with its length and checksum, and that of the one before."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c

from depthscope.diagnostics.errors import InputError

MAGIC = b"DSr2"
_HEAD = struct.Struct("<4sIIII")
"""Magic, checksum, kind, bytes of the payload, checksum of the frame before: CRC-32C of what follows it in the frame."""

_CHECKED = struct.Struct("<III")
BEGIN, DECLARE, ROW, NOTE = 1, 2, 3, 4
"""Kinds of frames: what a log goes on from, further variables, a step's numbers, what happened."""

MAX_PAYLOAD = 256 << 20


class Frame(NamedTuple):
    """Where one frame is whose checksum fits: its payload is ``content[start:end]``."""

    kind: int
    start: int
    end: int
    checksum: int
    before: int


def packed(kind: int, payload: bytes, before: int) -> tuple[bytes, int]:
    """One frame as bytes, after one with the checksum ``before`` (0: none), and its own checksum."""
    if len(payload) > MAX_PAYLOAD:
        raise InputError(f"a frame of {len(payload)} bytes; expected at most {MAX_PAYLOAD}")
    checksum = _checksum(kind, payload, before)
    return _HEAD.pack(MAGIC, checksum, kind, len(payload), before) + payload, checksum


def _checksum(kind: int, payload: bytes, before: int) -> int:
    return int(google_crc32c.extend(google_crc32c.value(_CHECKED.pack(kind, len(payload), before)), payload))


def frames_from(content: bytes, at: int = 0, before: int = 0) -> Iterator[Frame]:
    """The frames of a log from a byte on, after one with the checksum ``before``, up to the first byte that is none.

    Examples
    --------
    >>> one, checksum = packed(NOTE, b"one", 0)
    >>> two, _ = packed(NOTE, b"two", checksum)
    >>> [(one + two)[frame.start : frame.end] for frame in frames_from(one + two)]
    [b'one', b'two']
    >>> len(list(frames_from(one + two[:-1]))), is_damaged(one + two[:-1], len(one))
    (1, False)
    >>> len(list(frames_from(two))), is_damaged(two, 0)  # the one before it is missing
    (0, True)
    """
    while (frame := _frame_at(content, at)) is not None and frame.before == before:
        yield frame
        at, before = frame.end, frame.checksum


def _frame_at(content: bytes, at: int) -> Frame | None:
    if len(content) - at < _HEAD.size:
        return None
    magic, checksum, kind, size, before = _HEAD.unpack_from(content, at)
    start = at + _HEAD.size
    if magic != MAGIC or size > min(MAX_PAYLOAD, len(content) - start):
        return None
    fits = _checksum(kind, content[start : start + size], before) == checksum
    return Frame(kind, start, start + size, checksum, before) if fits else None


def is_damaged(content: bytes, end: int) -> bool:
    """Whether a frame with its checksum is anywhere after the frames of a log: else what follows is torn."""
    # Bounded: a hostile log may be full of magic numbers, each with a length up to its end.
    left = 4 * len(content)
    at = content.find(MAGIC, end)
    while at >= 0 and len(content) - at >= _HEAD.size:
        left -= min(_HEAD.unpack_from(content, at)[3], len(content) - at)
        if left < 0 or _frame_at(content, at) is not None:
            return True  # no torn frame is full of magic numbers
        at = content.find(MAGIC, at + 1)
    return False
