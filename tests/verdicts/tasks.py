"""What do reference networks learn? Real text, digits and photographs, and algorithmic tasks that can be solved."""

from __future__ import annotations

import pydoc_data.topics
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

SEPARATOR = 1  # a symbol of the algorithmic tasks; 0 is padding
Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs (B, T) or (B, 3, 16, 16), and targets: (B, T) with −100 where nothing is asked, or (B,)."""


@dataclass(frozen=True)
class Task:
    """One task.

    Parameters
    ----------
    vocabulary : int
        Number of tokens; 0 of images.
    draw : callable
        ``draw(count, length, generator)`` gives a batch.
    guessing : int
        Number of classes among which an answer is guessed.
    """

    vocabulary: int
    draw: Callable[[int, int, torch.Generator], Batch]
    guessing: int


# --- text ---


def _source(names: tuple[str, ...]) -> str:
    folder = Path(random.__file__).parent
    return "\n".join((folder / f"{name}.py").read_text("utf-8") for name in names)


@cache
def corpus(name: str) -> str:
    """Text that every machine with Python has: documentation, source code, or licences."""
    if name == "documentation":
        return "\n".join(pydoc_data.topics.topics.values())
    if name == "code":
        return _source(("argparse", "textwrap", "random", "statistics", "tarfile", "heapq"))
    packages = Path(sysconfig.get_paths()["purelib"])
    texts = {
        path.read_text("utf-8", "ignore") for path in sorted(packages.glob("*.dist-info/**/LICENSE*"))[:60]
    }
    return "\n".join(sorted(texts)) or _source(("this", "difflib"))


@cache
def _symbols(name: str, vocabulary: int, words: bool) -> torch.Tensor:
    """The text as numbers: the commonest characters or words, and 0 for all others."""
    parts = corpus(name).split() if words else list(corpus(name))
    found, counts = np.unique(np.array(parts, dtype=object).astype(str), return_counts=True)
    common = {each: n + 1 for n, each in enumerate(found[np.argsort(-counts)][: vocabulary - 1].tolist())}
    return torch.tensor([common.get(each, 0) for each in parts])


def _text(name: str, vocabulary: int = 64, *, words: bool = False, letters: int = 0) -> Task:
    def draw(count: int, length: int, rng: torch.Generator) -> Batch:
        symbols = _symbols(name, vocabulary, words)
        starts = torch.randint(len(symbols) - length - 1, (count,), generator=rng).tolist()
        part = torch.stack([symbols[start : start + length + 1] for start in starts])
        part = part % letters if letters else part
        return part[:, :-1], part[:, 1:]

    return Task(letters or vocabulary, draw, letters or vocabulary)


# --- algorithms ---


def _repeated(count: int, length: int, rng: torch.Generator) -> Batch:
    half = torch.randint(2, 20, (count, length // 2), generator=rng)
    return _asked(torch.cat([half, half], 1), length // 2)


def _answered(answer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int, int, torch.Generator], Batch]:
    def draw(count: int, length: int, rng: torch.Generator) -> Batch:
        asked = torch.randint(2, 20, (count, 8), generator=rng)
        return _asked(torch.cat([asked, torch.full((count, 1), SEPARATOR), answer(asked)], 1), 8)

    return draw


def _asked(ids: torch.Tensor, first: int) -> Batch:
    """The next token is asked from a position on."""
    targets = ids[:, 1:].clone()
    targets[:, :first] = -100
    return ids[:, :-1], targets


def _sums(count: int, length: int, rng: torch.Generator) -> Batch:
    terms = torch.randint(0, 13, (count, 2), generator=rng)
    ids = torch.cat([terms + 2, torch.full((count, 1), SEPARATOR)], 1)
    targets = torch.full((count, 3), -100)
    targets[:, -1] = terms.sum(1) % 13
    return ids, targets


def _majority(count: int, length: int, rng: torch.Generator) -> Batch:
    ids = 2 + (torch.rand(count, 15, generator=rng) < torch.rand(count, 1, generator=rng)).long()
    targets = torch.full((count, 15), -100)
    targets[:, -1] = (ids == 3).sum(1) > 7
    return ids, targets


# --- images of 3 × 16 × 16 ---


@cache
def _digits() -> Batch:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images / 8 - 0.6, dtype=torch.float32)[:, None]
    return functional.interpolate(pixels, scale_factor=2.0).expand(-1, 3, -1, -1), torch.tensor(found.target)


@cache
def _photographs() -> torch.Tensor:
    from sklearn.datasets import load_sample_images

    found = [torch.tensor(image, dtype=torch.float32) / 64 - 2 for image in load_sample_images().images]
    return torch.stack([image.permute(2, 0, 1)[:, :384, :640] for image in found])


def _of_digits(classes: int) -> Task:
    def draw(count: int, length: int, rng: torch.Generator) -> Batch:
        images, labels = _digits()
        chosen = torch.randint(len(images), (count,), generator=rng)
        return images[chosen], labels[chosen] % classes

    return Task(0, draw, classes)


def _quadrants(count: int, length: int, rng: torch.Generator) -> Batch:
    """Of which photograph, and of which quarter of it, is a patch?"""
    photographs = _photographs()
    picture = torch.randint(2, (count,), generator=rng)
    top, left = (torch.randint(size - 16, (count,), generator=rng) for size in photographs.shape[2:])
    patches = [
        photographs[p, :, y : y + 16, x : x + 16]
        for p, y, x in zip(picture.tolist(), top.tolist(), left.tolist(), strict=True)
    ]
    return torch.stack(patches), 4 * picture + 2 * (top >= 184).long() + (left >= 312).long()


TASKS: dict[str, Task] = {
    "documentation": _text("documentation"),
    "code": _text("code"),
    "licences": _text("licences"),
    "words": _text("documentation", 256, words=True),
    "four letters": _text("code", letters=4),
    "induction": Task(20, _repeated, 18),
    "reversal": Task(20, _answered(lambda ids: ids.flip(1)), 18),
    "sorting": Task(20, _answered(lambda ids: ids.sort(1).values), 18),
    "sums": Task(20, _sums, 13),
    "majority": Task(20, _majority, 2),
    "digits": _of_digits(10),
    "odd digits": _of_digits(2),
    "photographs": Task(0, _quadrants, 8),
}


def loss_of(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy, of classes or of every token that is asked."""
    flat = output.flatten(0, -2) if targets.ndim == 2 else output
    return functional.cross_entropy(flat.float(), targets.flatten(), ignore_index=-100)
