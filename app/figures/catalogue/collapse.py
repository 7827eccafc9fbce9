"""Do representations collapse across depth? Ranks, tokens that become equal, the shape of the cloud, its spectrum."""

from functools import partial

from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.spectrum_figure import SpectrumFigure, by_order, density

# One partial for each section of the page; figures are shown in the order of DEFINED.
_ranks = partial(CurveFigure, question="collapse", section="Ranks")
_tokens = partial(CurveFigure, question="collapse", section="Tokens")
_heads = partial(MatrixFigure, columns="head", limits=(0.0, 1.0), question="collapse", section="Tokens")
# Two figures of one metric: neither has its name, so both name it.
_singular_values = partial(SpectrumFigure, question="collapse", section="Spectrum", metric="singular_value")

effective_rank = _ranks(
    "effective_rank",
    "Effective rank across depth",
    "effective rank",
)
participation_ratio = _ranks(
    "participation_ratio",
    "Participation ratio across depth",
    "participation ratio",
)
corrected_participation_ratio = _ranks(
    "corrected_participation_ratio",
    "Participation ratio of the population across depth",
    "participation ratio",
    note="Without the bias of the sampled tokens.",
)
numerical_rank = _ranks(
    "numerical_rank",
    "Numerical rank across depth",
    "numerical rank",
    note="Directions above the rounding of float32.",
)
# These three compare the tokens of one sequence: the caption counts those of one, not of all ("data", the default).
dong_residual = _tokens(
    "dong_residual",
    "Distance to identical tokens across depth",
    "r(X) / ‖X‖",
    scope="sequence",
    note="0 means that all tokens of a sequence are equal.",
)
token_cosine = _tokens(
    "token_cosine",
    "Token cosine across depth",
    "mean cosine of two tokens",
    note="1 means that all tokens point the same way.",
)
sequence_share = CurveFigure(
    "sequence_share",
    "Share of the variance that is between sequences",
    "variance between sequences / variance",
    question="collapse",
    section="Tokens",
    note="0: all sequences have the same states.",
)
# Sun et al. 2024 call an activation massive above 100 and above 1000 × the median; the metric is a ratio to the median.
massive_activation = _tokens(
    "massive_activation",
    "Massive activations across depth",
    "largest |a| / median |a|",
    thresholds=((1000.0, "massive: 1000 × median"),),
)
massive_token_fraction = _tokens(
    "massive_token_fraction",
    "Tokens with a massive activation",
    "share of the tokens",
    note="Above 100 and above 1000 × the median.",
)
attention_entropy = _heads(
    "attention_entropy",
    "Entropy of attention by head",
    "share of uniform",
    note="0 where each query attends to one token alone.",
)
sink_mass = _heads(
    "sink_mass",
    "Attention on the first token by head",
    "weight on the first token",
)
spectrum = _singular_values(
    "spectrum",
    "Singular values of the states",
    "order (1 = largest)",
    "singular value",
    by_order,
    note="Not drawn below the rounding of float32.",
)
spectrum_map = MatrixFigure(
    "spectrum_map",
    "Singular values of the states at every depth",
    "singular value",
    rows="order",
    columns="depth",
    y_label="order (1 = largest)",
    metric="singular_value",
    question="collapse",
    section="Spectrum",
)
spectral_density = _singular_values(
    "spectral_density",
    "Density of the eigenvalues of the states",
    "eigenvalue of XᵀX",
    "share of the eigenvalues per decade",
    density,
    note="Eigenvalues beyond the ends of the dashed curve, the edges of noise, are structure.",
)
