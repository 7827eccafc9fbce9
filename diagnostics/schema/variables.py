"""Which variables may a run have, and which coefficients a connection? Name, dims, dtype and meaning of each, by group."""

from __future__ import annotations

from dataclasses import dataclass, replace

ROUTE = ("connection", "sample", "token")
"""Dims that every coefficient has first."""


@dataclass(frozen=True)
class Coefficient:
    """One coefficient of connections."""

    name: str  # of its variable in a trace
    symbol: str  # as it is printed
    axes: tuple[str, ...]  # its dims after `ROUTE`; a matrix over streams has destinations first
    # ``"A"`` of what the next state keeps, ``"B"`` of what it gets from the branch, ``"C"`` of what the
    # branch reads
    role: str
    meaning: str  # one line for people
    of_streams: bool = False  # whether only connections of several streams have it
    # what it is where a run does not store it; None where it is then not known
    missing: float | None = None
    summed: bool = False  # whether a recording adds it up over the tokens of a step, as ``NAME_sum``
    counted_by: str = "token_count"  # the statistic that counts the tokens of this sum
    remedy: str = ""  # what to do where a run lacks it

    @property
    def total(self) -> str:
        """The statistic with its sum over tokens."""
        return f"{self.name}_sum"


COEFFICIENTS = (
    Coefficient("h_res", "H_res", ("stream_out", "stream_in"), "A", "stream mixing matrix, rows are destinations",
                of_streams=True, summed=True,
                remedy="one stream mixes nothing, or the family's mixing matrix is not known"),
    Coefficient("h_pre", "H_pre", ("stream",), "C", "weights that read the branch input from the streams",
                of_streams=True, summed=True, counted_by="h_pre_token_count",
                remedy="the family has no scalar read weights, or the capture left them out"),
    Coefficient("h_post", "H_post", ("stream",), "B", "weights that write the branch output to the streams",
                of_streams=True, summed=True,
                remedy="the family has no scalar write weights, or the capture left them out"),
    Coefficient("read", "H_pre", ("view_in", "stream"), "C", "h_pre of several branch inputs", of_streams=True),
    Coefficient("write", "H_post", ("stream", "view_out"), "B", "h_post of several outputs", of_streams=True),
    # Of plain connections, which have one stream.
    Coefficient("residual_scale", "a", (), "A", "factor of the state in the next one", missing=1.0),
    Coefficient("branch_scale", "b", (), "B", "factor of the branch's output", missing=1.0),
    Coefficient("residual_gate", "a", ("feature",), "A", "factors of the state's features", missing=1.0),
    Coefficient("branch_gate", "b", ("feature",), "B", "factors of the output's features", missing=1.0),
    # Of connections over depth; source 0 is the embedding, j the output of sublayer j.
    Coefficient("depth_read", "C", ("source",), "C", "how much of each source a branch reads"),
    Coefficient("depth_reads", "C", ("view_in", "source"), "C", "that of several inputs; NaN beyond their number"),
    Coefficient("depth_carry", "A", ("source",), "A", "how much of each source the next state keeps"),
)  # fmt: skip

SUMMED = tuple(of for of in COEFFICIENTS if of.summed)
"""Those that a recording adds up over the tokens of a step."""

SUMS_OF_COEFFICIENTS = tuple(
    name for of in SUMMED for name in (of.total, of.counted_by) if name != "token_count"
)
"""Their sums, and the numbers of tokens that these are of where they are not of all."""

OF_STREAMS = tuple(of.name for of in COEFFICIENTS if of.of_streams)
"""Variables that only connections of several streams have."""

PLAIN_FACTORS = tuple(of.name for of in COEFFICIENTS if of.missing == 1.0)
"""Variables that say by what a plain connection, which has one stream, multiplies the state and the branch's output."""

OVER_DEPTH = tuple(of.name for of in COEFFICIENTS if "source" in of.axes)
"""Variables of connections that read or keep more depths than their own."""

# Where in a block a state is taken: see the meaning of the coordinate `site`.
SITES = ("embed", "pre", "mid", "post", "final")

WITHOUT_GRADIENT = "without_gradient"
"""Attribute of gradients: the depths that none reached, as below frozen weights; NaN there is no failure."""

CUT_GRADIENT = "cut_gradient"
"""Attribute of gradients: depths whose states are in a graph and got no gradient, though a later depth did."""

FROZEN_MODULES = "frozen_modules"
"""Attribute of the updates of weights: modules none of whose parameters is trained, while others are."""

NOT_FINITE = "not_finite_tokens"
"""Attribute of a metric: how many tokens have NaN or infinities, by depth or connection."""

