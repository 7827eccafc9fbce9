"""What does a connection do where its input adds nothing? Its learned biases, passed through the family's constraint.

Shapes: ``n`` streams, ``f`` fractions of each, ``v`` inputs of the branch. A row of H_res is a destination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from depthscope.diagnostics.kernels import mixing as kernel

Values = Mapping[str, np.ndarray]  # by role
Settings = Mapping[str, float]

SINKHORN_ROUNDS = 20
ASSUMED_ROUNDS = f"Sinkhorn with {SINKHORN_ROUNDS} rounds is assumed, the default of hyper-connections: the file does not tell"
UNTOLD = (
    "alpha has several columns besides the streams and no beta: fractions or branch inputs, it is not told"
)
NOT_SQUARE = "mHC v1 with fractions runs Sinkhorn on blocks that are not square: there is no doubly stochastic H_res to give"


@dataclass(frozen=True)
class Weights:
    """A connection at an input that adds nothing; None where the file does not tell, and ``note`` says why."""

    res: np.ndarray | None = None  # (n·f, n·f)
    pre: np.ndarray | None = None  # (n,), or (reads, n·f)
    post: np.ndarray | None = None  # (n,), or (n·f, writes)
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)  # the parameters, part by part
    gates: Mapping[str, float] = field(default_factory=dict)  # what scales the part that depends on the input
    note: str = ""


def weigh(family: str, style: str, *, n: int, f: int, values: Values, settings: Settings) -> Weights:
    """Weights of a connection at an input that adds nothing.

    Parameters
    ----------
    family, style : str
        Its kind.
    n : int
        Streams.
    f : int
        Fractions of each; 0 where the shapes do not tell.
    values : Mapping of str to ndarray
        The learned parameters by role, float64.
    settings : Mapping of str to float
        What the family's formulas need besides.

    Returns
    -------
    Weights
    """
    return _FORMULAS[family, style](n, f, values, settings)


def _weigh_mhc(n: int, f: int, values: Values, settings: Settings) -> Weights:
    eps = settings["hc_eps"]
    pre, post, comb = np.split(values["base"], [n, 2 * n])
    logits = comb.reshape(n, n)  # source by destination, as the module keeps it
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    # the module adds eps after its softmax; the rounds that follow start with the softmax's own normalisation
    floored = np.log(shifted / shifted.sum(-1, keepdims=True) + eps)
    mixed = kernel.sinkhorn(floored, steps=int(settings["hc_sinkhorn_iters"]), last="column")
    return Weights(
        res=mixed.T,
        pre=_sigmoid(pre) + eps,
        post=2.0 * _sigmoid(post),
        biases={"pre": pre, "post": post, "res": logits.T},
        gates=dict(zip(("pre", "post", "res"), values["scale"].tolist(), strict=True)),
    )


def _weigh_independent(n: int, f: int, values: Values, settings: Settings) -> Weights:
    pre, post = np.split(values["base"], 2)
    eps = settings["hc_eps"]
    return Weights(
        res=np.eye(n),
        pre=_sigmoid(pre) + eps,
        post=settings["hc_magnitude"] * _sigmoid(post) + eps,
        biases={"pre": pre, "post": post},
        gates=dict(zip(("pre", "post"), values["scale"].tolist(), strict=True)),
    )


def _weigh_head(n: int, f: int, values: Values, settings: Settings) -> Weights:
    return Weights(
        pre=_sigmoid(values["base"]) + settings["hc_eps"],
        biases={"pre": values["base"]},
        gates={"pre": float(values["scale"][0])},
    )


def _weigh_gated(n: int, f: int, values: Values, settings: Settings) -> Weights:
    return Weights(
        res=np.eye(n),
        post=np.ones(n),
        note="gated streams have no biases: every read is per feature, every write 2 sigmoid(0) = 1 at a zero input",
    )


def _weigh_altup(n: int, f: int, values: Values, settings: Settings) -> Weights:
    active = np.eye(n)[int(settings["altup_active_idx"]) % n]
    return Weights(
        res=np.eye(n) - active,  # row by row: every stream gives up the active one
        pre=active,
        post=np.ones(n),
        biases=dict(values),
        note=(
            "AltUp has no biases: all of its mixing depends on the input. At a zero router H_res = I - 1 e_aᵀ, and the "
            "branch output that is added holds the active stream a itself"
        ),
    )


def _weigh_hc(n: int, f: int, values: Values, settings: Settings) -> Weights:
    alpha, beta = values["alpha"], values.get("beta")
    if not f:
        return Weights(gates=_width_gates(values), note=UNTOLD)
    inputs = alpha.shape[1] // f - n  # v: the columns are f groups of v reads and n streams
    grouped = alpha.T.reshape(f, inputs + n, f * n)
    res, pre = grouped[:, inputs:].reshape(f * n, f * n), grouped[:, :inputs].reshape(f * inputs, f * n)
    biases = {"pre": pre, "res": res} | ({} if beta is None else {"post": beta})
    if beta is not None and f > 1:  # kept stream by fraction, while the rows of alpha are fraction by stream
        beta = np.repeat(beta.reshape(n, f).T.reshape(f * n, 1), f, axis=1)
    return Weights(res, _vector(pre, f * n), _vector(beta, f * n), biases, _width_gates(values))


def _weigh_width_mhc(n: int, f: int, values: Values, settings: Settings) -> Weights:
    alpha, beta = values["alpha"], values.get("beta")
    gates = _width_gates(values)
    if not f or (f > 1 and beta is not None and beta.ndim == 1):
        return Weights(gates=gates, note=NOT_SQUARE if f else UNTOLD)
    inputs = alpha.shape[1] - n * f
    pre, logits = alpha[:, :inputs].T, alpha[:, inputs:]
    biases = {"pre": pre, "res": logits.T} | ({} if beta is None else {"post": beta})
    post = None if beta is None else 2.0 * _sigmoid(beta)
    if post is not None and f > 1:  # by stream and fraction read, the same for every fraction written
        post = np.repeat(post.reshape(n, 1, f), f, axis=1).reshape(n * f, f)
    mixed = kernel.sinkhorn(logits, steps=SINKHORN_ROUNDS, last="row").T
    return Weights(mixed, _vector(_sigmoid(pre), n * f), _vector(post, n * f), biases, gates, ASSUMED_ROUNDS)


def _vector(weights: np.ndarray | None, size: int) -> np.ndarray | None:
    """Weights of a single read or write as a vector."""
    return weights.ravel() if weights is not None and weights.size == size else weights


def _width_gates(values: Values) -> dict[str, float]:
    named = {"pre": ("gate_pre", "gate_alpha"), "post": ("gate_post",), "res": ("gate_res", "gate_alpha")}
    return {
        part: float(values[role].ravel()[0])
        for part, roles in named.items()
        for role in roles
        if role in values
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


_FORMULAS: dict[tuple[str, str], Callable[[int, int, Values, Settings], Weights]] = {
    ("mhc", "returned"): _weigh_mhc,
    ("independent_hc", "returned"): _weigh_independent,
    ("head", "returned"): _weigh_head,
    ("mhc", "width"): _weigh_width_mhc,
    ("hc", "width"): _weigh_hc,
    ("gated_streams", "gated"): _weigh_gated,
    ("altup", "altup"): _weigh_altup,
}
