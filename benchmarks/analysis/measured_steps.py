"""What does a measured training step or evaluation cost? Compared with plain ones, and with code written by hand."""

from __future__ import annotations

from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch

from benchmarks.analysis.comparison import Comparison, Step, Tool
from benchmarks.capture.cases import Case, Sizes, build, run
from depthscope import probes
from depthscope.diagnostics import analyze


def plain(case: Case, *, backward: bool) -> Step:
    batch = case.batch()

    def step() -> None:
        run(case, batch, backward=backward)
        moved(case)

    return step


def moved(case: Case) -> None:
    """Raise the version counter of the weights, as an optimizer does, and remove the gradients."""
    with torch.no_grad():
        # Adding zero in place changes nothing but the version, by which a recorder knows that a training step was made.
        next(case.model.parameters()).view(-1)[0].add_(0.0)
    case.model.zero_grad(set_to_none=True)


def measured(case: Case, *, backward: bool, analysis: bool = True, sequences: int = 8) -> Step:
    """A step that is captured, its run built, and the run analysed by every default metric."""
    batch = case.batch()
    # Made once, outside the timed step, as in a training loop.
    recorder = probes.record(case.model, gradients=backward, max_sequences=sequences)

    def step() -> Any:
        with recorder:
            run(case, batch, backward=backward)
            recorder.step()
        moved(case)
        return analyze(recorder.run) if analysis else recorder.run

    return step


def evaluated(case: Case) -> Step:
    """A forward of an evaluation, with its statistics of every token."""
    batch = case.batch()
    recorder = probes.record(case.model)

    def step() -> None:
        with recorder:
            run(case, batch, backward=False)
            recorder.step()

    return step


def naive(case: Case, *, backward: bool) -> Step:
    """Hooks that clone; an SVD of every state and gradient, CKA pair by pair."""
    batch = case.batch()
    modules = [case.model.get_submodule(site) for site in case.sites]

    def step() -> Any:
        states: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []

        def see(_module: Any, _args: Any, output: torch.Tensor) -> None:
            # A clone, as one writes by hand: later operations may write into the output.
            states.append(output.detach().clone())
            if backward:
                output.register_hook(lambda gradient: gradients.append(gradient.clone()))

        # Put on and removed at each step, as a recorder does between measured steps.
        handles = [module.register_forward_hook(see) for module in modules]
        try:
            run(case, batch, backward=backward)
        finally:
            for handle in handles:
                handle.remove()
        moved(case)
        return by_hand(case, states), [spectrum(case, gradient) for gradient in gradients]

    return step


def by_hand(case: Case, states: list[torch.Tensor]) -> Any:
    spectra = [spectrum(case, state) for state in states]
    matrices = [pooled(case, state) for state in states]
    return spectra, [pairwise_cka(x, y) for x, y in combinations_with_replacement(matrices, 2)]


def pooled(case: Case, state: torch.Tensor) -> torch.Tensor:
    """All tokens as rows, in the mean over streams."""
    return case.canonical(state).mean(2).flatten(0, 1)


def spectrum(case: Case, state: torch.Tensor) -> list[np.ndarray]:
    """Singular values of every sequence, and of all tokens."""
    sequences = case.canonical(state).mean(2)
    return [torch.linalg.svdvals(x).numpy() for x in (*sequences, pooled(case, state))]


def pairwise_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    # ‖XᵀY‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F), as it is usually written.
    norms = [torch.linalg.matrix_norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y))]
    return float(norms[0] ** 2 / (norms[1] * norms[2]))


TRAINING = {
    "plain": Tool(partial(plain, backward=True)),
    "plain again": Tool(partial(plain, backward=True)),
    "capture, the run built": Tool(partial(measured, backward=True, analysis=False)),
    "capture and every default metric": Tool(partial(measured, backward=True)),
    "· 1 sequence of the batch": Tool(partial(measured, backward=True, sequences=1)),
}
BY_HAND = {"by hand: svdvals, pairwise CKA": Tool(partial(naive, backward=True))}
EVALUATION = {
    "plain": Tool(partial(plain, backward=False)),
    "plain again": Tool(partial(plain, backward=False)),
    "statistics": Tool(evaluated),
}


def comparisons(quick: bool) -> dict[str, Comparison]:
    """Steps of a residual model and of an mHC model, and an evaluation."""
    # The full size is that of GPT-2 small: 12 layers of 768 features.
    residual = Sizes(2, 64, 2, 32) if quick else Sizes(12, 768, 4, 128, heads=12)
    streams = Sizes(1, 32, 2, 16) if quick else Sizes(6, 384, 4, 128)
    return {
        "training step, residual": of_case("residual", residual, TRAINING | BY_HAND, TRAINING_NOTE),
        "training step, mHC": of_case("mhc", streams, TRAINING, TRAINING_NOTE),
        "evaluation": of_case("residual", residual, EVALUATION, EVALUATION_NOTE),
    }


def of_case(name: str, sizes: Sizes, tools: dict[str, Tool], note: str) -> Comparison:
    what = "evaluation" if tools is EVALUATION else "training step"
    kind = {"residual": "a GPT-2", "mhc": f"an mHC decoder with {sizes.streams} streams"}[name]
    size = f"{sizes.layers} × {sizes.width}, {sizes.batch} × {sizes.tokens} tokens"
    return Comparison(
        title=f"A measured {what} of {kind}",
        tools=tools,
        baseline="plain",
        sizes={size: partial(build, name, sizes)},
        note=note,
    )


TRAINING_NOTE = """Ratios to the same step without probes. A measured step captures states and gradients, its run is built
from up to 8 sequences, here the whole batch, and analysed by every default metric, which nobody does at each step of a
training. *By hand* is what one writes without this package: clones, an SVD of every state and gradient, CKA pair by pair.
*Plain again* is a second plain step: its distance from 1.00 is noise. The memory of the first row is that of the first
step."""
EVALUATION_NOTE = """Ratios to the same forward without probes. Every token enters the statistics. The weights do not
change: the raw sample is kept as it is."""
