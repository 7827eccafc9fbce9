"""Width connections, as lucidrains keeps them: one joint matrix (streams × views + streams) that reads and mixes.

Shapes: B batch, T token, N stream, F fraction, V view, D feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from depthscope.probes.connections.coefficients import Parts, as_views
from depthscope.probes.connections.detection import ConnectionError, Site  # ConnectionError: the field's word
from depthscope.probes.connections.tensor_watch import Watch, explaining, mixing
from depthscope.probes.model.layout import canonical
from depthscope.probes.model.tensors import tensors_in


def width_watch(x: torch.Tensor, site: Site) -> Watch:
    """A watch for the joint weights (…, N, V + N) of a width connection, in whatever order of its axes.

    Parameters
    ----------
    x : Tensor
        Its input.
    site : Site
        What it is.

    Returns
    -------
    Watch
    """
    per_view = x.numel() // _width(x, site)  # B·T·N

    def accept(shape: tuple[int, ...]) -> bool:
        views, rest = divmod(math.prod(shape), per_view)
        return not rest and site.num_streams < views <= 3 * site.num_streams

    return Watch(accept)


def _width(x: torch.Tensor, site: Site) -> int:
    channels = x.shape[1] if "D H W" in site.layout or "D T" in site.layout else x.shape[-1]
    return int(channels) // site.fractions


def read_width(
    site: Site, batch_size: int, x: torch.Tensor, result: Any, seen: Iterable[torch.Tensor]
) -> Parts:
    """Read a width connection from what its ``width_connection`` computed.

    Parameters
    ----------
    site : Site
        What it is.
    batch_size : int
        Size of the batch.
    x : Tensor
        Its input.
    result : object
        ``(branch_input, residuals, {"beta": …})``.
    seen : iterable of Tensor
        What passed through torch functions meanwhile, of the shapes that `width_watch` accepts.

    Returns
    -------
    Parts
        In which ``mix`` is as the module keeps it, source by destination.

    Raises
    ------
    ConnectionError
        Where no tensor that the module computed explains its output.
    """
    branch_in, mixed, depth = result
    streams = _canonical(x, site, batch_size)
    n, lead = site.num_streams, tuple(streams.shape[:2])
    carried = _mixed_streams(mixed, streams, site, batch_size)
    joint = [alpha for tensor in seen for alpha in _arrangements(tensor, lead, n, site.fractions)]
    for views in sorted({alpha.shape[-1] - n for alpha in joint}):
        taken = as_views(branch_in, batch_size, lead[1], views, streams.shape[-1])
        if taken is None:
            continue
        candidates = [alpha for alpha in joint if alpha.shape[-1] == views + n]
        found = explaining(((alpha, mixing(alpha.mT, streams)) for alpha in candidates), taken, carried)
        if found is not None:
            write = _write_weights(depth, lead, site)
            return Parts(found[..., views:], found[..., :views].mT, write, taken)
    raise ConnectionError(
        f"a width connection with {n} streams computes no weights (streams × views + streams) that explain its output; "
        "this version of it is not known"
    )


def _canonical(x: torch.Tensor, site: Site, batch_size: int) -> torch.Tensor:
    return canonical(
        x.detach(), site.layout, batch_size=batch_size, num_streams=site.num_streams, fractions=site.fractions
    )


def _mixed_streams(mixed: torch.Tensor, streams: torch.Tensor, site: Site, batch_size: int) -> torch.Tensor:
    """The mixed streams, which some versions hand on split (B, …, N, D) though their input is merged."""
    if mixed.shape == streams.shape or mixed.ndim > len(site.layout.replace("(B N)", "B").split()):
        return mixed.detach().reshape(streams.shape)
    return _canonical(mixed, site, batch_size)


def _arrangements(
    seen: torch.Tensor, lead: tuple[int, ...], n: int, fractions: int
) -> Iterator[torch.Tensor]:
    """A watched tensor as (B, T, N, V + N) in each order of axes that lucidrains' versions keep it in."""
    batch, tokens = lead
    if seen.numel() % (batch * tokens * n):
        return
    size = seen.numel() // (batch * tokens * n)
    shape = (batch, tokens, n, size)
    if fractions == 1:
        if seen.ndim >= 4 and tuple(seen.shape[:3]) == (
            batch,
            n,
            size,
        ):  # channels first: (B, N, V + N, H, W)
            yield seen.reshape(batch, n, size, tokens).permute(0, 3, 1, 2)
        if n in seen.shape and size in seen.shape:
            yield seen.reshape(shape)
        return
    own = n // fractions
    # (F, N, F, V + N): fractions outer in rows and columns, as HC keeps them
    if seen.ndim >= 4 and tuple(seen.shape[-4:-1]) == (fractions, own, fractions):
        split = seen.reshape(batch, tokens, fractions, own, fractions, size // fractions)
        views = size // fractions - own
        moved = split.permute(0, 1, 3, 2, 5, 4)  # (N, F), (V + N, F)
        yield moved.reshape(batch, tokens, n, (views + own) * fractions)
    # (N, F, (V + N)·F): fractions inner, as mHCv2 keeps them
    if tuple(seen.shape[-3:]) == (own, fractions, size):
        yield seen.reshape(shape)


def _write_weights(depth: Any, lead: tuple[int, ...], site: Site) -> torch.Tensor:
    """Write weights as (B, T, N, V): one column for each branch output or fraction of it."""
    beta = next((tensor.detach() for tensor in tensors_in(depth) if tensor.is_floating_point()), None)
    if beta is None:
        raise ConnectionError(
            "a width connection gives no write weights (add_branch_out_to_residual=False): nothing is written back, so "
            "there is no connection to follow"
        )
    n, fractions = site.num_streams, site.fractions
    if fractions > 1:
        own = n // fractions
        if site.layout.startswith("(B N)"):  # (F1, N, F2), F1 of the branch
            return (
                beta.reshape(*lead, fractions, own, fractions)
                .permute(0, 1, 3, 4, 2)
                .reshape(*lead, n, fractions)
            )
        return beta.reshape(*lead, own, fractions, fractions).mT.reshape(*lead, n, fractions)  # (N, F1, F2)
    if "D H W" in site.layout and tuple(beta.shape[:2]) == (lead[0], n) and beta.ndim == 4:
        return beta.reshape(lead[0], n, lead[1], 1).movedim(1, 2)
    return beta.reshape(*lead, n, -1)