# Dims that several variables have in common.
STATE = ("depth", "sample", "token", "stream", "feature")
QUERY = ("depth", "sample", "head", "token")
PROFILE = ("step", "depth", "stream")
GAIN = ("step", "direction", "connection")
MOTION = ("step", "weight")


@dataclass(frozen=True)
class Variable:
    """One declared variable of a run.

    ``dims``: its dimensions, in order.
    ``kind``: allowed numpy dtype kinds: ``"f"`` floating, ``"i"`` integer, ``"b"`` boolean, ``"O"`` text.
    ``meaning``: one line for people.
    ``parts``: how those of the parts of a run become one: ``"sum"``, ``"largest"``, ``"first"`` (all are equal), the sum of
    the ``"share"`` that each process has, the sum by how much a part counts in the ``"loss"`` or by its ``"squares"``, or
    a ``"rule"`` of its own; empty where it is not known.
    ``allowed``: what each of its texts is: one of these; more follows one that ends in a colon.
    """

    dims: tuple[str, ...]
    kind: str
    meaning: str
    parts: str = ""
    allowed: tuple[str, ...] = ()


PROVEN = "proven"
UNPROVEN = "unproven: "
"""What an attribute ``proof`` is, or begins with."""


def _table(*rows: tuple[str, ...]) -> dict[str, Variable]:
    """Variables of rows with name, dims, kind, meaning and, where it is known, how parts are joined."""
    return {
        name: Variable(tuple(dims.split()), kind, meaning, "".join(parts))
        for name, dims, kind, meaning, *parts in rows
    }


# Kinds of text are "U" of a fixed width, "O" for Python's own, as stored and read, and "T" for numpy's StringDType.
TRACE = {of.name: Variable((*ROUTE, *of.axes), "f", of.meaning) for of in COEFFICIENTS} | _table(
    ("residual", "depth sample token stream feature", "f", "residual state of each stream"),
    ("gradient", "depth sample token stream feature", "f", "gradient of the loss with respect to the residual state"),
    ("branch_in", "connection sample token feature", "f", "input of the branch"),
    ("branch_out", "connection sample token feature", "f", "output of the branch"),
    ("views_in", "connection sample token view_in feature", "f", "several branch inputs, in place of branch_in"),
    ("views_out", "connection sample token view_out feature", "f", "several branch outputs, in place of branch_out"),
    ("query_entropy", "depth sample head token", "f", "entropy of the weights of each query before a state, in nats"),
    ("query_keys", "depth sample head token", "f", "number of keys that the query may attend to"),
    ("query_first_weight", "depth sample head token", "f", "weight of the query on the first of these keys"),
    ("final", "sample token feature", "f", "output of the last norm, which the head reads"),
    ("final_gradient", "sample token feature", "f", "gradient with respect to that state"),
    ("mask", "sample token", "b", "true where the token is real, false on padding"),
    ("token_text", "sample token", "OTU", "the token as text"),
)  # fmt: skip

TRACE_COORDS = _table(
    ("layer", "depth", "iu", "block number, -1 for the embedding"),
    ("site", "depth", "OTU", "embed, mid (in a block), post (after it), pre (changed before the next)"),
    ("module", "depth", "OTU", "module path that produced the state"),
    ("connection_layer", "connection", "iu", "block number of the connection"),
    ("branch", "connection", "OTU", "attn, mlp or block"),
    ("connection_module", "connection", "OTU", "module path of the connection"),
    ("depth_in", "connection", "iu", "depth index that the connection reads"),
    ("depth_out", "connection", "iu", "depth index that the connection writes"),
    ("after_sum", "connection", "OTU", "what is applied to the sum to give the next state: norm, activation, or nothing"),
    ("proof", "connection", "OTU", "proven, or unproven: and the reason"),
    ("source", "source", "iu", "0 the embedding, j the output of sublayer j, which is connection j - 1"),
)  # fmt: skip
_ALLOWED = {"site": SITES, "after_sum": ("", "norm", "activation"), "proof": (PROVEN, UNPROVEN)}
TRACE_COORDS |= {name: replace(TRACE_COORDS[name], allowed=of) for name, of in _ALLOWED.items()}

OF_ATTENTION = ("query_entropy", "query_keys", "query_first_weight")
"""Variables of attention weights: three numbers for each query, in place of a matrix for each head."""


