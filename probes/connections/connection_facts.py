"""What is known of each connection of a model? The facts that remarks are made of, and the form of a remark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from depthscope.probes.connections.computation import Origin

# Heuristics: a sum of float32 numbers of n streams that was made 1 by a division is so within a few roundings.
EXACT_SUM = 1e-5
# An error of a sum that no rounding explains, in float32.
CLEAR_ERROR = 1e-3


@dataclass(frozen=True)
class Remark:
    """One thing that is odd about the connections.

    ``kind``: what it is, which is the name of the verdict that reports it.
    ``sentence``: in plain words, with the numbers.
    ``value``: the number that it rests on; that verdict states what it is compared with.
    ``connections``: where.
    ``sure``: whether it is an error in any design; otherwise it may be meant, and is only worth knowing.
    """

    kind: str
    sentence: str
    value: float
    connections: tuple[int, ...]
    sure: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"connections": list(self.connections)}


@dataclass(frozen=True)
class Facts:
    """What is known of one connection, of the sampled sequences.

    ``name``: the module that it belongs to.
    ``mix``: H_res as applied (K, T, n, n), and the identity where nothing mixes.
    ``mixes``: whether the model computes a matrix.
    ``stored``: H_res before the model rounded it to another precision.
    ``rounded_to``: that precision; empty where it is applied as stored.
    ``read, write``: H_pre and H_post (K, T, n); None where there are several views, or gates per feature.
    ``mask``: (K, T), True on tokens that are no padding.
    ``origin``: from what the weights were computed; None where no forward was followed.
    ``spread_in, spread_out``: ‖X − mean over streams‖ / ‖X‖ of the streams before and after the connection.
    """

    name: str
    mix: torch.Tensor
    mixes: bool
    stored: torch.Tensor
    rounded_to: str = ""
    read: torch.Tensor | None = None
    write: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    origin: Origin | None = None
    spread_in: float = 1.0
    spread_out: float = 1.0

    def tokens(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens that are no padding, (tokens, …), in float64."""
        flat = weights.flatten(0, 1).double()
        return flat if self.mask is None else flat[self.mask.flatten()]

    @property
    def num_streams(self) -> int:
        """Number of streams n."""
        return self.mix.shape[-1]

    def sum_errors(self, matrix: torch.Tensor | None = None) -> tuple[float, float]:
        """The largest error of a row's sum (over sources) and of a column's (over destinations), against 1."""
        values = self.tokens(self.stored if matrix is None else matrix)
        return float((values.sum(-1) - 1).abs().max()), float((values.sum(-2) - 1).abs().max())


Rule = Callable[[Sequence[Facts]], Iterator[Remark]]


def places(facts: Sequence[Facts], at: Sequence[int]) -> str:
    """Some connections in words."""
    if len(at) == len(facts):
        return f"at all {len(facts)} connections" if len(at) > 1 else f"at {facts[0].name}"
    names = ", ".join(f"{number} ({facts[number].name})" for number in at[:3])
    more = f" and {len(at) - 3} more" if len(at) > 3 else ""
    return f"at connection{'s' if len(at) > 1 else ''} {names}{more} of {len(facts)}"


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}"
