"""How fast and accurate is the exact CKA of every layer with every other? Compared with the packages that compute it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.analysis.comparison import Comparison, Step, Tool, on_all_pairs
from benchmarks.analysis.inputs import OFFSETS, walk
from depthscope.diagnostics.kernels import similarity

LARGE = "13 × 2048"


class Given(nn.Module):
    """A model whose layers return stored states, for tools that take a model and a loader."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.layers = nn.ModuleList(Layer(state) for state in states)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        # The layers are called one after another for their hooks; only the last output is returned.
        for layer in self.layers:
            output = layer(index)
        return output

    @property
    def names(self) -> list[str]:
        return [f"layers.{number}" for number in range(len(self.layers))]


class Layer(nn.Module):
    def __init__(self, state: torch.Tensor):
        super().__init__()
        self.state = state

    def forward(self, _index: torch.Tensor) -> torch.Tensor:
        return self.state


class Loader(list):
    """One batch of all tokens, with the attribute that tools read from a loader."""

    dataset = "states"


def loader(states: torch.Tensor) -> Loader:
    index = torch.arange(states.shape[1])
    return Loader([(index, index)])


def own(states: np.ndarray, *, convert: Callable[[np.ndarray], Any], unbiased: bool = True) -> Step:
    return partial(similarity.cka_matrix, convert(states), unbiased=unbiased)


# --- peers ---


def torch_cka(states: np.ndarray) -> Step:
    from torch_cka import CKA

    given = torch.from_numpy(states)

    def step() -> Any:
        one, other = Given(given), Given(given)  # its hooks are never removed: new models for each step
        cka = CKA(one, other, "one", "other", one.names, other.names)
        with torch.no_grad():
            cka.compare(loader(given))
        return cka.export()["CKA"]

    return step


def cka_pytorch(states: np.ndarray) -> Step:
    from cka_pytorch import CKACalculator

    given = torch.from_numpy(states)

    def step() -> Any:
        one, other = Given(given), Given(given)
        calculator = CKACalculator(one, other, one.names, verbose=False, device=torch.device("cpu"))
        return calculator.calculate_cka_matrix(loader(given), num_epochs=1)

    return step


def pytorch_cka(states: np.ndarray) -> Step:
    from cka import compute_cka

    given = torch.from_numpy(states)

    def step() -> Any:
        model = Given(given)
        return compute_cka(model, model, loader(given), layers=model.names, device="cpu", progress=False)[0]

    return step


def ckatorch_base(states: np.ndarray) -> Step:
    from ckatorch import cka_base

    return partial(on_all_pairs, partial(cka_base, unbiased=True), torch.from_numpy(states))


def ckatorch_batch(states: np.ndarray) -> Step:
    from ckatorch import cka_batch

    def of_pair(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cka_batch(x[None], y[None])

    return partial(on_all_pairs, of_pair, torch.from_numpy(states))


def repsim(states: np.ndarray, *, estimator: str) -> Step:
    from repsim import cka

    return partial(cka, list(states), "linear", estimator)


def netrep(states: np.ndarray) -> Step:
    from netrep.metrics import LinearCKA

    metric = LinearCKA()

    def step() -> np.ndarray:
        return np.cos(on_all_pairs(metric.score, states))  # it gives the arc cosine

    return step


def torchlens(states: np.ndarray) -> Step:
    from torchlens.stats import cka

    return partial(on_all_pairs, cka, torch.from_numpy(states))


# --- the answer ---


def truth(states: np.ndarray, *, unbiased: bool) -> np.ndarray:
    """Linear CKA in float64 from full Gram matrices, as in the papers (Kornblith et al.; Song et al.)."""
    count = states.shape[1]
    grams = np.empty((len(states), count, count))
    for gram, state in zip(grams, states, strict=True):
        # Centred before the product: at an offset of 1e4 a centred Gram matrix would have lost eight digits.
        centred = state.astype(np.float64)
        centred -= centred.mean(0)
        np.matmul(centred, centred.T, out=gram)
        if unbiased:
            # The unbiased estimator leaves a token's product with itself out.
            np.fill_diagonal(gram, 0.0)
    # All HSIC sums as one product of (L, N²) with its transpose.
    flat = grams.reshape(len(states), -1)
    hsic = flat @ flat.T
    if unbiased:
        sums = grams.sum(1)
        # The two other terms of Song's Eq. 5, for diagonals of zero.
        hsic += np.outer(sums.sum(1), sums.sum(1)) / ((count - 1) * (count - 2)) - sums @ sums.T * 2 / (
            count - 2
        )
    size = np.sqrt(np.diagonal(hsic))
    return hsic / np.outer(size, size)


TOOLS = {
    "depthscope, numpy": Tool(partial(own, convert=np.asarray), "unbiased"),
    "depthscope, torch": Tool(partial(own, convert=torch.from_numpy), "unbiased"),
    "pytorch-cka": Tool(pytorch_cka, "unbiased", "pytorch-cka"),
    "torch-cka": Tool(torch_cka, "unbiased", "torch-cka"),
    "cka-pytorch": Tool(cka_pytorch, "unbiased", "cka-pytorch"),
    "ckatorch cka_base": Tool(ckatorch_base, "unbiased", "ckatorch"),
    "ckatorch cka_batch": Tool(ckatorch_batch, "unbiased", "ckatorch", (LARGE,)),
    "netrep LinearCKA": Tool(netrep, "biased", "netrep"),
    "torchlens stats.cka": Tool(torchlens, "biased", "torchlens"),
    "repsim, gretton": Tool(partial(repsim, estimator="gretton"), "biased", "repsim", (LARGE,)),
    "repsim, song": Tool(partial(repsim, estimator="song"), "unbiased", "repsim", (LARGE,)),
    "repsim, lange": Tool(partial(repsim, estimator="lange"), "unbiased", "repsim", (LARGE,)),
}


def comparisons(quick: bool) -> dict[str, Comparison]:
    """CKA of all pairs of layers."""
    sizes = {"6 × 256": (6, 256)} if quick else {"13 × 512": (13, 512), LARGE: (13, 2048)}
    checked = (3, 128) if quick else (4, 512)
    large = list(sizes.values())[-1]
    comparison = Comparison(
        title="CKA of every layer with every other (layers × tokens, 768 features)",
        tools=TOOLS,
        baseline="depthscope, numpy",
        sizes={name: partial(walk, *size) for name, size in sizes.items()},
        variants={f"offset {offset:g}": partial(walk, *checked, offset=offset) for offset in OFFSETS},
        own_variants={
            f"{list(sizes)[-1]}, offset {offset:g}": partial(walk, *large, offset=offset)
            # The first and the last: no offset, and the largest.
            for offset in OFFSETS[:: len(OFFSETS) - 1]
        },
        truths={"unbiased": partial(truth, unbiased=True), "biased": partial(truth, unbiased=False)},
        note=NOTE.format(layers=checked[0], tokens=checked[1]),
    )
    return {"cka": comparison}


NOTE = """Errors are largest absolute differences over {layers} layers × {tokens} tokens, a walk over depth with a common
offset of so many times its spread. Tools that take models and a loader get modules that return the given states and one
batch of all tokens, so that next to nothing but their own work is timed; functions of two matrices are called once for each
pair. netrep, torchlens and repsim's gretton give the biased estimator, and are compared with that; the cosine of netrep's
angle is taken.
repsim's `cka` does not divide its HSIC of Song by those of each layer with itself; its `hsic` is right."""
