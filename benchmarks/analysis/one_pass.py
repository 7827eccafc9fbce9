"""How accurate is CKA from one pass over the tokens? Sketches, minibatches and a subsample, compared with exact CKA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.analysis import sketches
from benchmarks.analysis.comparison import Comparison, Step, Tool
from benchmarks.analysis.inputs import in_order, massive, smollm2
from depthscope.diagnostics.kernels import similarity
from depthscope.probes.statistics.streamed_spectra import depth_hsic
from depthscope.probes.statistics.streamed_sums import StreamedSums
from depthscope.probes.statistics.token_sums import TokenSums

# --- ways; data are states (L, B, T, D) in float32 ---


def exact(states: np.ndarray) -> Step:
    return partial(similarity.cka_matrix, flat(states), unbiased=True)


def flat(states: np.ndarray) -> np.ndarray:
    return states.reshape(len(states), -1, states.shape[-1])


def token_sums(states: np.ndarray, *, streaming: bool, forwards: int = 4) -> Callable[[], TokenSums]:
    """The sums of `probes`, forward by forward: statistics of every token; with `streaming`, moments and sketch too."""
    # (L, B, T, D) in several forwards, with a stream dim of one.
    parts = [part.unsqueeze(3) for part in torch.from_numpy(states).chunk(forwards, 1)]

    def step() -> TokenSums:
        # `first` numbers the sequences over all forwards: the hash of a token is that of its index.
        total, first = TokenSums(), 0
        for part in parts:
            sums = TokenSums(StreamedSums(first)) if streaming else TokenSums()
            for depth, state in enumerate(part):
                sums.add_state(depth, state, None)
            sums.end_forward()
            total.merge(sums)
            first += part.shape[1]
        return total

    return step


def streamed(states: np.ndarray) -> Step:
    sums = token_sums(states, streaming=True)

    def step() -> np.ndarray:
        streaming = sums().streaming
        assert streaming is not None
        tables = depth_hsic(streaming.flushed(), range(len(states)))
        assert tables is not None, "the depths are of one width"
        return correlation(tables[0].numpy())

    return step


def moments(states: np.ndarray) -> Step:
    """A Gram matrix of features for each depth: the least that second moments cost."""
    x = torch.from_numpy(flat(states))
    return lambda: [part.T @ part for part in x]


def correlation(hsic: np.ndarray) -> np.ndarray:
    own = np.sqrt(np.diagonal(hsic))
    return hsic / np.outer(own, own)


def row_sketch(states: np.ndarray, *, buckets: int) -> Step:
    """The kernel alone, without heavy tokens."""
    x = flat(states)

    def step() -> np.ndarray:
        mean = x.mean(1, dtype=np.float64)
        # Σ‖x − μ‖² = Σ‖x‖² − N‖μ‖², accumulated in float64.
        square = np.einsum("lnd,lnd->l", x, x, dtype=np.float64) - x.shape[1] * (mean**2).sum(1)
        sketch, signs = sketches.row_sketch(x, np.arange(x.shape[1]), buckets)
        return sketches.cka_from_sketch(sketch, signs, mean, diagonals=square, count=x.shape[1])

    return step


def minibatches(states: np.ndarray, *, size: int) -> Step:
    x = flat(states)
    # Cut before the timing: a training loop has its batches anyway.
    batches = [x[:, start : start + size] for start in range(0, x.shape[1], size)]
    return partial(similarity.minibatch_cka, batches)


def subsample(states: np.ndarray, *, size: int) -> Step:
    x = flat(states)
    # Evenly spread over the sequences.
    chosen = np.linspace(0, x.shape[1] - 1, size).round().astype(int)
    return lambda: similarity.cka_matrix(x[:, chosen], unbiased=True)


TOOLS = {
    "exact (cka_matrix)": Tool(exact, answers=False),
    "probes, streaming=True": Tool(streamed),
    "· the other statistics alone": Tool(partial(token_sums, streaming=False), answers=False),
    "· plain Gram matrices of the features": Tool(moments, answers=False),
    "row sketch, 256 buckets": Tool(partial(row_sketch, buckets=256)),
    "minibatches of 64": Tool(partial(minibatches, size=64)),
    "minibatches of 256": Tool(partial(minibatches, size=256)),
    "subsample of 512": Tool(partial(subsample, size=512)),
}


def rms(found: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square over pairs of different depths."""
    # The table is symmetric, and its diagonal is 1 for every tool.
    away = (found - truth)[np.triu_indices(len(truth), 1)]
    return float(np.sqrt((away**2).mean()))


def in_orders(make: Callable[[], np.ndarray], what: str, count: int) -> dict[str, Callable[[], np.ndarray]]:
    """The same states with their sequences in another order or two."""

    def reordered(number: int) -> np.ndarray:
        return in_order(make(), number)

    return {f"{what}order {number}": partial(reordered, number) for number in range(1, count + 1)}


def comparisons(quick: bool) -> dict[str, Comparison]:
    """The same depths with several orders of sequences: other hashes and batches, and the same reference."""
    shape, width = ((9, 8, 32), 64) if quick else ((31, 32, 128), 576)
    make: Callable[..., np.ndarray] = partial(massive, *shape, width=width)

    def truth(states: np.ndarray) -> np.ndarray:
        return exact(states)()

    layers, sequences, tokens = shape
    return {
        "one pass": Comparison(
            title=f"CKA of {layers} depths over {sequences * tokens} tokens with massive ones, in one pass",
            tools=TOOLS,
            baseline="exact (cka_matrix)",
            sizes={f"{layers} × {sequences * tokens} × {width}": make},
            variants=in_orders(make, "walk, ", 1)
            | ({} if quick else in_orders(partial(smollm2, 8, 512), "SmolLM2, ", 2)),
            truths={"": truth},
            error=rms,
            note=NOTE,
        )
    }


NOTE = """Errors are root mean squares over pairs of depths, against the exact kernel, whose own error the first table has.
The states are a walk whose first tokens are massive at all but the first and the last depths, and those of SmolLM2-135M on 8
sequences. Another order of the sequences changes the hashes and the batches, and not the answer. `probes` computes the second
moments of every depth too, for the streamed ranks, and finds the heavy tokens on the way."""
