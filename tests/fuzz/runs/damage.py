"""How are bytes damaged? As discs, networks and careless programs do it, and as somebody with a hex editor would."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Damage = Callable[[bytearray, Random], bytearray]


def flip_bit(data: bytearray, rng: Random) -> bytearray:
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    return data


def flip_bits(data: bytearray, rng: Random) -> bytearray:
    for _ in range(rng.randint(2, 64)):
        flip_bit(data, rng)
    return data


def noise(data: bytearray, rng: Random) -> bytearray:
    start, size = _range(data, rng, 256)
    data[start : start + size] = rng.randbytes(size)
    return data


def truncate(data: bytearray, rng: Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def empty(data: bytearray, rng: Random) -> bytearray:
    return bytearray()


def zero_fill(data: bytearray, rng: Random) -> bytearray:
    start, size = _range(data, rng, 4096)
    data[start : start + size] = bytes([rng.choice((0, 0, 255))]) * size
    return data


def swap_blocks(data: bytearray, rng: Random) -> bytearray:
    size = min(rng.choice((16, 64, 512, 4096)), max(1, len(data) // 2))
    first, second = (rng.randrange(0, max(1, len(data) - size)) // size * size for _ in range(2))
    one, two = data[first : first + size], data[second : second + size]
    if len(one) == len(two):
        data[first : first + size], data[second : second + size] = two, one
    return data


def repeat_block(data: bytearray, rng: Random) -> bytearray:
    start, size = _range(data, rng, 1024)
    return data[: start + size] + data[start : start + size] + data[start + size :]


def delete(data: bytearray, rng: Random) -> bytearray:
    start, size = _range(data, rng, 512)
    del data[start : start + size]
    return data


def insert(data: bytearray, rng: Random) -> bytearray:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.randbytes(rng.randint(1, 512))
    return data


def extreme_number(data: bytearray, rng: Random) -> bytearray:
    """A length, an offset or a count becomes 0, 1, the largest or a negative one."""
    size = rng.choice((1, 2, 4, 8))
    place = rng.randrange(max(1, len(data) - size))
    value = rng.choice(
        (0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 2 ** (4 * size))
    )
    data[place : place + size] = value.to_bytes(size, "little")
    return data


def damaged_head(data: bytearray, rng: Random) -> bytearray:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 512))] = rng.randrange(256)
    return data


def garbage_after(data: bytearray, rng: Random) -> bytearray:
    return data + rng.randbytes(rng.randint(1, 5000))


def garbage_before(data: bytearray, rng: Random) -> bytearray:
    return bytearray(rng.randbytes(rng.choice((1, 7, 512, 1024, 2048)))) + data


def replaced(data: bytearray, rng: Random) -> bytearray:
    """Another kind of file under this name."""
    heads = (
        b"\x89HDF\r\n\x1a\n",
        b"PK\x03\x04",
        b"CDF\x01",
        b"CDF\x02",
        b"\x1f\x8b\x08",
        b"{}",
        b"\x80\x04",
        b"#!/bin/sh\n",
    )
    return bytearray(rng.choice(heads)) + rng.randbytes(rng.choice((0, 10, 5000)))


def _range(data: bytearray, rng: Random, most: int) -> tuple[int, int]:
    start = rng.randrange(max(1, len(data)))
    return start, min(rng.randint(1, most), len(data) - start)


def several(data: bytearray, rng: Random) -> bytearray:
    for _ in range(rng.randint(2, 4)):
        data = rng.choice(SINGLE)(data, rng) if data else data
    return data


SINGLE: tuple[Damage, ...] = (
    flip_bit,
    flip_bits,
    noise,
    truncate,
    empty,
    zero_fill,
    swap_blocks,
    repeat_block,
    delete,
    insert,
    extreme_number,
    damaged_head,
    garbage_after,
    garbage_before,
    replaced,
)
ALL: tuple[Damage, ...] = (*SINGLE, several)
