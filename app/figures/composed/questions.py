"""Which questions does a paper ask of some runs? Figures of several panels, one definition of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthscope.app.figures import catalogue
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.composed.panels import Curves, History, Loss, Maps, Matrices, PanelRecipe


@dataclass(frozen=True)
class Question:
    """A figure of several panels, before it has met any run.

    ``name``: Register key, file name, and name of the function in `depthscope.figures`.
    ``title``: The beginning of the caption.
    ``recipes``: Its panels, in the order of their letters.
    """

    name: str
    title: str
    recipes: tuple[PanelRecipe, ...]


_state_spectrum = MatrixFigure(
    "state_spectrum",
    "Singular values of the states",
    "σ",
    metric="singular_value",
    rows="order",
    question="collapse",
    columns="depth",
    y_label="order",
)
_product_spectrum = MatrixFigure(
    "product_spectrum",
    "Singular values of the product",
    "σ",
    metric="composite_singular_value",
    rows="component",
    columns="connection",
    y_label="order",
    question="mixing",
)
_eigenvalues = MatrixFigure(
    "mixing_eigenvalues",
    "Magnitudes of the eigenvalues of each connection",
    "|λ|",
    metric="mixing_eigenvalue_modulus",
    rows="component",
    columns="connection",
    y_label="order",
    question="mixing",
)

_FORWARD, _BACKWARD = {"direction": "forward"}, {"direction": "backward"}

QUESTIONS: dict[str, Question] = {
    question.name: question
    for question in (
        Question(
            "collapse",
            "Collapse across depth",
            (
                Curves("rank", "effective rank, all tokens", catalogue.effective_rank, {"tokens": "all"}),
                Curves(
                    "rank_ordinary",
                    "effective rank, ordinary tokens",
                    catalogue.effective_rank,
                    {"tokens": "ordinary"},
                ),
                Curves(
                    "participation",
                    "participation ratio",
                    catalogue.corrected_participation_ratio,
                    log_y=True,
                ),
                Curves("token_cosine", "cosine between tokens", catalogue.token_cosine),
                Curves("dong_residual", "distance from equal tokens", catalogue.dong_residual),
                Curves("streams", "cosine between streams", catalogue.stream_cosine),
            ),
        ),
        Question(
            "similarity",
            "Similarity of depths",
            (
                Maps("cka", "CKA", catalogue.cka),
                Curves("adjacent_cosine", "cosine with the depth before", catalogue.adjacent_cosine),
                Curves("adjacent_cka", "CKA with the depth before", catalogue.adjacent_cka),
                Curves("block_influence", "block influence", catalogue.block_influence),
            ),
        ),
        Question(
            "gains",
            "Gains of the stream mixing",
            (
                Curves("single_forward", "single, forward", catalogue.mixing_gain, _FORWARD),
                Curves("single_backward", "single, backward", catalogue.mixing_gain, _BACKWARD),
                Curves("composite_forward", "composite, forward", catalogue.composite_gain, _FORWARD),
                Curves("composite_backward", "composite, backward", catalogue.composite_gain, _BACKWARD),
            ),
        ),
        Question("mixing", "Mixing matrices", (Matrices(),)),
        Question(
            "kernel",
            "Who reads whom: the depth kernel",
            (Maps("kernel", "depth kernel", catalogue.depth_kernel, most=2),),
        ),
        Question(
            "spectra",
            "Spectra",
            (
                # States are float32: below, singular values are rounding.
                Maps("states", "σ of the states", _state_spectrum, floor=float(np.finfo(np.float32).eps)),
                Maps("products", "σ of the product", _product_spectrum, most=2),
                Maps("eigenvalues", "|λ| of each connection", _eigenvalues, most=2),
            ),
        ),
        Question(
            "gradients",
            "Gradients and sensitivity",
            (
                Curves("gradient_norm", "gradient norm", catalogue.gradient_norm),
                Curves("backward_gain", "backward gain", catalogue.backward_gain),
                Curves("relative_gradient", "gradient relative to the state", catalogue.relative_gradient),
                Curves("gradient_rank", "rank of the gradients", catalogue.gradient_rank),
                Curves("residual_norm", "norm of the state", catalogue.residual_norm),
                Curves("branch_share", "share of the branch", catalogue.branch_share),
            ),
        ),
        Question(
            "training",
            "Training",
            (
                Loss(),
                History("effective_rank", "effective rank"),
                History("residual_norm", "norm of the state"),
                History("gradient_norm", "gradient norm"),
                History("composite_gain", "composite gain, forward"),
            ),
        ),
    )
}
"""Every composed figure by name, in display order."""
