"""Every forward after the first: hooks on the places of the chains only, and looks at the connections' own methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.detection import paired_family
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import ForwardFamily, PairedFamily
from depthscope.probes.connections.reading import Opening, branch_output, returned_watch
from depthscope.probes.model.hooks import Attachment, Seeing, first_float, floats_in, in_recomputation
from depthscope.probes.session.current_forward import Here
from depthscope.probes.session.forward import Forward
from depthscope.probes.session.observer import Sight
from depthscope.probes.structure.chain import Place
from depthscope.probes.structure.tape import FORWARD

Spots = list[tuple[int, int, Place]]


class Following:
    """Hooks on the places of known chains.

    Parameters
    ----------
    sight : Sight
        With its chains found.
    here : Here
        The running forward.
    last : callable
        Gives the forward that ended last, whose checkpoints a backward recomputes.
    """

    def __init__(self, sight: Sight, here: Here, last: Callable[[], Forward | None]):
        self.sight = sight
        self._here = here
        self._last = last

    def attach(self, attachment: Attachment) -> None:
        """Put hooks on the places, and look at the methods that connect."""
        modules = dict(self.sight.model.named_modules(remove_duplicate=False))
        inputs, outputs = self._spots("input"), self._spots("output")
        methods = {path for path, method in (*inputs, *outputs) if method != FORWARD}
        for (path, method), spots in inputs.items():
            if method == FORWARD:
                attachment.before(modules[path], partial(self._see_input, path, spots))
        for path in {
            link.path for link in self.sight.links if isinstance(BY_NAME[link.style], ForwardFamily)
        }:
            attachment.around(modules[path], FORWARD, partial(self._returns, path))
        paired = {link.path for link in self.sight.links if isinstance(BY_NAME[link.style], PairedFamily)}
        for path in paired | methods:
            pair = paired_family(modules[path])
            assert pair is not None
            opened, closed = inputs.get((path, pair.opens), []), outputs.get((path, pair.closes), [])
            attachment.around(modules[path], pair.opens, partial(self._opens, path, pair.opens, opened))
            attachment.around(modules[path], pair.closes, partial(self._closes, path, pair.closes, closed))
        for path in {
            link.branch_path for chain in self.sight.chains for link in chain.links if link.branch_path
        }:
            attachment.after(modules[path], partial(self._see_branch, path))
        for (path, method), spots in outputs.items():
            if method == FORWARD:
                attachment.after(modules[path], partial(self._see_output, path, spots))

    def _spots(self, at: str) -> dict[tuple[str, str], Spots]:
        """The places on one side of calls, by the module and method that show them."""
        spots: dict[tuple[str, str], Spots] = {}
        for number, depth, place in self.sight.places():
            if place.at == at:
                spots.setdefault((place.path, place.method), []).append((number, depth, place))
        return spots

    def _see_input(self, path: str, spots: Spots, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._see_spots("input", path, FORWARD, spots, floats_in(args, kwargs))

    def _see_output(
        self,
        path: str,
        spots: Spots,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        self._see_spots("output", path, FORWARD, spots, floats_in(output))

    def _see_spots(
        self,
        at: str,
        path: str,
        method: str,
        spots: Spots,
        tensors: list[torch.Tensor],
    ) -> None:
        if self._here.paused or not tensors:
            return
        if in_recomputation():
            self._see_recomputed(spots, tensors)
            return
        forward = self._here.forward
        if forward is None:
            return
        index = forward.turn(f"{at} {method}", path)
        for number, depth, place in spots:
            if place.index == index and place.item < len(tensors):
                self.sight.see_state(forward, number, depth, tensors[place.item])
                self.sight.listen(forward, number, depth, tensors[place.item])

    def _see_recomputed(self, spots: Spots, tensors: list[torch.Tensor]) -> None:
        """In a reentrant checkpoint only the recomputed tensor has a gradient; take it where none is expected yet."""
        last = self._last()
        if last is None or len({place.item for *_, place in spots}) != len(spots):
            return
        for number, depth, place in spots:
            if place.item < len(tensors):
                self.sight.listen(last, number, depth, tensors[place.item])

    def _returns(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Seeing | None:
        """A returned connection is called: its own run is watched for the weights that it keeps to itself."""
        forward, x = self._here.forward, first_float(args, kwargs)
        if forward is None or x is None or self._here.paused or in_recomputation():
            return None
        number = self._link_number(forward, path)
        if number is None:
            return None
        watch = returned_watch(x, self.sight.sites[number])
        return Seeing(
            watch, lambda output: self.sight.see_returned(forward, number, x.detach(), output, watch.floating)
        )

    def _opens(
        self,
        path: str,
        method: str,
        spots: Spots,
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> Seeing | None:
        x = first_float(args, kwargs)
        self._see_spots("input", path, method, spots, floats_in(args, kwargs))
        forward = self._here.forward
        if forward is None or x is None or self._here.paused or in_recomputation():
            return None
        number = self._link_number(forward, path)
        if number is None:
            return None
        opening = Opening(self.sight.sites[number], forward.batch_size, x.detach(), key=number)
        forward.openings.setdefault(path, []).append(opening)
        watch = opening.watch()
        return Seeing(watch, lambda result: opening.read(result, watch))

    def _closes(
        self,
        path: str,
        method: str,
        spots: Spots,
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> Seeing | None:
        forward = self._here.forward
        if self._here.paused or (forward is None and not in_recomputation()):
            return None
        if in_recomputation() or forward is None or not forward.openings.get(path):
            return Seeing(
                nullcontext(),
                lambda result: self._see_spots("output", path, method, spots, floats_in(result)),
            )
        opening, branch_out = forward.openings[path].pop(), branch_output(module, args, kwargs)
        watch = opening.closing_watch(branch_out)

        def done(result: Any) -> None:
            self._see_spots("output", path, method, spots, floats_in(result))
            self.sight.keep_parts(forward, opening.key, opening.close(branch_out, result, watch))

        return Seeing(watch or nullcontext(), done)

    def _link_number(self, forward: Forward, path: str) -> int | None:
        index = forward.turn("link", path)
        return next(
            (n for n, link in enumerate(self.sight.links) if (link.path, link.index) == (path, index)), None
        )

    def _see_branch(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, tensor = self._here.forward, first_float(output)
        if forward is None or self._here.paused or in_recomputation() or tensor is None:
            return
        index = forward.turn("branch", path)
        for number, chain in enumerate(self.sight.chains):
            for position, link in enumerate(chain.links):
                if (link.branch_path, link.branch_index) == (path, index):
                    self.sight.keep_branch(forward, number, position, tensor)
