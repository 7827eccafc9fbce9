"""What do the connections do to the streams? Gains, collapse of the streams, spectra, and who reads whom."""

from functools import partial

from depthscope.app.figures.build.curve_figure import CurveFigure
from depthscope.app.figures.build.matrix_figure import MatrixFigure

# The gain of every doubly stochastic matrix.
_UNCHANGED = ((1.0, "1"),)

_gains = partial(CurveFigure, question="mixing", section="Gains")
_streams = partial(CurveFigure, question="mixing", section="Streams")
_spectra = partial(CurveFigure, question="mixing", section="Spectra")
_logits = partial(CurveFigure, question="mixing", section="Logits")
_paths = partial(CurveFigure, question="mixing", section="Paths")

mixing_gain = _gains(
    "mixing_gain",
    "Gain of each connection",
    "Amax gain",
    over="direction",
    thresholds=_UNCHANGED,
    note="Largest signed row sum (forward) or column sum (backward) of H_res.",
)
composite_gain = _gains(
    "composite_gain",
    "Composite gain from the embedding",
    "Amax gain of the product",
    over="direction",
    thresholds=_UNCHANGED,
    note="Product of H_res from the first connection through this one, later layers on the left; "
    "multiplied for each token, then reduced.",
)
composite_attenuation = _gains(
    "composite_attenuation",
    "Attenuation of the composite",
    "least sum of the product",
    over="direction",
    note="Smallest signed row sum (forward) or column sum (backward) of the product: the gain hides it.",
)
doubly_stochastic_violation = _gains(
    "doubly_stochastic_violation",
    "Distance from doubly stochastic",
    "violation",
    over="kind",
    note="Row error, column error and negativity of H_res, separately.",
)
operator_gain = _gains(
    "operator_gain",
    "Operator norms of each connection",
    "norm of H_res",
    over="norm",
    thresholds=_UNCHANGED,
    note="Without the cancellation that signed sums can hide.",
)
composite_operator_gain = _gains(
    "composite_operator_gain",
    "Operator norms of the composite",
    "norm of the product",
    over="norm",
    thresholds=_UNCHANGED,
)
deflated_gain = _streams(
    "deflated_gain",
    "Stream collapse of the composite",
    "σ₁ of the product on 1⊥",
    reference=("replayed_deflated_gain", "initialisation and weight decay alone"),
    note="Below 0.01 every stream carries the same signal.",
)
relative_deflated_gain = _streams(
    "relative_deflated_gain",
    "Stream collapse relative to what streams have in common",
    "differences / common part",
    note="Below 0.01 every stream carries the same signal.",
)
effective_streams = _streams(
    "effective_streams",
    "Effective streams between earlier and later connections",
    "effective streams",
    note="At the cut before each connection; positive gates pass little more than one signal even where they are random.",
)
identity_distance = _streams(
    "identity_distance",
    "Distance from the identity",
    "‖H_res − I‖ / √n",
)
composite_identity_distance = _streams(
    "composite_identity_distance",
    "Distance of the composite from the identity",
    "‖P / p − I‖ / √n",
    note="Product of H_res from the first connection through this one, without its scale p.",
)
initial_distance = _streams(
    "initial_distance",
    "How far training moved each connection",
    "‖H_res − initial‖ / √n",
    note="From the matrix of the initial static logits.",
)
read_share = _streams(
    "read_share",
    "What each sublayer reads",
    "share of the read weight",
    over="stream",
)
signal_share = _streams(
    "signal_share",
    "Whose signal each sublayer reads",
    "share of the signal read",
    over="stream",
)
write_share = _streams(
    "write_share",
    "Where each sublayer writes",
    "share of the write weight",
    over="stream",
)
mixing_singular_value = _spectra(
    "mixing_singular_value",
    "Singular values of each connection",
    "singular value of H_res",
    over="component",
)
mixing_eigenvalue_modulus = _spectra(
    "mixing_eigenvalue_modulus",
    "Eigenvalues of each connection",
    "|eigenvalue| of H_res",
    over="component",
    component="|λ{}|",
)
composite_singular_value = _spectra(
    "composite_singular_value",
    "Singular values of the composite",
    "singular value of the product",
    over="component",
)
logit_range = _logits(
    "logit_range",
    "Range of the mixing logits",
    "largest minus smallest logit of a row (nat)",
    note="Of the logits that Sinkhorn or softmax makes H_res of.",
)
logit_saturation = _logits(
    "logit_saturation",
    "Saturation of the projection",
    "share of the gradient that is not let through",
    note="0 at a uniform H_res, near 1 where its entries are 0 and 1.",
)
mixing_gradient = _logits("mixing_gradient", "Gradient at H_res", "‖∂loss / ∂H_res‖ (loss)")
logit_gradient = _logits(
    "logit_gradient", "Gradient at the mixing logits", "‖∂loss / ∂logits‖ (loss per nat)"
)
logit_gradient_share = _logits(
    "logit_gradient_share",
    "Share of the gradient that reaches the logits",
    "gradient at the logits / at H_res",
)
# From 0 on, the value of a sublayer that is not read; the largest is the data's own.
depth_kernel = MatrixFigure(
    "depth_kernel",
    "Which sublayer reads which",
    "mean |M|",
    rows="connection",
    columns="other_connection",
    x_label="source: output of connection",
    y_label="reader: input of connection",
    limits=(0.0, None),
    below=True,
    note="Does not depend on the stream basis; mean over tokens.",
    question="mixing",
    section="Paths",
)
read_mass = _paths(
    "read_mass",
    "How much of each sublayer's output is read",
    "Σ |M| over later readers",
    note="Near 0: a wasted layer.",
)
