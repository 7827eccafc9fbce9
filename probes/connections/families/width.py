"""lucidrains' connections: ``width_connection`` opens, ``depth_connection`` closes, one matrix α reads and mixes.

Hyper-connections (arXiv 2409.19606, Algorithm 2), mHC and mHCv2, their fractions, input views and channels-first versions, as
in the package ``hyper-connections``.
α is (n × (v + n)). Shapes: B batch, T token, N stream, F fraction, V view (an input of the branch), D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts, as_views
from depthscope.probes.connections.family import PairedFamily, Site, StreamConnectionError
from depthscope.probes.connections.tensor_watch import Watch, WeightPlace, explaining, mixing
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


def read(
    site: Site,
    batch_size: int,
    x: torch.Tensor,
    result: Any,
    seen: list[torch.Tensor],
    place: WeightPlace | None,
) -> Parts:
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
        fitting = [alpha for alpha in alphas if alpha.shape[-1] == views + n]
        candidates = [(alpha, mixing(alpha.mT, streams)) for alpha in fitting]
        found = explaining(candidates, taken, carried, place=place)
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


FAMILY = PairedFamily(
    name="width",
    constrains={"hc": ""},
    opens="width_connection",
    closes="depth_connection",
    branch_argument=0,
    detect=detect,
    watch=watch,
    read=read,
)
