"""What is drawn of a network before it is built? Its family, sizes, training and batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """A network of the zoo, in words and numbers."""

    family: str = "pre-norm transformer"  # A key of `networks.FAMILIES`
    blocks: int = 6  # sizes; streams are 1 where there is one state
    width: int = 32
    heads: int = 4
    streams: int = 1
    vocabulary: int = 48
    seed: int = 0  # of weights, task and batch
    steps: int = 0  # of training on the task; 0 is a fresh network
    rate: float = 3e-3  # learning rate
    sequences: int = 6  # of the batch that is captured
    length: int = 24
    padded: bool = False  # whether the batch has padding, and a mask that says where
    embedding: float = 1.0  # standard deviation of the embedding
    # how the connections of streams are written: "returned" by a module, or "local" variables of the block
    style: str = "returned"
    start: str = "copies"  # how streams begin: "copies", or "apart", each shifted by a vector of its own

    @property
    def words(self) -> str:
        """The plan as a reader sees it in a table."""
        kind = f"{self.family}, {self.streams} streams" if self.streams > 1 else self.family
        age = f"{self.steps} steps" if self.steps else "fresh"
        return f"{kind}, {self.blocks} × {self.width}, {age}, seed {self.seed}"


# Deeper ones cost training time in proportion; a third of the fresh networks is deep.
SHALLOW, DEEP = (3, 4, 5, 6, 8), (12, 16, 24, 32)
STEPS = (20, 40, 60, 100)


def drawn_plan(rng: random.Random, family: str, *, trained: bool, streams: int = 1) -> Plan:
    """Sizes and seeds of one network.

    Parameters
    ----------
    rng : Random
        Draws them all.
    family : str
        Of `networks.FAMILIES`.
    trained : bool
        Whether it is trained; such a network is not deep.
    streams : int
        Number of streams.
    """
    deep = not trained and rng.random() < 1 / 3
    heads = rng.choice((2, 4))
    steps = rng.choice(STEPS) if trained else 0
    return Plan(
        family=family,
        # Many steps of a shallow network cost as much as few of a deeper one.
        blocks=rng.choice(DEEP if deep else SHALLOW[:3] if steps > 40 else SHALLOW),
        width=rng.choice((16, 24, 32, 48, 64)) if not deep else rng.choice((16, 32)),
        heads=heads,
        streams=streams,
        vocabulary=rng.choice((32, 48, 64)),
        seed=rng.randrange(10_000),
        steps=steps,
        rate=rng.choice((1e-3, 3e-3)),
        sequences=rng.choice((8, 10)),
        length=rng.choice((16, 24, 32)),
        embedding=rng.choice((0.5, 1.0)),
        style=rng.choice(("returned", "local")),
        start=rng.choice(("copies", "apart")),
    )


def short(plan: Plan, rng: random.Random) -> Plan:
    """The same on a few short sequences."""
    return replace(plan, sequences=rng.choice((2, 3, 4)), length=rng.choice((6, 8, 10)))