# Sums over tokens where possible, not means: those of several batches add up, whatever their sizes.
STATISTICS = _table(
    ("token_count", "step", "fiu", "real tokens of the step", "sum"),
    ("sequence_count", "step", "fiu", "sequences of the step", "sum"),
    ("loss", "step", "f", "the user's loss, where known", "loss"),
    ("loss_not_finite", "step", "f", "1 where the loss was NaN or infinite, 0 where finite; NaN where not known", "largest"),
    ("loss_terms", "step", "f", "of how many terms the loss is a mean, where not of all tokens", "sum"),
    ("batch_digest", "step", "f", "of what the model was called with: the same one is the same data"),
    ("loss_rise", "step", "f", "how far the loss is above its lowest, over that at the start; NaN where not known", "rule"),
    ("loss_scale", "step", "f", "what a gradient scaler multiplied the loss by", "first"),
    ("norm_sum", "step depth stream", "f", "Σ ‖x‖ over tokens", "sum"),
    ("square_norm_sum", "step depth stream", "f", "Σ ‖x‖² over tokens", "sum"),
    ("norm_max", "step depth stream", "f", "max ‖x‖ over tokens", "largest"),
    ("abs_max", "step depth stream", "f", "max |x| over tokens and features", "largest"),
    ("unit_pair_sum", "step depth stream", "f", "‖Σ x/‖x‖‖² − count: the sum of all off-diagonal cosines", "rule"),
    ("adjacent_cosine_sum", "step depth stream", "f", "Σ cos(x_depth, x_depth−1) over tokens", "sum"),
    ("gradient_square_norm_sum", "step depth stream", "f", "Σ ‖∂loss/∂x‖² over tokens", "squares"),
    ("gain_sum", "step direction connection", "f", "Σ over tokens of the Amax gain of H_res", "sum"),
    ("gain_max", "step direction connection", "f", "max over tokens of the Amax gain of H_res", "largest"),
    ("h_pre_token_count", "step connection", "f", "real tokens with a known H_pre: of the sampled sequences, or all", "sum"),
    ("connection_parameter", "step cell", "f", "each element of biases and gates of connections, as it was used", "first"),
    ("cell_parameter", "cell", "OTU", "the parameter that this element belongs to", "first"),
    ("attention_query_count", "step depth head", "f", "real queries with two keys or more, of the sequences looked at", "sum"),
    ("attention_entropy_sum", "step depth head", "f", "Σ of the entropy of these queries over that of uniform weights", "sum"),
    ("sink_mass_sum", "step depth head", "f", "Σ over these queries of the weight on their first key", "sum"),
    ("weight_square_norm", "step weight", "f", "‖W‖² of the parameters that a module owns", "share"),
    ("weight_gradient_square_norm", "step weight", "f", "‖∂loss/∂W‖²", "share"),
    ("weight_update_square_norm", "step weight", "f", "‖ΔW‖² of one step of the optimizer", "share"),
    ("weight_first_square_distance", "step weight", "f", "‖W − W₀‖², W₀ of the first checkpoint", "share"),
    ("weight_first_square_norm", "step weight", "f", "‖W₀‖² of the first checkpoint", "share"),
    ("weight_count", "weight", "fiu", "number of elements of W", "share"),
    ("weight_layer", "weight", "iu", "block number of the module, -1 outside the blocks"),
    ("feature_sum", "depth stream feature", "f", "Σ x, since the weights last changed", "sum"),
    ("unit_sum", "depth stream feature", "f", "Σ x/‖x‖, since the weights last changed", "sum"),
)  # fmt: skip
STATISTICS |= {
    of.total: Variable(
        ("step", "connection", *of.axes), "f", f"Σ {of.symbol} over the tokens of {of.counted_by}", "sum"
    )
    for of in SUMMED
}

OF_SUMS = "of_sums"
"""Attribute of a metric of a live row: it follows from the statistics of its step."""

# All of this shape, so that a further statistic of weights needs no second entry.
OF_WEIGHTS = tuple(name for name, variable in STATISTICS.items() if variable.dims == MOTION)
"""Statistics of each module's weights: their square root, or that of a ratio of them, is a metric."""

COVERAGE = _table(
    ("place_name", "place", "OTU", "the site's common name"),
    ("site", "place", "OTU", "embed, mid (in a block), post (after it), pre (changed before the next)"),
    ("module", "place", "OTU", "the module that shows it"),
    ("layer", "place", "iu", "block number, -1 for none"),
    ("chain", "place", "OTU", "its chain, empty where there is one"),
    ("expected", "place", "iu", "forwards in which it was expected"),
    ("fired", "place", "iu", "forwards in which it was seen"),
    ("why", "place", "OTU", "why it was not captured, or how it was had"),
)  # fmt: skip
