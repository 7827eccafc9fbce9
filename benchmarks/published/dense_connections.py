"""What do the sublayers of a stack read? HC Fig. 3, 7, 13 and 14, on built networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.published.row import Row
from depthscope.diagnostics.kernels import geometry, mixing

# Shapes: C connections, T tokens, N streams, D features; S sources: the embedding, then each connection's output.

CONNECTIONS, TOKENS, WIDTH, STREAMS = 24, 1000, 256, 4
FADING = 0.5
BAND = (0.05, 0.5, 0.95)
NORMAL_95 = 1.645  # the 95 % quantile of a standard normal distribution
MARKS = (4, 16)
RECENT = 4
SHADES = " .:-=+*#%@"


class Static(NamedTuple):
    """Connections whose weights do not depend on the token."""

    res_CNN: np.ndarray
    pre_CN: np.ndarray
    post_CN: np.ndarray
    embedding_N: np.ndarray

    def matrix(self) -> np.ndarray:
        """HC's dense connection matrix (C, S)."""
        return mixing.depth_kernel(self.res_CNN, self.pre_CN, self.post_CN, embedding=self.embedding_N)

    def read(self, outputs_STD: np.ndarray) -> np.ndarray:
        """What each connection reads (C, T, D), by running the streams with these outputs of the branches."""
        x_NTD = self.embedding_N[:, None, None] * outputs_STD[0]
        reads = []
        for res, pre, post, output in zip(*self[:3], outputs_STD[1:], strict=True):
            reads.append(np.tensordot(pre, x_NTD, 1))
            x_NTD = np.tensordot(res, x_NTD, 1) + post[:, None, None] * output
        return np.stack(reads)


def residual() -> Static:
    """One stream to which everything is added: Pre-LN."""
    one = np.ones((CONNECTIONS, 1))
    return Static(one[:, None], one, one, np.ones(1))


def hc_at_its_start() -> Static:
    """HC before training: H_res is the identity, all streams are written equally, connection k reads stream k mod n."""
    reads = np.eye(STREAMS)[np.arange(CONNECTIONS) % STREAMS]
    res = np.broadcast_to(np.eye(STREAMS), (CONNECTIONS, STREAMS, STREAMS))
    return Static(res, reads, np.ones((CONNECTIONS, STREAMS)), np.ones(STREAMS))


def lambda_shaped() -> Static:
    """One stream retains the embedding, another takes the outputs and is halved at each connection: a Λ."""
    res = np.broadcast_to(np.diag([1.0, FADING]), (CONNECTIONS, 2, 2))
    writes = np.broadcast_to([0.0, 1.0], (CONNECTIONS, 2))
    return Static(res, np.ones((CONNECTIONS, 2)), writes, np.array([1.0, 0.0]))


BUILT = {"Pre-LN": residual, "HC at its start": hc_at_its_start, "Λ": lambda_shaped}


def adjacent_cosine() -> Iterator[Row]:
    """HC Fig. 3: cosine of adjacent sublayers' inputs, 5-95 % band, of independent branches; printed: closed form."""
    outputs = np.random.default_rng(0).standard_normal((CONNECTIONS + 1, TOKENS, WIDTH)).astype(np.float32)
    for name in ("Pre-LN", "Λ"):
        built = BUILT[name]()
        reads, matrix = built.read(outputs), built.matrix()
        for mark in MARKS:
            found = np.quantile(geometry.row_cosine(reads[mark - 1], reads[mark]), BAND)
            for share, law, value in zip(BAND, cosine_band(matrix[mark - 1 : mark + 1]), found, strict=True):
                yield Row(f"{name}: inputs of sublayers {mark} and {mark + 1}, {share:.0%}", law, value, 0.01)


def cosine_band(rows_2S: np.ndarray) -> np.ndarray:
    """Quantiles of the cosine of two sums of independent directions: about its mean, a spread of (1 − c²)/√D."""
    first, second = rows_2S
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    # The cosine of vectors with correlation c in D dimensions has a deviation of about (1 − c²)/√D (Fisher).
    reach = NORMAL_95 * (1 - cosine**2) / WIDTH**0.5
    return cosine + reach * np.array([-1, 0, 1])


def dense_connections() -> Iterator[Row]:
    """HC Fig. 7, 13, 14: dense connections of Pre-LN (a triangle of ones), HC at its start (the same) and a built Λ."""
    matrices = {name: build().matrix() for name, build in BUILT.items()}
    triangle = np.tri(CONNECTIONS, CONNECTIONS + 1)
    for name in ("Pre-LN", "HC at its start"):
        difference = np.abs(matrices[name] - triangle).max()
        yield Row(f"{name}: largest difference from a triangle of ones", 0.0, difference, 0)
    # Outputs fade as 1, ½, ¼, …; the embedding does not.
    sides = 1 + sum(FADING**age for age in range(RECENT))
    total = 1 + (1 - FADING ** (CONNECTIONS - 1)) / (1 - FADING)
    for name, law in (("Pre-LN", (1 + RECENT) / CONNECTIONS), ("Λ", sides / total)):
        share = on_the_sides(matrices[name][-1])
        yield Row(
            f"{name}: last sublayer's share from embedding and last {RECENT} outputs", law, share, 1e-12
        )


def on_the_sides(reads_S: np.ndarray) -> float:
    """The share of the embedding and of the latest outputs in all that the last sublayer reads."""
    read = np.abs(reads_S[:-1])  # without the last column, its own output
    return float((read[0] + read[-RECENT:].sum()) / read.sum())


def drawn() -> str:
    """The three dense connection matrices in characters: down, who reads; across, embedding and outputs."""
    return side_by_side({name: build().matrix() for name, build in BUILT.items()})


def side_by_side(matrices: Mapping[str, np.ndarray]) -> str:
    """Matrices side by side in characters, each under its name."""
    columns = [picture(name, matrix) for name, matrix in matrices.items()]
    return "\n".join("   ".join(lines).rstrip() for lines in zip(*columns, strict=True))


def picture(name: str, matrix_CS: np.ndarray) -> list[str]:
    """Lines of one matrix, darker where more is read, as a share of the largest entry."""
    size = np.abs(matrix_CS)
    # Rounded up: whatever is read is visible.
    shade = np.ceil((len(SHADES) - 1) * size / size.max()).astype(int)
    lines = [name, *("".join(SHADES[s] for s in row) for row in shade)]
    return [f"  {line:<{max(map(len, lines))}}" for line in lines]
