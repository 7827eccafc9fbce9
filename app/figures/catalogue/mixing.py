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
mixing_attenuation = _gains(
    "mixing_attenuation",
    "Attenuation of each connection",
    "least sum of H_res",
    over="direction",
    note="Smallest signed row sum (forward) or column sum (backward) of H_res.",
)
composite_attenuation = _gains(
    "composite_attenuation",
    "Attenuation of the composite",
    "least sum of the product",
    over="direction",
    note="Smallest signed row sum (forward) or column sum (backward) of the product: the gain hides it.",
)
# ln 2 is 0.69: a sum that has doubled or halved.
composite_deviation = _gains(
    "composite_deviation",
    "Sums of the composite, away from 1",
    "largest |ln |sum||",
    thresholds=((0.7, "a factor of two: 0.7"),),
    note="Of the rows and columns of the product: up as the gain, down as the attenuation.",
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
# The later connection is on the vertical axis, since rows of a product are destinations.
pair_gain = MatrixFigure(
    "pair_gain",
    "Gain between every two connections",
    "Amax gain",
    rows="other_connection",
    columns="connection",
    x_label="from connection",
    y_label="through connection",
    of_block="largest",  # as a gain is judged
    note="Product of H_res from the one through the other.",
    question="mixing",
    section="Gains",
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
suffix_deflated_gain = _streams(
    "suffix_deflated_gain",
    "Stream collapse on the way to the head",
    "σ₁ of the product on 1⊥",
    note="Product of H_res from this connection through the last: below 0.01 the head cannot tell to "
    "which stream a connection wrote.",
)
effective_streams = _streams(
    "effective_streams",
    "Effective streams between earlier and later connections",
    "effective streams",
    note="At the cut before each connection; positive gates pass little more than one signal even where they are random.",
)
spectral_gap = _streams(
    "spectral_gap",
    "Spectral gap of each connection",
    "1 − |λ₂|",
    note="0 leaves the streams as different as they were, 1 makes them equal.",
)
dobrushin = _streams(
    "dobrushin",
    "Dobrushin coefficient of each connection",
    "τ(H_res)",
    note="The most that a difference between streams may keep: 1 for the identity, 0 for uniform mixing.",
)
composite_dobrushin = _streams(
    "composite_dobrushin",
    "Dobrushin coefficient of the composite",
    "τ of the product",
    note="Product of H_res from the first connection through this one; it stops at rounding, near 1e-16.",
)
mixing_entropy = _streams(
    "mixing_entropy",
    "Mixing entropy of each connection",
    "row entropy",
    note="0 is a permutation, ln n is the uniform average.",
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
replay_distance = _streams(
    "replay_distance",
    "What weight decay alone does not explain",
    "‖H_res − replayed‖ / √n",
    note="Distance from what weight decay alone makes of the initial static logits.",
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
read_streams = _streams(
    "read_streams",
    "How many streams each sublayer reads",
    "streams",
    note="1 where one stream gives all it reads.",
)
write_streams = _streams(
    "write_streams",
    "How many streams each sublayer writes to",
    "streams",
    note="1 where one stream takes all it writes.",
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
lyapunov_spectrum = _spectra(
    "lyapunov_spectrum",
    "Lyapunov exponents of the composite",
    "growth",
    thresholds=((0.0, "kept: 0"),),
    note="Of the whole product; below 0 a difference between streams dies with depth.",
)
condition_number = _spectra(
    "condition_number",
    "Condition number of each connection",
    "σ₁ / σₙ",
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
henrici = _spectra(
    "henrici",
    "Departure from normality of each connection",
    "√(‖H‖² − Σ|λ|²)",
    note="0 for a normal matrix; above it, powers can grow before they settle.",
)
numerical_radius = _spectra(
    "numerical_radius",
    "Numerical radius of each connection",
    "r(H_res)",
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
# 1 is what every sublayer of a plain residual network reads.
embedding_read = _paths(
    "embedding_read",
    "How much of the embedding each sublayer reads",
    "size of what is read, of the embedding's",
    thresholds=((1.0, "in full: 1"),),
    note="Through all mixing before it.",
)
effective_path_depth = _paths(
    "effective_path_depth",
    "How far back each sublayer reads",
    "mean distance of what is read",
)
read_mass = _paths(
    "read_mass",
    "How much of each sublayer's output is read",
    "Σ |M| over later readers",
    note="Near 0: a wasted layer.",
)
