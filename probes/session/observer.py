"""What a model was found to be, and what is kept of the states, gradients and connections that pass in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.family import Site
from depthscope.probes.connections.reading import read_returned
from depthscope.probes.model.arguments import Mask, find_mask, fit_mask, whole
from depthscope.probes.model.hooks import Hook, computed_in
from depthscope.probes.model.layout import canonical
from depthscope.probes.session.forward import FINAL, Forward
from depthscope.probes.statistics.streaming import Streaming
from depthscope.probes.structure.chain import Chain, Link, Place
from depthscope.probes.structure.sites import Selection


@dataclass(frozen=True)
class Settings:
    """What to capture, and how much of it to keep."""

    gradients: bool = False
    layers: tuple[str, ...] | None = None
    layout: str | None = None
    streams: int | None = None
    max_sequences: int = 8
    seed: int = 0
    mask: Mask = None
    selection: Selection = field(default_factory=Selection)
    scale: Callable[[], torch.Tensor | None] | None = None
    streaming: Callable[[int], Streaming] | None = None  # from a forward's first index


class Sight:
    """What a model was found to be, and what is kept of what passes in it.

    Parameters
    ----------
    model : Module
        The user's model; it is only looked at.
    settings : Settings
        What to capture.
    """

    def __init__(self, model: nn.Module, settings: Settings):
        self.model = model
        self.settings = settings
        self.chains: list[Chain] = []
        self.layouts: list[str] = []
        self.sites: dict[int, Site] = {}
        self.named_streams = 1
        self._placed: tuple[list[Chain], list[tuple[int, int, Place]]] | None = None
        self.batch_axis = 0  # of the model's first tensor
        self.dtype = torch.float32
        self.precision = torch.float32  # that the states are multiplied in, autocast's where it is on
        self.errors: list[Exception] = []

    def places(self) -> list[tuple[int, int, Place]]:
        """Every place that is captured: chain number, depth (`FINAL` behind the last norm), place."""
        if self._placed is None or self._placed[0] is not self.chains:
            self._placed = self.chains, list(self._find_places())
        return self._placed[1]

    def _find_places(self) -> Iterable[tuple[int, int, Place]]:
        for number, chain in enumerate(self.chains):
            for depth, place in enumerate(chain.places):
                if self.settings.selection.needs(chain, depth):
                    yield number, depth, place
            if chain.final is not None and self.settings.selection.wants("final"):
                yield number, FINAL, chain.final

    @property
    def links(self) -> tuple[Link, ...]:
        """The stream connections of the (only) chain that has them."""
        return self.chains[0].links if self.chains and self.sites else ()

    @property
    def num_streams(self) -> int:
        """Number of residual streams n, fractions counted; 1 for a plain residual model."""
        return self.sites[0].num_streams if self.sites else self.named_streams

    @property
    def fractions(self) -> int:
        """Number of fractions of each stream's features that are connected on their own; mostly 1."""
        return self.sites[0].fractions if self.sites else 1

    @property
    def family(self) -> str:
        """The connection family: residual, hc, mhc, independent_hc, gated, altup or depth_history."""
        if not self.sites:
            if any(chain.history for chain in self.chains):
                return "depth_history"
            return "residual" if self.num_streams == 1 else "unknown"
        families = {site.family for site in self.sites.values()}
        return families.pop() if len(families) == 1 else "hc"

    # --- what passes ---

    def see_state(self, forward: Forward, number: int, depth: int, tensor: torch.Tensor) -> None:
        """Keep a state of a forward and add it to the statistics.

        Parameters
        ----------
        forward : Forward
            The forward.
        number, depth : int
            Chain and depth (`FINAL` behind the last norm).
        tensor : Tensor
            The state as the model holds it.
        """
        forward.fired.add(("state", number, depth))
        if depth == FINAL:
            if len(forward.rows):
                forward.states[number, depth] = forward.sampled(self._final(forward, tensor.detach()))
            return
        state = self._canonical(forward, number, tensor.detach())
        mask = self._mask(forward, number, state)
        self.dtype, self.precision = tensor.dtype, computed_in(tensor)
        if len(forward.rows):
            forward.states[number, depth] = forward.sampled(state)
        sums = forward.chain_sums(number)
        if self.settings.streaming is not None and sums.streaming is None:
            sums.streaming = self.settings.streaming(forward.first_index)
        sums.see_state(depth, state, mask)

    def listen(self, forward: Forward, number: int, depth: int, tensor: torch.Tensor) -> None:
        """Listen to the gradient of a state, where gradients are wanted and it will have one."""
        key = (number, depth)
        if self.settings.gradients and tensor.requires_grad and key not in forward.hooked:
            self.expect(forward, key, tensor)
            tensor.register_hook(Hook(partial(self.see_gradient, forward, number, depth), self.errors.append))

    def expect(self, forward: Forward, key: tuple[int, int], tensor: torch.Tensor) -> None:
        """Note that the gradient of a state is listened to."""
        if not any(number == key[0] for number, _ in forward.hooked):
            forward.sources.append(
                tensor
            )  # the first state of a chain, up to which a backward of our own must reach
        forward.hooked.add(key)

    def see_gradient(self, forward: Forward, number: int, depth: int, gradient: torch.Tensor) -> None:
        """Keep a gradient, divided by the loss scale; several backwards through one forward add up.

        The statistics of a second backward are known where the whole batch is kept raw, and undefined (NaN) elsewhere.

        Parameters
        ----------
        forward : Forward
            The forward whose state it belongs to.
        number, depth : int
            Chain and depth.
        gradient : Tensor
            As the backward gives it.
        """
        scale = self.settings.scale() if self.settings.scale is not None else None
        whole = gradient.detach()
        if scale is not None:
            whole = whole.float() / scale.to(whole.device)
        state = self._final(forward, whole) if depth == FINAL else self._canonical(forward, number, whole)
        again = (number, depth) in forward.arrived
        forward.arrived.add((number, depth))
        kept = forward.sampled(state)
        if again:
            kept = kept + forward.gradients[number, depth]
            complete = len(forward.rows) == forward.batch_size
            state = kept if complete else torch.full_like(state, torch.nan)  # squares do not add up
        forward.gradients[number, depth] = kept
        if depth != FINAL:
            mask = forward.masks.get(number)
            forward.chain_sums(number).see_gradient(depth, state, mask, anew=again)

    def see_returned(
        self,
        forward: Forward,
        number: int,
        x: torch.Tensor,
        output: Any,
        seen: Callable[[], list[torch.Tensor]],
    ) -> None:
        """Read a returned connection and keep its parts; ``seen`` gives what it computed inside."""
        rows = forward.rows.to(x.device)
        sampled, whole = read_returned(self.sites[number], x, output, rows, seen)
        self.keep_parts(forward, number, whole, sampled)

    def keep_parts(self, forward: Forward, number: int, whole: Parts, sampled: Parts | None = None) -> None:
        """Keep the parts of a connection.

        Parameters
        ----------
        forward : Forward
            The forward.
        number : int
            The connection.
        whole : Parts
            Of every token.
        sampled : Parts, optional
            Of the sampled sequences, where more was read of them.
        """
        forward.fired.add(("connection", 0, number))
        if len(forward.rows):
            rows = forward.rows.to(whole.write.device)
            forward.parts[0, number] = whole.sampled(rows) if sampled is None else sampled.detached()
        if whole.mix is not None:
            forward.chain_sums(0).see_mixing(number, whole.mix, forward.masks.get(0))

    def keep_branch(self, forward: Forward, number: int, position: int, tensor: torch.Tensor | None) -> None:
        """Keep what a branch gave: chain number and position of its connection."""
        if tensor is None:
            return
        forward.fired.add(("branch", number, position))
        if len(forward.rows):
            flat = (
                tensor.detach()
                if self.sites
                else self._canonical(forward, number, tensor.detach()).squeeze(2)
            )
            forward.branches[number, position] = forward.sampled(flat)

    # --- shapes and masks ---

    def _canonical(self, forward: Forward, number: int, tensor: torch.Tensor) -> torch.Tensor:
        return canonical(
            whole(tensor),
            self.layouts[number],
            batch_size=forward.batch_size,
            num_streams=self.num_streams,
            fractions=self.fractions,
        )

    def _final(self, forward: Forward, tensor: torch.Tensor) -> torch.Tensor:
        """The state behind the last norm, (B, T, D), whatever the layout of the streams."""
        if not self.sites and self.num_streams == 1:
            return self._canonical(forward, 0, tensor).squeeze(2)
        return tensor.reshape(forward.batch_size, -1, tensor.shape[-1])

    def _mask(self, forward: Forward, number: int, state: torch.Tensor) -> torch.Tensor | None:
        if number not in forward.masks:
            prefix = "decoder_" if "decoder" in self.chains[number].name else ""
            mask = find_mask(forward.arguments, self.settings.mask, prefix)
            forward.masks[number] = None if mask is None else fit_mask(mask, state)
        return forward.masks[number]
