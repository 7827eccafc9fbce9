"""What is in a run at one depth? Its tokens, features and connections, read from the trace of the run.

An analysis has numbers over all tokens. To see the cause one looks at single tokens: this reads the states themselves, keeps
as many sequences in memory as fit, and closes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from depthscope.app.text.visible import visible
from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels.mixing.products import composite
from depthscope.diagnostics.verdicts.locations import connection_name

MOST_BYTES = 400 * 2**20
"""Of the states in memory; of a larger run the first sequences are shown. A heuristic of ours: several runs may be open."""

LONGEST_TOKEN = 24
"""Letters of a token's text."""

TOKEN_MEASURES = {
    "norm": "norm ‖x‖",
    "distance": "distance from the sequence's mean ‖x − x̄‖ / ‖x‖",
    "last": "cosine with the last state",
}
"""What a token × depth map may show, with its words."""

QUANTILES = {"median": 0.5, "p1": 0.01, "p99": 0.99, "worst": 1.0}
"""Which token's H_res is shown besides the mean: by the largest absolute row or column sum of its matrix."""

MARKED = "marked"

WHOSE = {
    "mean": "mean over tokens",
    "median": "median token",
    "p1": "1st percentile token",
    "p99": "99th percentile token",
    "worst": "token with the largest sums",
    MARKED: "marked token",
}
"""Whose H_res is shown, with its words."""

_BLANKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
"""Signs of a token that is nothing but blanks."""


class Large(NamedTuple):
    """A token with a large state, or one entry of it: its place, its number, and that over the median of the depth."""

    text: str
    sequence: int
    position: int
    feature: int | None
    value: float
    ratio: float


@dataclass(frozen=True, eq=False)
class Matrix:
    """H_res, H_pre and H_post of a connection, or a product of several H_res."""

    of: str  # whose: ``mean over tokens``, or the token
    h_res: np.ndarray  # shape (n, n), rows are destinations
    h_pre: np.ndarray | None = None  # shape (n,)
    h_post: np.ndarray | None = None  # shape (n,)

    @property
    def eigenvalues(self) -> np.ndarray:
        """Complex, shape (n,), the largest modulus first; NaN for a matrix that is not finite."""
        if not np.isfinite(self.h_res).all():
            return np.full(len(self.h_res), np.nan + 0j)
        found = np.linalg.eigvals(self.h_res.astype(np.float64))
        return found[np.argsort(-np.abs(found))]


