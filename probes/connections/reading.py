"""What are the coefficients of one call of a connection? What its family reads, for the requested tokens.

Shapes: B batch, T token, N stream, D feature; K the sampled sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.detection import paired_family
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import ForwardFamily, PairedFamily, Site
from depthscope.probes.connections.read_weights import (
    are_independent,
    find_read_weights,
    least_squares_read,
    still_reads,
)
from depthscope.probes.connections.tensor_watch import Watch, WeightPlace
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.layout import canonical
from depthscope.probes.model.tensors import tensors_in


def forward_family(site: Site) -> ForwardFamily:
    """The declaration of the forward connection that a site was detected as."""
    family = BY_NAME[site.style]
    assert isinstance(family, ForwardFamily)
    return family


# --- forward connections


def returned_watch(x: torch.Tensor, site: Site) -> Watch:
    """A watch for the weights that a forward connection computes and does not return."""
    return forward_family(site).watch(site, x)


def read_returned(
    site: Site,
    x: torch.Tensor,
    output: Any,
    rows: torch.Tensor,
    computed: Callable[[torch.Tensor | None], list[torch.Tensor]],
    place: WeightPlace | None = None,
    every_token: bool = False,
) -> tuple[Parts | None, Parts]:
    """Read a forward connection: all parts of the sampled sequences, and of all tokens those that it returned.

    ``computed``: returns the tensors that the connection computed: for these rows at least, or for all sequences
    (None).
    ``place``: where H_pre was among these in the forward before.
    ``every_token``: whether H_pre is wanted of every token, where the module computes it.
    Raises StreamConnectionError: Where the family finds no weights that explain the output.
    """
    parts = forward_family(site).read(site, x, output, lambda: computed(None))
    if not len(rows):
        if every_token and parts.read is None and not site.reads_features:
            every_row = torch.arange(canonical_streams(site, x).shape[0], device=x.device)
            write, branch_in = parts.write.squeeze(-1), parts.branch_in.squeeze(2)
            _, of_all = _watched(site, x, every_row, branch_in, computed(None), write, place)
            parts.read = None if of_all is None else of_all.unsqueeze(-2)
        return None, parts
    sampled = parts.at(rows)
    if parts.read is None and not site.reads_features:
        # A forward connection has one view: its branch takes one tensor.
        streams, branch_in = canonical_streams(site, x)[rows], sampled.branch_in.squeeze(2)
        write = sampled.write.squeeze(-1)
        seen = computed(None if every_token else rows)
        read, of_all = _watched(site, x, rows, branch_in, seen, write, place)
        if of_all is not None:
            parts.read = of_all.unsqueeze(-2)
        if read is None:
            # No tensor of the module explains the branch input: it may read by a fused kernel.
            read, sampled.read_known = least_squares_read(streams, branch_in), are_independent(streams)
        sampled.read = read.unsqueeze(-2)
    return sampled, parts


def canonical_streams(site: Site, x: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Streams as (B, T, N, D)."""
    return canonical(
        x,
        site.layout,
        batch_size=site.batch_size(x) if batch_size is None else batch_size,
        num_streams=site.num_streams,
        fractions=site.fractions,
    )


def watched_read(
    site: Site,
    x: torch.Tensor,
    rows: torch.Tensor,
    branch_in: torch.Tensor,
    seen: list[torch.Tensor],
    write: torch.Tensor | None = None,
    place: WeightPlace | None = None,
) -> torch.Tensor | None:
    """H_pre of the sampled sequences, (K, T, N), among the tensors that the module computed.

    ``branch_in``: what the branch took, (K, T, D).
    ``seen``: of the sampled sequences or of all.
    ``write``: H_post, (K, T, N), which is taken for H_pre only where nothing else explains the branch input: models
    begin with equal streams, and there all weights of the same sum explain it alike.
    ``place``: where it was in the forward before, which is tried first, and is noted for the next one.
    Returns: None where no tensor explains the branch input.
    """
    return _watched(site, x, rows, branch_in, seen, write, place)[0]


def _watched(
    site: Site,
    x: torch.Tensor,
    rows: torch.Tensor,
    branch_in: torch.Tensor,
    seen: list[torch.Tensor],
    write: torch.Tensor | None,
    place: WeightPlace | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """H_pre of the sampled sequences, as `watched_read`, and of all where the module computed it for all, (B, T, N)."""
    streams = canonical_streams(site, x)
    sampled = streams[rows]
    # A first forward is watched on the sample alone, later ones on all sequences: the number of elements tells which.
    of_all, of_sample = streams.shape[:-1], sampled.shape[:-1]
    tensors = [tensor for tensor in seen if tensor.numel() in (of_all.numel(), of_sample.numel())]

    def of_rows(tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor.reshape(of_sample) if tensor.numel() == of_sample.numel() else tensor.reshape(of_all)[rows]
        )

    def complete(tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor.reshape(of_all) if tensor.numel() == of_all.numel() else None

    if place is not None and tensors and place.among == len(tensors):
        # As many tensors as before: the same code has run, and the search, which takes longer than the forward, is over where
        # the tensor at the place still explains the branch input, and is not H_post.
        tensor = tensors[place.position]
        same = of_rows(tensor)
        if still_reads(sampled, branch_in, same, write):
            return same, complete(tensor)
    candidates = [of_rows(tensor) for tensor in tensors]
    read = find_read_weights(sampled, branch_in, candidates, unlike=write)
    at = [number for number, each in enumerate(candidates) if each is read]
    if place is not None:
        place.among, place.position = (len(candidates), at[0]) if at else (0, 0)
    return read, complete(tensors[at[0]]) if at else None


# --- paired connections


@dataclass
class Opening:
    """A paired connection that was opened and not closed yet.

    Parameters
    ----------
    site : Site
        What it is.
    batch_size : int
        Size of the batch.
    x : Tensor
        The streams that it took.
    key : object
        Whose opening it is, for the caller's own use.
    place : WeightPlace, optional
        Which of the tensors that the opening method computes were its weights in the forward before.
    """

    site: Site
    batch_size: int
    x: torch.Tensor
    key: Any = None
    parts: Parts | None = None
    place: WeightPlace | None = None

    @property
    def family(self) -> PairedFamily:
        """The declaration of the connection."""
        family = BY_NAME[self.site.style]
        assert isinstance(family, PairedFamily)
        return family

    def watch(self) -> Watch:
        """A watch for the weights that the opening method computes."""
        return self.family.watch(self.site, self.x)

    def read(self, result: Any, watch: Watch) -> None:
        """Read what the opening method returned, ``result``."""
        seen = watch.floating()
        self.parts = self.family.read(self.site, self.batch_size, self.x, result, seen, self.place)

    def closing_watch(self, branch_out: torch.Tensor) -> Watch | None:
        """A watch for the weights that the closing method computes; None where it computes none."""
        watch = self.family.watch_closing
        return None if watch is None else watch(self.site, branch_out)

    def close(self, branch_out: torch.Tensor, output: Any, watch: Watch | None) -> Parts:
        """All parts, after the closing method took the branch's output and returned the next state, ``output``."""
        assert self.parts is not None
        seen = [] if watch is None else watch.floating()
        return self.family.close(self.site, self.parts, branch_out, output, seen)


def branch_output(module: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    """The branch's output among the arguments of a closing method.

    ``args, kwargs``: what its closing method was called with.
    """
    family = paired_family(module)
    floating = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.ndim >= 2]
    if family is None or len(floating) <= family.branch_argument:
        raise CaptureError(f"{type(module).__name__} closed a connection without its branch's output")
    return floating[family.branch_argument].detach()
