"""Which coefficients has a connection X′ = Σ A X + B ⊗ F(Σ C X)? A row each, from which all that lists them is made."""

from __future__ import annotations

from dataclasses import dataclass

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
