"""lucidrains' connections: ``width_connection`` opens, ``depth_connection`` closes, one matrix α reads and mixes.

Hyper-connections (arXiv 2409.19606, Algorithm 2), mHC and mHCv2, their fractions, input views and channels-first versions, as
in the package ``hyper-connections``.
α is (n × (v + n)). Shapes: B batch, T token, N stream, F fraction, V view (an input of the branch), D feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import nn

from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.probes.connections.coefficients import Parts, as_views
from depthscope.probes.connections.family import PairedFamily, Site, StreamConnectionError
from depthscope.probes.connections.tensor_watch import Watch, explaining, mixing
from depthscope.probes.connections.weight_pattern import (
    SINKHORN_ROUNDS,
    FoundTensors,
    Leaves,
    Settings,
    StaticWeights,
    Values,
    WeightPattern,
    attributes_of,
)
from depthscope.probes.model.layout import canonical
from depthscope.probes.model.tensors import tensors_in

TOKEN_AXES = {2: "", 3: "T ", 4: "H W ", 5: ""}  # by the number of axes of merged streams

# --- in a forward


def detect(module: nn.Module, x: torch.Tensor, batch_size: int) -> Site | None:
    """A connection of as many streams as its module counts, where x has room for them."""
    n = int(getattr(module, "num_residual_streams", 1))
    fractions = int(getattr(module, "num_fracs", 1))
    if n * fractions == 1:
        return None
    layout = _layout(module, x, n, batch_size)
    return Site(
        style=FAMILY.name,
        family="hc",
        num_streams=n * fractions,
        layout=layout.replace("D", "(F D)") if fractions > 1 else layout,
        fractions=fractions,
    )


def _layout(module: nn.Module, x: torch.Tensor, n: int, batch_size: int) -> str:
    tokens = TOKEN_AXES.get(x.ndim, "")
    if x.shape[0] == n * batch_size and x.ndim in (2, 3, 4):
        # images may have their channels before or after the pixels, and both may be of one size
        first = getattr(module, "channel_first", False) or any(
            isinstance(child, nn.Conv2d) for child in module.children()
        )
        return f"(B N) D {tokens}".rstrip() if first and tokens else f"(B N) {tokens}D"
    if x.ndim >= 3 and x.shape[0] == batch_size and x.shape[-2] == n:
        return {3: "B N D", 4: "B T N D", 5: "B H W N D"}[x.ndim]
    raise StreamConnectionError(
        f"{type(module).__name__} was called with shape {tuple(x.shape)} for {n} streams and a batch of {batch_size}; "
        "expected ((batch·streams), token, feature) or (batch, token, stream, feature)"
    )


def watch(site: Site, x: torch.Tensor) -> Watch:
    """A watch for α (…, N, V + N), in whatever order of its axes."""
    channels = x.shape[1] if "D H W" in site.layout or "D T" in site.layout else x.shape[-1]
    per_column = x.numel() // (int(channels) // site.fractions)  # B·T·N

    def accept(shape: tuple[int, ...]) -> bool:
        columns, rest = divmod(math.prod(shape), per_column)
        return not rest and site.num_streams < columns <= 3 * site.num_streams  # heuristic: at most 2N views

    return Watch(accept)


def read(site: Site, batch_size: int, x: torch.Tensor, result: Any, seen: list[torch.Tensor]) -> Parts:
    """The weights in that matrix, of all that the module computed, that explains both the branch input and the mixed streams.

    ``result`` is ``(branch_input, residuals, {"beta": …})``; the matrix of the `Parts` is source by destination, as in the
    module.
    """
    branch_in, mixed, depth = result
    streams = _canonical(x.detach(), site, batch_size)
    n, lead = site.num_streams, tuple(streams.shape[:2])
    carried = _mixed_streams(mixed.detach(), streams, site, batch_size)
    alphas = [alpha for tensor in seen for alpha in _arrangements(tensor, lead, n, site.fractions)]
    for views in sorted({alpha.shape[-1] - n for alpha in alphas}):
        taken = as_views(branch_in.detach(), batch_size, lead[1], views, streams.shape[-1])
        if taken is None:
            continue
        candidates = [alpha for alpha in alphas if alpha.shape[-1] == views + n]
        found = explaining(((alpha, mixing(alpha.mT, streams)) for alpha in candidates), taken, carried)
        if found is not None:
            write = _write_weights(depth, lead, site)
            return Parts(found[..., views:], found[..., :views].mT, write, taken)
    raise StreamConnectionError(
        f"a width connection with {n} streams computes no weights (streams × views + streams) that explain its output; "
        "this version of it is not known"
    )


def _canonical(x: torch.Tensor, site: Site, batch_size: int) -> torch.Tensor:
    return canonical(
        x, site.layout, batch_size=batch_size, num_streams=site.num_streams, fractions=site.fractions
    )


def _mixed_streams(mixed: torch.Tensor, streams: torch.Tensor, site: Site, batch_size: int) -> torch.Tensor:
    """The mixed streams, which some versions return split (B, …, N, D) though their input is merged."""
    if mixed.shape == streams.shape or mixed.ndim > len(site.layout.replace("(B N)", "B").split()):
        return mixed.reshape(streams.shape)
    return _canonical(mixed, site, batch_size)


def _arrangements(
    seen: torch.Tensor, lead: tuple[int, ...], n: int, fractions: int
) -> Iterator[torch.Tensor]:
    """A watched tensor as (B, T, N, V + N), from each order of axes that a version of the package has."""
    batch, tokens = lead
    if seen.numel() % (batch * tokens * n):
        return
    size = seen.numel() // (batch * tokens * n)
    shape = (batch, tokens, n, size)
    if fractions == 1:
        # Channels first: (B, N, V + N, H, W)
        if seen.ndim >= 4 and tuple(seen.shape[:3]) == (batch, n, size):
            yield seen.reshape(batch, n, size, tokens).permute(0, 3, 1, 2)
        if n in seen.shape and size in seen.shape:
            yield seen.reshape(shape)
        return
    own = n // fractions
    # (F, N, F, V + N): fractions are the outer index of rows and columns, as in HC
    if seen.ndim >= 4 and tuple(seen.shape[-4:-1]) == (fractions, own, fractions):
        split = seen.reshape(batch, tokens, fractions, own, fractions, size // fractions)
        views = size // fractions - own
        moved = split.permute(0, 1, 3, 2, 5, 4)  # (N, F), (V + N, F)
        yield moved.reshape(batch, tokens, n, (views + own) * fractions)
    # (N, F, (V + N)·F): fractions are the inner index, as in mHCv2
    if tuple(seen.shape[-3:]) == (own, fractions, size):
        yield seen.reshape(shape)


def _write_weights(depth: Any, lead: tuple[int, ...], site: Site) -> torch.Tensor:
    """H_post as (B, T, N, V): one column for each branch output or fraction of it."""
    beta = next((tensor.detach() for tensor in tensors_in(depth) if tensor.is_floating_point()), None)
    if beta is None:
        raise StreamConnectionError(
            "a width connection gives no write weights (add_branch_out_to_residual=False): nothing is written back, so "
            "there is no connection to follow"
        )
    n, fractions = site.num_streams, site.fractions
    if fractions > 1:
        own = n // fractions
        if site.layout.startswith("(B N)"):  # HC: (F1, N, F2), F1 of the branch
            split = beta.reshape(*lead, fractions, own, fractions)
            return split.permute(0, 1, 3, 4, 2).reshape(*lead, n, fractions)
        # mHCv2: (N, F1, F2)
        return beta.reshape(*lead, own, fractions, fractions).mT.reshape(*lead, n, fractions)
    if "D H W" in site.layout and tuple(beta.shape[:2]) == (lead[0], n) and beta.ndim == 4:
        return beta.reshape(lead[0], n, lead[1], 1).movedim(1, 2)
    return beta.reshape(*lead, n, -1)


# --- in a weight file: static alpha and beta


ASSUMED_ROUNDS = f"Sinkhorn with {SINKHORN_ROUNDS} rounds is assumed, the default of hyper-connections: the file does not tell"
UNTOLD = "alpha has several columns besides the streams and no beta: fractions or branch inputs, the shapes do not decide"
NOT_SQUARE = "mHC v1 with fractions runs Sinkhorn on blocks that are not square: there is no doubly stochastic H_res to give"
FREE_GATES = {"dynamic_alpha_scale": "gate_alpha", "dynamic_beta_scale": "gate_post"}
CONSTRAINED_GATES = {
    "pre_branch_scale": "gate_pre",
    "residual_scale": "gate_res",
    "h_post_scale": "gate_post",
}


def _find(constrained: bool) -> Callable[[str, Leaves], Iterator[FoundTensors]]:
    """Finds static alpha (n·f, v·f + n·f), with a static beta of as many rows or none; mHC has a scale for H_res alone."""
    gates = CONSTRAINED_GATES if constrained else FREE_GATES
    names = {"static_alpha": "alpha", "static_beta": "beta", **gates}

    def find(module: str, leaves: Leaves) -> Iterator[FoundTensors]:
        if constrained != ("residual_scale" in leaves) or not _alpha_fits(leaves):
            return
        rows, fractions = leaves["static_alpha"].shape[0], _fractions(leaves)
        yield FoundTensors(
            module,
            rows // (fractions or 1),
            _stream_width(leaves, fractions or 1),
            {role: leaves[name] for name, role in names.items() if name in leaves},
            tuple(leaf for name, leaf in leaves.items() if name.startswith("dynamic_") and name not in names),
            fractions,
        )

    return find


def _alpha_fits(leaves: Leaves) -> bool:
    alpha, beta = leaves.get("static_alpha"), leaves.get("static_beta")
    if alpha is None or len(alpha.shape) != 2 or not 1 < alpha.shape[0] < alpha.shape[1]:
        return False
    return beta is None or alpha.shape[0] in (math.prod(beta.shape), beta.shape[0])


def _fractions(leaves: Leaves) -> int:
    """How many fractions a stream has; 0 where the shapes do not determine it."""
    rows, columns = leaves["static_alpha"].shape
    beta, dynamic = (leaves.get(name) for name in ("static_beta", "dynamic_beta_fn"))
    if beta is None:
        return 1 if columns - rows == 1 else 0
    if len(beta.shape) == 3:
        return beta.shape[1]
    return dynamic.shape[1] if len(beta.shape) == 1 and dynamic and len(dynamic.shape) == 2 else 1


def _stream_width(leaves: Leaves, fractions: int) -> int | None:
    """Width of a stream, from the projection (…, D/f, columns)."""
    dynamic, columns = leaves.get("dynamic_alpha_fn"), leaves["static_alpha"].shape[1]
    if dynamic is None or len(dynamic.shape) < 2 or dynamic.shape[-1] != columns:
        return None
    return dynamic.shape[-2] * fractions


def _weigh_hc(found: FoundTensors, values: Values, settings: Settings) -> StaticWeights:
    n, f = found.streams, found.fractions
    alpha, beta = values["alpha"], values.get("beta")
    if not f:
        return StaticWeights(gates=_gates(values), note=UNTOLD)
    views = alpha.shape[1] // f - n  # the columns are f groups of v reads and n streams
    grouped = alpha.T.reshape(f, views + n, f * n)
    res, pre = grouped[:, views:].reshape(f * n, f * n), grouped[:, :views].reshape(f * views, f * n)
    biases = {"pre": pre, "res": res}
    if beta is not None:
        biases["post"] = beta
    if beta is not None and f > 1:  # beta is ordered stream by fraction, the rows of alpha fraction by stream
        beta = np.repeat(beta.reshape(n, f).T.reshape(f * n, 1), f, axis=1)
    return StaticWeights(res, _vector(pre, f * n), _vector(beta, f * n), biases, _gates(values))


def _weigh_mhc(found: FoundTensors, values: Values, settings: Settings) -> StaticWeights:
    n, f = found.streams, found.fractions
    alpha, beta = values["alpha"], values.get("beta")
    gates = _gates(values)
    if not f:
        return StaticWeights(gates=gates, note=UNTOLD)
    if f > 1 and beta is not None and beta.ndim == 1:
        return StaticWeights(gates=gates, note=NOT_SQUARE)
    views = alpha.shape[1] - n * f
    pre, logits = alpha[:, :views].T, alpha[:, views:]
    biases = {"pre": pre, "res": logits.T}
    post = None
    if beta is not None:
        biases["post"] = beta
        post = 2.0 * expit(beta)
    # One weight for each stream and fraction read, the same for every fraction written
    if post is not None and f > 1:
        post = np.repeat(post.reshape(n, 1, f), f, axis=1).reshape(n * f, f)
    mixed = kernel.sinkhorn(logits, steps=SINKHORN_ROUNDS, last="row").T
    return StaticWeights(
        mixed, _vector(expit(pre), n * f), _vector(post, n * f), biases, gates, ASSUMED_ROUNDS
    )


def _vector(weights: np.ndarray | None, size: int) -> np.ndarray | None:
    """Weights of a single read or write as a vector."""
    return weights.ravel() if weights is not None and weights.size == size else weights


def _gates(values: Values) -> dict[str, float]:
    """Factors of the part that depends on the input; HC has one of them for H_pre and H_res."""
    named = {"pre": ("gate_pre", "gate_alpha"), "post": ("gate_post",), "res": ("gate_res", "gate_alpha")}
    return {
        part: float(values[role].ravel()[0])
        for part, roles in named.items()
        for role in roles
        if role in values
    }


def _rounds_of(module: Any, settings: Settings) -> dict[str, float]:
    """Rounds of Sinkhorn of a built module, which its constraint, a functools.partial, has as a keyword."""
    constraint = getattr(module, "residual_mix_constraint_fn", None)
    rounds = getattr(constraint, "keywords", {}).get("iters", SINKHORN_ROUNDS)
    return {"rounds": float(rounds), **attributes_of(module, settings)}


FAMILY = PairedFamily(
    name="width",
    constrains={"hc": ""},
    opens="width_connection",
    closes="depth_connection",
    branch_argument=0,
    detect=detect,
    watch=watch,
    read=read,
    weights=(
        WeightPattern(
            name="mhc",
            style="width",
            looked_for="static_alpha (n, n + 1) with static_beta (n) and residual_scale",
            find=_find(constrained=True),
            weigh=_weigh_mhc,
            constrained=True,
            # rows of alpha are sources: its last side, rows, are columns of H_res
            sinkhorn=lambda settings: {
                "sinkhorn_steps": int(settings.get("rounds", SINKHORN_ROUNDS)),
                "last": "column",
                "floor": 0.0,
            },
            module_settings=_rounds_of,
        ),
        WeightPattern(
            name="hc",
            style="width",
            looked_for="static_alpha (n, n + 1) with static_beta (n), as fractions too",
            find=_find(constrained=False),
            weigh=_weigh_hc,
        ),
    ),
)