class CloseUp:
    """The trace of one chain in memory.

    ``trace``: loaded; sequences may have been left out.
    ``sequences``: how many sequences the run has; ``num_sequences`` are in memory, the first ones.
    ``num_connections``: those whose H_res is known; 0 for a plain network.
    ``depth_in, depth_out``: for each connection the depth that it reads, and that it writes.
    """

    def __init__(self, trace: xr.Dataset, sequences: int):
        self._trace = trace
        self.sequences, self.nbytes = sequences, int(trace.nbytes)
        self.mask = np.asarray(trace["mask"].values, dtype=bool)
        self._states = trace["residual"].values
        self.num_depths, self.num_sequences, _, self.num_streams, _ = self._states.shape
        self.num_connections = trace.sizes["connection"] if "h_res" in trace else 0
        numbers = np.arange(trace.sizes.get("connection", 0))
        self.depth_in, self.depth_out = (
            np.asarray(trace[name].values, dtype=int) if name in trace else numbers + offset
            for offset, name in enumerate(("depth_in", "depth_out"))
        )

    def connection_name(self, connection: int) -> str:
        """Such as ``connection 5: attn of block 2``."""
        if "branch" not in self._trace or "connection_layer" not in self._trace:
            return f"connection {connection}"
        branch = str(self._trace["branch"].values[connection])
        layer = int(self._trace["connection_layer"].values[connection])
        return f"connection {connection}: {visible(connection_name(branch, layer))}"

    def texts(self, sequence: int) -> list[str]:
        """Text of every position of a sequence; its number where the run has no text."""
        if "token_text" not in self._trace:
            return [f"token {position}" for position in range(self.mask.shape[1])]
        found = self._trace["token_text"].values[sequence]
        return [
            # A blank or a line break is a token too.
            visible(
                text
                if str(text).strip()
                else "".join(_BLANKS.get(sign, repr(sign)[1:-1]) for sign in text) or "(empty)",
                longest=LONGEST_TOKEN,
            )
            for text in found
        ]

    def quoted(self, sequence: int) -> list[str]:
        """As `texts`, in quotation marks where it is text."""
        return [f"“{text}”" if self.has_texts else text for text in self.texts(sequence)]

    @property
    def has_texts(self) -> bool:
        """Whether the run has the text of its tokens."""
        return "token_text" in self._trace

    def _view(self, stream: str, sequence: int | None = None, depth: int | None = None) -> np.ndarray:
        """States of a stream, or the mean over streams, in float64 where they are reduced further."""
        part = self._states
        part = part[:, sequence] if sequence is not None else part
        part = part[depth] if depth is not None else part
        if stream == "mean":
            return part.mean(axis=-2, dtype=np.float64)
        return part[..., int(stream), :].astype(np.float64)

    def token_map(self, measure: str, sequence: int, stream: str = "mean") -> np.ndarray:
        """A number for every token of a sequence and depth, (token, depth); NaN for padding and where it is undefined."""
        x = self._view(stream, sequence)
        with np.errstate(divide="ignore", invalid="ignore"):
            if measure == "norm":
                found = np.linalg.norm(x, axis=-1)
            elif measure == "distance":
                real = self.mask[sequence]
                mean = x[:, real].mean(axis=1, keepdims=True) if real.any() else np.nan
                found = np.linalg.norm(x - mean, axis=-1) / np.linalg.norm(x, axis=-1)
            elif measure == "last":
                norms = np.linalg.norm(x, axis=-1)
                found = (x * x[-1]).sum(axis=-1) / (norms * norms[-1])
            else:
                raise InputError(f"measure={measure!r}; expected one of {', '.join(TOKEN_MEASURES)}")
        found[:, ~self.mask[sequence]] = np.nan
        return found.T

    def stream_map(self) -> np.ndarray:
        """Root mean square norm of each stream at each depth, over real tokens; shape (stream, depth)."""
        real = self.mask
        found = np.full((self.num_streams, self.num_depths), np.nan)
        for depth in range(self.num_depths if real.any() else 0):
            x = self._states[depth][real].astype(np.float64)  # (tokens, streams, features)
            found[:, depth] = np.sqrt((x**2).sum(axis=-1).mean(axis=0))
        return found

    def largest(
        self, depth: int, *, entries: bool = False, stream: str = "mean", most: int = 5
    ) -> list[Large]:
        """The tokens with the largest states of a depth, or the entries with the largest |x|: which feature of which token."""
        x = self._view(stream, depth=depth)
        values = x if entries else np.linalg.norm(x, axis=-1)
        sizes = np.abs(values)
        known = sizes[self.mask]
        known = known[known > 0] if entries else known  # half of the entries behind a ReLU are zero
        median = float(np.median(known)) if known.size else 0.0
        return [
            Large(
                self.texts(place[0])[place[1]],
                place[0],
                place[1],
                place[2] if entries else None,
                float(values[place]),
                float(sizes[place]) / median if median > 0 else float("nan"),
            )
            for place in self._places(sizes, most)
        ]

    def _places(self, sizes: np.ndarray, most: int) -> list[tuple[int, ...]]:
        """Places of the largest, of real tokens; what is not finite is the largest."""
        real = self.mask[(..., *(None,) * (sizes.ndim - 2))]
        flat = np.where(real, np.where(np.isfinite(sizes), sizes, np.inf), -np.inf).ravel()
        best = np.argpartition(-flat, min(most, flat.size - 1))[:most]
        best = best[np.argsort(-flat[best], kind="stable")]
        places = (np.unravel_index(int(at), sizes.shape) for at in best)
        return [tuple(map(int, place)) for place in places if self.mask[place[:2]]]

    def connections_at(self, depth: int) -> list[int]:
        """Connections that write a depth, and where none does, those that read it."""
        if not self.num_connections:
            return []
        into = np.flatnonzero(self.depth_out == depth)
        return [int(i) for i in (into if len(into) else np.flatnonzero(self.depth_in == depth))]

    def matrices(self, first: int, last: int) -> list[Matrix]:
        """The product of H_res from one connection to another, the later one on the left; of one also its H_pre and H_post.

        The mean over tokens first, then those of the tokens of `QUANTILES`.
        """
        if not self.mask.any():
            return []
        product = composite(self._trace["h_res"].values[first : last + 1].astype(np.float64))
        weights = self._weights(first) if first == last else ()
        return [self._matrix(whose, product, *weights) for whose in ("mean", *QUANTILES)]

    def pictures(self, whose: str, token: tuple[int, int] | None = None) -> tuple[list[Matrix], list[Matrix]]:
        """H_res of every connection, and their products from the first one on, of a token or of their mean."""
        singles: list[Matrix] = []
        products: list[Matrix] = []
        product: np.ndarray | None = None
        for connection, h in enumerate(self._trace["h_res"].values if self.mask.any() else ()):
            product = h.astype(np.float64) if product is None else h @ product
            singles.append(self._matrix(whose, h, *self._weights(connection), token=token))
            products.append(self._matrix(whose, product, token=token))
        return singles, products

    def _weights(self, connection: int) -> list[np.ndarray | None]:
        names = ("h_pre", "h_post")
        return [self._trace[name].values[connection] if name in self._trace else None for name in names]

    def _matrix(self, whose: str, *parts: np.ndarray | None, token: tuple[int, int] | None = None) -> Matrix:
        """The matrix and the weights of ``parts``, which have one for each token, of a key of `WHOSE`."""
        if whose == "mean" or (whose == MARKED and token is None):
            means = (
                each if each is None else each[self.mask].mean(axis=0, dtype=np.float64) for each in parts
            )
            return Matrix(WHOSE["mean"], *means)  # type: ignore[arg-type]
        prefix = ""
        if whose != MARKED:
            real, h = np.argwhere(self.mask), np.asarray(parts[0], dtype=np.float64)[self.mask]
            sizes = np.maximum(np.abs(h.sum(axis=2)).max(axis=1), np.abs(h.sum(axis=1)).max(axis=1))
            order = np.argsort(np.where(np.isfinite(sizes), sizes, np.inf), kind="stable")
            sequence, position = map(int, real[order[round(QUANTILES[whose] * (len(order) - 1))]])
            token, prefix = (sequence, position), f"{whose} token: "
        assert token is not None
        words = f"{prefix}{self.quoted(token[0])[token[1]]}, position {token[1]} of sequence {token[0]}"
        h_res, *weights = (each if each is None else each[token].astype(np.float64) for each in parts)
        return Matrix(words, h_res, *weights)  # type: ignore[arg-type]


def read_close_up(path: Path, chain: str = "", *, max_bytes: int | None = None) -> CloseUp | None:
    """The trace of a chain of a run that was verified before; None for a run without states, such as one of weights alone."""
    with schema.open_group(path, "trace", chain, max_bytes=max_bytes) as trace:
        if "residual" not in trace:
            return None
        wanted = [
            name
            for name in ("residual", "mask", "token_text", *(of.name for of in schema.SUMMED))
            if name in trace
        ]
        part = trace.drop_vars([name for name in trace.data_vars if name not in wanted])
        sequences = int(part.sizes["sample"])
        each = max(sum(part[name].nbytes for name in wanted) // max(sequences, 1), 1)
        return CloseUp(part.isel(sample=slice(0, max(1, MOST_BYTES // each))).load(), sequences)
