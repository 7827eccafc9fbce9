"""What is in a run at one depth? Its tokens, features and connections, read from the trace of the run.

An analysis has numbers over all tokens. To see the cause one looks at single tokens: this reads the states themselves, keeps
as many sequences in memory as fit, and closes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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
        self.depth_in = self._of_connections("depth_in", 0)
        self.depth_out = self._of_connections("depth_out", 1)

    def _of_connections(self, name: str, offset: int) -> np.ndarray:
        if name in self._trace:
            return np.asarray(self._trace[name].values, dtype=int)
        return np.arange(self._trace.sizes.get("connection", 0)) + offset

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
            visible(text if str(text).strip() else _blank_signs(str(text)), longest=LONGEST_TOKEN)
            for text in found
        ]

    def quoted(self, sequence: int) -> list[str]:
        """As `texts`, in quotation marks where it is text."""
        return [f"“{text}”" if self.has_texts else text for text in self.texts(sequence)]

    @property
    def has_texts(self) -> bool:
        """Whether the run has the text of its tokens."""
        return "token_text" in self._trace

    @cached_property
    def mean_matrices(self) -> np.ndarray:
        """The mean over real tokens of every connection's H_res; shape (connection, n, n), NaN without a real token."""
        stack = self._trace["h_res"].values
        if not self.mask.any():
            return np.full((len(stack), *stack.shape[-2:]), np.nan)
        return np.stack([each[self.mask].mean(axis=0, dtype=np.float64) for each in stack])

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

    def largest_tokens(self, depth: int, *, stream: str = "mean", most: int = 5) -> list[Large]:
        """The tokens with the largest states of a depth."""
        norms = np.linalg.norm(self._view(stream, depth=depth), axis=-1)
        median = float(np.median(norms[self.mask])) if self.mask.any() else np.nan
        return [
            Large(self.texts(s)[t], s, t, None, float(norms[s, t]), _ratio(norms[s, t], median))
            for s, t in self._places(norms, most)
        ]

    def largest_entries(self, depth: int, *, stream: str = "mean", most: int = 5) -> list[Large]:
        """The entries with the largest |x| of a depth: which feature of which token."""
        x = self._view(stream, depth=depth)
        size = np.abs(x)
        nonzero = size[self.mask][size[self.mask] > 0]  # half of the entries behind a ReLU are zero
        median = float(np.median(nonzero)) if nonzero.size else np.nan
        return [
            Large(self.texts(s)[t], s, t, f, float(x[s, t, f]), _ratio(size[s, t, f], median))
            for s, t, f in self._places(size, most)
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

    def matrices(self, connection: int) -> list[Matrix]:
        """H_res, H_pre and H_post of a connection: the mean over tokens first, then those of the tokens of `QUANTILES`."""
        return self._of_tokens(
            self._trace["h_res"].values[connection],
            self._weights("h_pre", connection),
            self._weights("h_post", connection),
        )

    def pictures(self, whose: str, token: tuple[int, int] | None = None) -> tuple[list[Matrix], list[Matrix]]:
        """H_res of every connection, and their products from the first one on, of a token or of their mean."""
        singles: list[Matrix] = []
        products: list[Matrix] = []
        product: np.ndarray | None = None
        at = token if whose == MARKED else None
        which = 0 if whose == MARKED else list(WHOSE).index(whose)
        for connection, h in enumerate(self._trace["h_res"].values if self.mask.any() else ()):
            product = h.astype(np.float64) if product is None else h @ product
            weights = [self._weights(name, connection) for name in ("h_pre", "h_post")]
            for found, matrix, more in ((singles, h, weights), (products, product, [None, None])):
                found.append(
                    self._of_tokens(matrix, *more)[which]
                    if at is None
                    else self._of_token("", at, matrix, *more)
                )
        return singles, products

    def composite(self, first: int, last: int) -> list[Matrix]:
        """The product of H_res from one connection to another, the later one on the left; as in `matrices`."""
        stack = self._trace["h_res"].values[first : last + 1].astype(np.float64)
        return self._of_tokens(composite(stack), None, None)

    def _weights(self, name: str, connection: int) -> np.ndarray | None:
        return np.asarray(self._trace[name].values[connection]) if name in self._trace else None

    def _of_tokens(self, h: np.ndarray, pre: np.ndarray | None, post: np.ndarray | None) -> list[Matrix]:
        real = np.argwhere(self.mask)
        if not len(real):
            return []
        tokens = np.asarray(h[self.mask], dtype=np.float64)  # (tokens, n, n)
        sizes = np.maximum(np.abs(tokens.sum(axis=2)).max(axis=1), np.abs(tokens.sum(axis=1)).max(axis=1))
        order = np.argsort(np.where(np.isfinite(sizes), sizes, np.inf), kind="stable")
        means = (
            None if part is None else part[self.mask].mean(axis=0, dtype=np.float64) for part in (pre, post)
        )
        places = {name: real[order[round(share * (len(order) - 1))]] for name, share in QUANTILES.items()}
        return [
            Matrix("mean over tokens", tokens.mean(axis=0), *means),
            *(
                self._of_token(f"{name} token: ", tuple(map(int, at)), h, pre, post)
                for name, at in places.items()
            ),
        ]

    def _of_token(
        self, what: str, at: tuple[int, ...], h: np.ndarray, pre: np.ndarray | None, post: np.ndarray | None
    ) -> Matrix:
        sequence, position = at
        words = f"{what}{self.quoted(sequence)[position]}, position {position} of sequence {sequence}"
        weights = (None if part is None else part[at] for part in (pre, post))
        return Matrix(words, h[at].astype(np.float64), *weights)


def _blank_signs(text: str) -> str:
    return "".join(_BLANKS.get(letter, repr(letter)[1:-1]) for letter in text) or "(empty)"


def _ratio(value: float, median: float) -> float:
    return float(value) / median if median > 0 else float("nan")


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
