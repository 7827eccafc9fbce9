"""Which variables may a run have, and which coefficients a connection? Name, dims, dtype and meaning of each, by group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


STREAMS = ("stream_out", "stream_in")
COEFFICIENTS = (
    Coefficient(
        "h_res",
        "H_res",
        STREAMS,
        "A",
        "stream mixing matrix, rows are destinations",
        of_streams=True,
        summed=True,
        remedy="one stream mixes nothing, or the family's mixing matrix is not known",
    ),
    Coefficient(
        "h_pre",
        "H_pre",
        ("stream",),
        "C",
        "weights that read the branch input from the streams",
        of_streams=True,
        summed=True,
        counted_by="h_pre_token_count",
        remedy="the family has no scalar read weights, or the capture left them out",
    ),
    Coefficient(
        "h_post",
        "H_post",
        ("stream",),
        "B",
        "weights that write the branch output to the streams",
        of_streams=True,
        summed=True,
        remedy="the family has no scalar write weights, or the capture left them out",
    ),
    Coefficient(
        "read", "H_pre", ("view_in", "stream"), "C", "h_pre of several branch inputs", of_streams=True
    ),
    Coefficient("write", "H_post", ("stream", "view_out"), "B", "h_post of several outputs", of_streams=True),
    # Of plain connections, which have one stream.
    Coefficient("residual_scale", "a", (), "A", "factor of the state in the next one", missing=1.0),
    Coefficient("branch_scale", "b", (), "B", "factor of the branch's output", missing=1.0),
    Coefficient("residual_gate", "a", ("feature",), "A", "factors of the state's features", missing=1.0),
    Coefficient("branch_gate", "b", ("feature",), "B", "factors of the output's features", missing=1.0),
    # Of connections over depth; source 0 is the embedding, j the output of sublayer j.
    Coefficient("depth_read", "C", ("source",), "C", "how much of each source a branch reads"),
    Coefficient(
        "depth_reads", "C", ("view_in", "source"), "C", "that of several inputs; NaN beyond their number"
    ),
    Coefficient("depth_carry", "A", ("source",), "A", "how much of each source the next state keeps"),
)

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
HEADS = ("step", "depth", "head")
CONNECTION_STEP = ("step", "connection")
MOTION = ("step", "weight")


@dataclass(frozen=True)
class Variable:
    """One declared variable of a run.

    ``dims``: its dimensions, in order.
    ``kind``: allowed numpy dtype kinds: ``"f"`` floating, ``"i"`` integer, ``"b"`` boolean, ``"O"`` text.
    ``meaning``: one line for people.
    ``parts``: how those of the parts of a run become one: ``"sum"``, ``"largest"``, ``"first"`` (they are equal), a sum of
    shares (``"share"``, of each process), or by a rule of its own; empty where it is not known.
    ``allowed``: what each of its texts is: some of these, or what the function says.
    """

    dims: tuple[str, ...]
    kind: str
    meaning: str
    parts: str = ""
    allowed: tuple[str, ...] | Callable[[Any], bool] = ()

    def odd_texts(self, texts: Any) -> list[str]:
        """Those texts that are not allowed."""
        known = self.allowed if callable(self.allowed) else self.allowed.__contains__
        return sorted({str(text) for text in texts.ravel().tolist() if self.allowed and not known(str(text))})


PROVEN = "proven"
UNPROVEN = "unproven: "
"""What an attribute ``proof`` is, or begins with."""


def is_proof(text: Any) -> bool:
    """Whether a text states that something is proven, or that it is not and why.

    Examples
    --------
    >>> is_proof("proven"), is_proof("unproven: a branch was not seen"), is_proof("unproven: "), is_proof(True)
    (True, True, False, False)
    """
    if not isinstance(text, str):
        return False
    return text == PROVEN or bool(text.startswith(UNPROVEN) and text.removeprefix(UNPROVEN).strip())


# Kinds of text are "U" of a fixed width, "O" for Python's own, as stored and read, and "T" for numpy's StringDType.
TRACE: dict[str, Variable] = {
    "residual": Variable(STATE, "f", "residual state of each stream"),
    "gradient": Variable(STATE, "f", "gradient of the loss with respect to the residual state"),
    **{of.name: Variable((*ROUTE, *of.axes), "f", of.meaning) for of in COEFFICIENTS},
    "branch_in": Variable((*ROUTE, "feature"), "f", "input of the branch"),
    "branch_out": Variable((*ROUTE, "feature"), "f", "output of the branch"),
    "views_in": Variable((*ROUTE, "view_in", "feature"), "f", "several branch inputs, in place of branch_in"),
    "views_out": Variable(
        (*ROUTE, "view_out", "feature"), "f", "several branch outputs, in place of branch_out"
    ),
    "query_entropy": Variable(
        QUERY, "f", "entropy of the attention weights of each query before a state, in nats"
    ),
    "query_keys": Variable(QUERY, "f", "number of keys that the query may attend to"),
    "query_first_weight": Variable(QUERY, "f", "weight of the query on the first of these keys"),
    "final": Variable(("sample", "token", "feature"), "f", "output of the last norm, which the head reads"),
    "final_gradient": Variable(("sample", "token", "feature"), "f", "gradient with respect to that state"),
    "mask": Variable(("sample", "token"), "b", "true where the token is real, false on padding"),
    "token_text": Variable(("sample", "token"), "OTU", "the token as text"),
}

TRACE_COORDS: dict[str, Variable] = {
    "layer": Variable(("depth",), "iu", "block number, -1 for the embedding"),
    "site": Variable(
        ("depth",),
        "OTU",
        "embed, mid (in a block), post (after it), pre (changed before the next)",
        allowed=SITES,
    ),
    "module": Variable(("depth",), "OTU", "module path that produced the state"),
    "phase": Variable(("sample",), "OTU", "prefill, or decode where the cache was not empty"),
    "connection_layer": Variable(("connection",), "iu", "block number of the connection"),
    "branch": Variable(("connection",), "OTU", "attn, mlp or block"),
    "connection_module": Variable(("connection",), "OTU", "module path of the connection"),
    "depth_in": Variable(("connection",), "iu", "depth index that the connection reads"),
    "depth_out": Variable(("connection",), "iu", "depth index that the connection writes"),
    "after_sum": Variable(
        ("connection",),
        "OTU",
        "what is applied to the sum to give the next state: norm, activation, empty for nothing",
        allowed=("", "norm", "activation"),
    ),
    "proof": Variable(("connection",), "OTU", "proven, or unproven: and the reason", allowed=is_proof),
    "source": Variable(
        ("source",), "iu", "0 the embedding, j the output of sublayer j, which is connection j - 1"
    ),
}

OF_ATTENTION = ("query_entropy", "query_keys", "query_first_weight")
"""Variables of attention weights: three numbers for each query, in place of a matrix for each head."""


# Sums over tokens where possible, not means: those of several batches add up, whatever their sizes.
STATISTICS: dict[str, Variable] = {
    "token_count": Variable(("step",), "fiu", "real tokens of the step", parts="sum"),
    "sequence_count": Variable(("step",), "fiu", "sequences of the step", parts="sum"),
    "loss": Variable(("step",), "f", "the user's loss, where known", parts="rule"),
    "loss_not_finite": Variable(
        ("step",),
        "f",
        "1 where the user's loss was NaN or infinite, 0 where it was finite; NaN where none was known",
        parts="largest",
    ),
    "loss_terms": Variable(
        ("step",), "f", "of how many terms the loss is a mean, where it is not of all tokens", parts="sum"
    ),
    "batch_digest": Variable(
        ("step",),
        "f",
        "of what the model was called with: processes that have the same one have the same data",
    ),
    "loss_rise": Variable(
        ("step",),
        "f",
        "how far the loss is above the lowest one so far, over that at the start; NaN where not known",
        parts="rule",
    ),
    "loss_scale": Variable(("step",), "f", "what a gradient scaler multiplied the loss by", parts="first"),
    "norm_sum": Variable(PROFILE, "f", "Σ ‖x‖ over tokens", parts="sum"),
    "square_norm_sum": Variable(PROFILE, "f", "Σ ‖x‖² over tokens", parts="sum"),
    "norm_max": Variable(PROFILE, "f", "max ‖x‖ over tokens", parts="largest"),
    "abs_max": Variable(PROFILE, "f", "max |x| over tokens and features", parts="largest"),
    "unit_pair_sum": Variable(
        PROFILE, "f", "‖Σ x/‖x‖‖² − count: the sum of all off-diagonal cosines", parts="rule"
    ),
    "adjacent_cosine_sum": Variable(PROFILE, "f", "Σ cos(x_depth, x_depth−1) over tokens", parts="sum"),
    "gradient_square_norm_sum": Variable(PROFILE, "f", "Σ ‖∂loss/∂x‖² over tokens", parts="rule"),
    "gain_sum": Variable(GAIN, "f", "Σ over tokens of the Amax gain of H_res", parts="sum"),
    "gain_max": Variable(GAIN, "f", "max over tokens of the Amax gain of H_res", parts="largest"),
    **{
        of.total: Variable(
            (*CONNECTION_STEP, *of.axes),
            "f",
            f"Σ {of.symbol} over the tokens of {of.counted_by}",
            parts="sum",
        )
        for of in SUMMED
    },
    "h_pre_token_count": Variable(
        CONNECTION_STEP,
        "f",
        "real tokens whose H_pre is known: of the sampled sequences, or all",
        parts="sum",
    ),
    "connection_parameter": Variable(
        ("step", "cell"),
        "f",
        "each element of the biases and gates of the connections, as the step's forwards used it",
        parts="first",
    ),
    "cell_parameter": Variable(("cell",), "OTU", "the parameter that this element belongs to", parts="first"),
    "attention_query_count": Variable(
        HEADS,
        "f",
        "real queries that see two keys or more, of the sequences whose attention was looked at",
        parts="sum",
    ),
    "attention_entropy_sum": Variable(
        HEADS,
        "f",
        "Σ over these queries of the entropy of their weights, as a share of that of uniform ones",
        parts="sum",
    ),
    "sink_mass_sum": Variable(
        HEADS, "f", "Σ over these queries of the weight on their first key", parts="sum"
    ),
    "weight_square_norm": Variable(MOTION, "f", "‖W‖² of the parameters that a module owns", parts="share"),
    "weight_gradient_square_norm": Variable(MOTION, "f", "‖∂loss/∂W‖²", parts="share"),
    "weight_update_square_norm": Variable(MOTION, "f", "‖ΔW‖² of one step of the optimizer", parts="share"),
    "weight_first_square_distance": Variable(
        MOTION, "f", "‖W − W₀‖², W₀ of the first checkpoint", parts="share"
    ),
    "weight_first_square_norm": Variable(MOTION, "f", "‖W₀‖² of the first checkpoint", parts="share"),
    "weight_count": Variable(("weight",), "fiu", "number of elements of W", parts="share"),
    "weight_layer": Variable(("weight",), "iu", "block number of the module, -1 outside the blocks"),
    "feature_sum": Variable(
        ("depth", "stream", "feature"), "f", "Σ x, since the weights last changed", parts="sum"
    ),
    "unit_sum": Variable(
        ("depth", "stream", "feature"), "f", "Σ x/‖x‖, since the weights last changed", parts="sum"
    ),
}

OF_SUMS = "of_sums"
"""Attribute of a metric of a live row: it follows from the statistics of its step."""

# All of this shape, so that a further statistic of weights needs no second entry.
OF_WEIGHTS = tuple(name for name, variable in STATISTICS.items() if variable.dims == MOTION)
"""Statistics of each module's weights: their square root, or that of a ratio of them, is a metric."""

COVERAGE: dict[str, Variable] = {
    "place_name": Variable(("place",), "OTU", "the site's common name"),
    "site": Variable(("place",), "OTU", "what kind of site it is"),
    "module": Variable(("place",), "OTU", "the module that shows it"),
    "layer": Variable(("place",), "iu", "block number, -1 for none"),
    "chain": Variable(("place",), "OTU", "its chain, empty where there is one"),
    "expected": Variable(("place",), "iu", "forwards in which it was expected"),
    "fired": Variable(("place",), "iu", "forwards in which it was seen"),
    "why": Variable(("place",), "OTU", "why it was not captured, or how it was had"),
}
