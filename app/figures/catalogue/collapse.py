"""Do representations collapse across depth? Ranks, tokens that become equal, the shape of the cloud, its spectrum."""

from functools import partial

from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure
from depthscope.app.figures.build.spectrum_figure import SpectrumFigure, by_order, density

# One partial for each section of the page; figures are shown in the order of DEFINED.
_ranks = partial(CurveFigure, question="collapse", section="Ranks")
_tokens = partial(CurveFigure, question="collapse", section="Tokens")
_heads = partial(MatrixFigure, columns="head", limits=(0.0, 1.0), question="collapse", section="Tokens")
_spectrum = partial(CurveFigure, question="collapse", section="Spectrum")
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
entropy_rank = _ranks(
    "entropy_rank",
    "Matrix-entropy rank across depth",
    "entropy rank",
)
stable_rank = _ranks(
    "stable_rank",
    "Stable rank across depth",
    "stable rank",
)
numerical_rank = _ranks(
    "numerical_rank",
    "Numerical rank across depth",
    "numerical rank",
    note="Directions above the rounding of float32.",
)
intrinsic_dimension = _ranks(
    "intrinsic_dimension",
    "Intrinsic dimension across depth",
    "TwoNN dimension",
    note="From the two nearest neighbours of each token, all tokens pooled; its bias has a figure of its own.",
)
intrinsic_dimension_bias = _ranks(
    "intrinsic_dimension_bias",
    "Bias of the intrinsic dimension across depth",
    "dimensions",
    note="What the estimator is short of that of a normal cloud which measures the same.",
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
dirichlet_energy = _tokens(
    "dirichlet_energy",
    "Dirichlet energy across depth",
    "tr(XᵀLX) / ‖X‖²",
    scope="sequence",
    note="0 means that all tokens of a sequence are equal (oversmoothed).",
)
curvature = _tokens(
    "curvature",
    "Curvature of the path of tokens",
    "mean angle between steps",
    scope="sequence",
    note="0 is a straight path from token to token, π one that goes back and forth.",
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
feature_kurtosis = _tokens("feature_kurtosis", "Kurtosis of the features across depth", "kurtosis")
zero_fraction = _tokens("zero_fraction", "Entries that are exactly zero", "share of the entries")
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
top_energy = _spectrum(
    "top_energy",
    "Energy in the ten strongest directions",
    "share of the energy",
)
alpha_req = _spectrum(
    "alpha_req",
    "Power law of the spectrum (α-ReQ)",
    "exponent α",
    around="alpha_req_error",
    note="Near 1 in good representations; centred is the published form.",
)
