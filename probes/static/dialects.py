"""How do public checkpoints name the parts of their connections, and what do those compute? A row a dialect."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.probes.static.dialect import Constant, Dialect, Values


def sinkhorn(logits: np.ndarray, rounds: float, floor: float = 0.0, last: str = "columns") -> np.ndarray:
    """Sinkhorn of exp(logits), in ``rounds`` rounds that end on ``last`` (rows or columns of the logits).

    With a floor the first normalisation is a softmax to which it is added, and every later sum has it too, as in DeepSeek-V4.
    """
    if last not in ("rows", "columns"):
        raise InputError(f"sinkhorn ends on {last!r}; expected 'rows' or 'columns'")
    if not floor:
        return np.asarray(kernel.sinkhorn(logits, steps=int(rounds), last=last.removesuffix("s")))
    first, other = (-1, -2) if last == "columns" else (-2, -1)
    matrix = softmax(logits, axis=first) + floor
    matrix = matrix / (matrix.sum(axis=other, keepdims=True) + floor)
    for _ in range(int(rounds) - 1):
        for axis in (first, other):
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + floor)
    return matrix


def square(values: np.ndarray) -> np.ndarray:
    """n² values as an n × n matrix, row after row."""
    return values.reshape(math.isqrt(values.size), -1)


def split(values: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """The parts of n (n + 2) values: n of pre, n of post, an n × n matrix of res."""
    return {"pre": values[:n], "post": values[n : 2 * n], "res": square(values[2 * n :])}


def _three(scale: Iterable[Any]) -> dict[str, Any]:
    return dict(zip(("pre", "post", "res"), scale, strict=True))


def _sigmoid_with_floor(t: Values) -> np.ndarray:
    return expit(t.pre) + t.eps


def _sigmoid(t: Values) -> np.ndarray:
    return expit(t.pre)


def _twice_sigmoid(t: Values) -> np.ndarray:
    return 2 * expit(t.post)


# --- DeepSeek-V4 and its relatives: one projection of all streams, one bias, one scale for each part

_GLM = ("glm5_next", "glm5_next_text", "glm5next", "glm5-next")
_V41 = (
    *("deepseek_v41", "deepseek_v41_text", "deepseek_v4_1", "deepseek_v4_1_text"),
    *("deepseek41", "deepseek4.1"),
)
_V4 = ("deepseek_v4", "deepseek_v4_text", "deepseek4", *_GLM)
_PANGU = ("openpangu_v2", "openpangu-v2")
# What configurations, and the settings of GGUF files, call them.
_CONSTANTS = {
    "rounds": Constant(
        (
            *("hc_sinkhorn_iters", "mhc_recur_norm", "mhc_sinkhorn_iterations", "mhc_sinkhorn_iters", "sinkhorn_iterations"),
            *("sinkhorn_iters", "num_sinkhorn_iters"),
            *("hyper_connection.sinkhorn_iterations", "hyper_connection.sinkhorn_iters"),
        ),
        20,
    ),
    "eps": Constant(("hc_eps", "mhc_epsilon", "hyper_connection.epsilon", "hyper_connection.eps"), 1e-6),
}  # fmt: skip

# Raw names and GGUF; GLM-5.3-Flash; openPangu-2.0 in GGUF.
DEEPSEEK_V4 = Dialect(
    name="deepseek-v4",
    family="mhc",
    model_types=frozenset((*_V4, *_V41, *_PANGU)),
    note="H_pre is what a sub-block computes; in DeepSeek-V4.1 the next sub-block applies it",
    names=("{path}.hc_{branch}_*",),
    branches=("attn", "ffn", "mlp"),
    projections={"fn": "n*(n+2), n*D"},
    tensors={"base": "n*(n+2)", "scale": "3"},
    parts=lambda t: split(t.base, t.n),
    gates=lambda t: _three(t.scale),
    sources_in_rows=True,
    read=_sigmoid_with_floor,
    write=_twice_sigmoid,
    mixing=lambda t: sinkhorn(t.res, t.rounds, t.eps),
    constants=_CONSTANTS,
)  # fmt: skip
# Names of the modules of transformers and of torchtitan.
DEEPSEEK_V4_MODULES = replace(
    DEEPSEEK_V4,
    name="deepseek-v4-transformers",
    model_types=frozenset(_V4),
    names=("{path}.{branch}_hc.*", "{path}.hc_{branch}.*", "{path}.*"),
    branches=(),
    stored={"fn": "hc_fn|fn", "base": "hc_base|base", "scale": "hc_scale|scale"},
    note="",
)
OPENPANGU_V2 = replace(
    DEEPSEEK_V4,
    name="openpangu-v2",
    note="",
    model_types=frozenset(),
    names=("{path}.{branch}_mhc_module.*",),
    branches=(),
    stored={"fn": "phi", "base": "branch_beta", "scale": "branch_alpha"},
    optional={"norm_gamma": "n*D"},
    unread=("norm_gamma",),
)
# Megatron-Core and Bridge; PaddleFleet, whose projections are stored input by output.
MEGATRON = replace(
    DEEPSEEK_V4,
    name="megatron",
    model_types=frozenset(),
    names=("{path}.{branch}_hyper_connection.*",),
    branches=(),
    note="as it is applied since it matches DeepSeek-V4; first releases of its code multiplied by the transposed H_res",
    projections={"mapping_proj": "n*(n+2), n*D | n*D, n*(n+2)"},
    tensors={"bias": "n*(n+2)", "alpha_pre": "1", "alpha_post": "1", "alpha_res": "1"},
    parts=lambda t: split(t.bias, t.n),
    gates=lambda t: _three((t.alpha_pre, t.alpha_post, t.alpha_res)),
)
HY_V4 = Dialect(
    name="hy-v4",
    family="independent_hc",
    model_types=frozenset(("hy_v4", "hy_v4_vl", "hy_v4_text", "hyv4", "hy-v4")),
    names=(
        *("{path}.hc_{branch}_layer.hc_pre.*", "{path}.hc_pre.hc_{branch}_layer.*"),
        *("{path}.{branch}_hc.*", "{path}.hc_{branch}_*"),
    ),
    branches=("attn", "ffn", "mlp"),
    projections={"fn": "2*n, n*D"},
    tensors={"base": "2*n", "scale": "2"},
    stored={"fn": "fn|hc_fn", "base": "base|hc_base", "scale": "scale|hc_scale"},
    parts=lambda t: {"pre": t.base[: t.n], "post": t.base[t.n :]},
    gates=lambda t: {"pre": t.scale[0], "post": t.scale[1]},
    read=_sigmoid_with_floor,
    write=lambda t: t.magnitude * expit(t.post) + t.eps,
    mixing=lambda t: np.eye(t.n),
    learns_mixing=False,
    constants={
        "magnitude": Constant(("hc_magnitude", "hyper_connection.magnitude"), 2.0),
        "eps": _CONSTANTS["eps"],
    },
)
# --- the package hyper-connections and those that took its names

# Static (SHC) and dynamic (DHC).
HYPER_CONNECTIONS = Dialect(
    name="hyper-connections",
    family="hc",
    names=("{path}.*",),
    absent=("residual_scale", "H_res_logits", "norm"),
    tensors={"static_alpha": "n, n + 1"},
    optional={
        **{"static_beta": "n", "dynamic_alpha_fn": "D, n + 1", "dynamic_beta_fn": "D"},
        **{"dynamic_alpha_scale": "1", "dynamic_beta_scale": "1", "norm_gamma": "D"},
    },
    unread=("dynamic_alpha_fn", "dynamic_beta_fn", "norm_gamma"),
    stored={"norm_gamma": "norm.gamma"},
    parts=lambda t: {
        "pre": t.static_alpha[:, 0],
        "post": None if t.get("static_beta") is None else t.static_beta.reshape(t.n),
        "res": t.static_alpha[:, 1:],
    },
    gates=lambda t: _three(
        (t.get("dynamic_alpha_scale"), t.get("dynamic_beta_scale"), t.get("dynamic_alpha_scale"))
    ),
    sources_in_rows=True,
    read=lambda t: t.pre,
    write=lambda t: t.post,
    mixing=lambda t: t.res,
)
MHC_LUCIDRAINS = replace(
    HYPER_CONNECTIONS,
    name="mhc-lucidrains",
    family="mhc",
    absent=("H_res_logits",),
    tensors={"static_alpha": "n, n + 1", "residual_scale": "1"},
    optional={
        **{"static_beta": "n | n, 1, 1", "dynamic_alpha_fn": "D, n + 1 | p, D, n + 1 | n*D, n*(n + 1)"},
        **{"dynamic_beta_fn": "D | D, 1 | n*D, n", "pre_branch_scale": "1", "h_post_scale": "1"},
        "norm_gamma": "D | n*D",
    },
    gates=lambda t: _three((t.get("pre_branch_scale"), t.get("h_post_scale"), t.residual_scale)),
    read=_sigmoid,
    write=_twice_sigmoid,
    mixing=lambda t: sinkhorn(t.res, t.rounds, last="rows"),
    constants={"rounds": _CONSTANTS["rounds"]},
)

# --- heads: the read of the streams before the final norm

# Of DeepSeek-V4 and its relatives, and of openPangu-2.0.
HEAD = Dialect(
    name="head",
    family="head",
    head=True,
    names=("{path}.hc_head.*", "{path}.hc_head_*", "{path}.output_hc_*", "{path}.merge_mhc_module.*"),
    projections={"fn": "n, n*D | n*D, n"},
    tensors={"base": "n | 1", "scale": "1"},
    optional={"norm_gamma": "n*D"},
    unread=("norm_gamma",),
    stored={
        "fn": "fn|hc_fn|hc_head_fn|phi",
        "base": "base|hc_base|hc_head_base|branch_beta_pre",
        "scale": "scale|hc_scale|hc_head_scale|branch_alpha_pre",
    },
    parts=lambda t: {"pre": np.ones(t.n) * t.base},
    gates=lambda t: {"pre": t.scale},
    read=_sigmoid_with_floor,
    learns_mixing=False,
    constants={"eps": _CONSTANTS["eps"]},
)
TABLE = (
    *(DEEPSEEK_V4, DEEPSEEK_V4_MODULES, OPENPANGU_V2, MEGATRON, HY_V4),
    *(HYPER_CONNECTIONS, MHC_LUCIDRAINS, HEAD),
)
"""The rows of public dialects."""
