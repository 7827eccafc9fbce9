"""The first forward: everything is looked at, then the chains are found in it."""

from __future__ import annotations

import weakref
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.detection import opened_site, paired_family
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import ForwardFamily, Site
from depthscope.probes.connections.reading import Opening, branch_output, returned_watch
from depthscope.probes.model.arguments import CaptureError
from depthscope.probes.model.hooks import Attachment, Hook, Seeing, as_outside, first_float, in_recomputation
from depthscope.probes.model.layout import count_streams
from depthscope.probes.session.current_forward import Here
from depthscope.probes.session.forward import Forward, Listener
from depthscope.probes.session.observer import Sight
from depthscope.probes.structure.chain import Chain, Link, Place
from depthscope.probes.structure.find_chains import find_chains
from depthscope.probes.structure.infer_layout import infer_layout, takes_tokens_first
from depthscope.probes.structure.layout_evidence import read_signs
from depthscope.probes.structure.tape import FORWARD, Call, Passed, Tape, version


class RewrittenError(CaptureError):
    """A state of the first forward was rewritten in place before it could be copied."""


class AxisError(RewrittenError):
    """The sequences of the first forward were counted along the wrong axis."""


class Discovery:
    """Hooks on every module, a tape of their calls, and the chains that are found on it.

    Parameters
    ----------
    sight : Sight
        Where what is found is kept.
    here : Here
        The running forward.
    """

    def __init__(self, sight: Sight, here: Here):
        self.sight = sight
        self._here = here

    def attach(self, attachment: Attachment) -> None:
        """Put hooks on every module, and look at the methods of those that may be connections."""
        for path, module in self.sight.model.named_modules():
            attachment.before(module, partial(self._tape_enter, path))
            attachment.after(module, self._tape_leave)
            pair = paired_family(module)
            if pair is not None:
                attachment.around(module, pair.opens, partial(self._tape_opens, path))
                attachment.around(module, pair.closes, partial(self._tape_closes, path, pair.closes))

    def _tape_enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._here.tape is None or self._here.paused or in_recomputation():
            return
        call = self._here.tape.enter(path, module, args, kwargs)
        self._watch_gradients(call.x, call.inputs)

    def _tape_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._here.tape is None or self._here.paused or in_recomputation():
            return
        call = self._here.tape.leave(module, output)
        self._watch_gradients(call.y, call.outputs)

    def _tape_opens(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Seeing | None:
        tape, forward = self._here.tape, self._here.forward
        x, pair = first_float(args, kwargs), paired_family(module)
        if tape is None or forward is None or x is None or pair is None or in_recomputation():
            return None
        site = opened_site(pair, module, x, forward.batch_size)
        if site is None:
            return None
        opening = Opening(site, forward.batch_size, x.detach())
        opening.key = tape.opened(path, module, pair.opens, x, site)
        self._watch_gradient(x)
        forward.openings.setdefault(path, []).append(opening)
        watch = opening.watch()
        return Seeing(watch, lambda result: opening.read(result, watch))

    def _tape_closes(
        self, path: str, method: str, module: nn.Module, args: Any, kwargs: Any
    ) -> Seeing | None:
        tape, forward = self._here.tape, self._here.forward
        if tape is None or forward is None or in_recomputation() or not forward.openings.get(path):
            return None
        opening, branch_out = forward.openings[path].pop(), branch_output(module, args, kwargs)
        watch = opening.closing_watch(branch_out)

        def done(result: Any) -> None:
            output = first_float(result)
            if output is not None:
                parts = opening.close(branch_out, result, watch)
                tape.closed(opening.key, method, branch_out, output, parts)
                self._watch_gradient(output)

        return Seeing(watch or nullcontext(), done)

    def _watch_gradients(self, first: torch.Tensor | None, several: tuple[Passed, ...]) -> None:
        for tensor in [seen.tensor for seen in several] or [first]:
            self._watch_gradient(tensor)

    def _watch_gradient(self, tensor: torch.Tensor | None) -> None:
        """In the first forward every tensor may turn out to be a state, so every gradient is listened to."""
        forward = self._here.forward
        if not self.sight.settings.gradients or forward is None or tensor is None or not tensor.requires_grad:
            return
        key = id(tensor), version(tensor)  # a tensor that is rewritten in place has another gradient
        known = forward.watched.get(key)
        if known is None or known.tensor() is not tensor:  # the number of a freed tensor may come again
            listener = forward.watched[key] = Listener(weakref.ref(tensor))
            tensor.register_hook(
                Hook(partial(self._see_watched, forward, listener), self.sight.errors.append)
            )

    def _see_watched(self, forward: Forward, listener: Listener, gradient: torch.Tensor) -> None:
        if listener.key is not None:
            self.sight.see_gradient(forward, *listener.key, gradient)

    def find(self, tape: Tape, forward: Forward) -> None:
        """Find the chains in the calls of a forward, and keep what it showed of them.

        Parameters
        ----------
        tape : Tape
            Its calls.
        forward : Forward
            What is kept of it.

        Raises
        ------
        RewrittenError
            Where a state was lost; the chains are known then.
        """
        chains = find_chains(tape, self.sight.model, layers=self.sight.settings.layers)
        calls = {call.key: call for call in tape.calls}
        opened = {(call.path, call.index): call.site for call in tape.calls if call.site is not None}
        self.sight.sites = {
            number: site
            for number, link in enumerate(chains[0].links)
            if (site := opened.get((link.path, link.index))) is not None and chains[0].has_streams
        }
        self.sight.layouts = [self._layout(tape, chain, forward) for chain in chains]
        if not self.sight.sites:
            self.sight.named_streams = self.sight.settings.streams or count_streams(
                chains[0].shapes[0], self.sight.layouts[0], forward.batch_size
            )
        self.sight.settings.selection.require(chains)
        self.sight.chains = chains
        self._here.paused = True
        try:
            self._replay(calls, forward)
        except RewrittenError:
            raise  # the chains are right: from the next forward on states are copied as they pass
        except Exception:
            self.sight.chains = []
            raise
        finally:
            self._here.paused = False

    def _layout(self, tape: Tape, chain: Chain, forward: Forward) -> str:
        if self.sight.settings.layout is not None:
            return self.sight.settings.layout
        if self.sight.sites:
            return self.sight.sites[0].layout
        signs = read_signs(tape, chain)
        if self.sight.batch_axis == 0 and takes_tokens_first(chain.shapes[0], forward.lead_shape, signs):
            self.sight.batch_axis = 1
            raise AxisError(
                "the model takes its tokens first, so the batch is its second axis; call the model once more"
            )
        return infer_layout(chain.shapes[0], batch_size=forward.batch_size, signs=signs)

    def _replay(self, calls: dict[Any, Call], forward: Forward) -> None:
        """Feed what the tape kept to the same functions that later forwards feed from their hooks."""
        for number, depth, place in self.sight.places():
            call = calls[place.path, place.method, place.index]
            self._refuse_rewritten(call, place)
            tensor, written = call.seen(place.at, place.item)
            value = call.value if (place.at, place.item) == ("output", 0) else tensor
            assert tensor is not None
            assert value is not None
            listener = forward.watched.get((id(tensor), written))
            if listener is not None and listener.tensor() is tensor:
                listener.key = number, depth
                self.sight.expect(forward, (number, depth), tensor)
            self.sight.see_state(forward, number, depth, value)
        for number, link in enumerate(self.sight.links):
            self._replay_link(calls, forward, number, link)
        for number, chain in enumerate(self.sight.chains):
            for position, link in enumerate(chain.links):
                if link.branch_path is not None:
                    branch = calls[link.branch_path, FORWARD, link.branch_index]
                    self.sight.keep_branch(forward, number, position, branch.y)

    def _replay_link(self, calls: dict[Any, Call], forward: Forward, number: int, link: Link) -> None:
        call = next(
            c for c in calls.values() if c.site is not None and (c.path, c.index) == (link.path, link.index)
        )
        if call.closing is not None and call.closing.parts is not None:
            self.sight.keep_parts(forward, number, call.closing.parts)
        elif isinstance(BY_NAME[link.style], ForwardFamily) and call.x is not None:
            x, site, rows = call.x.detach(), self.sight.sites[number], forward.rows

            def seen() -> list[torch.Tensor]:
                kept = _sequences_at(x, site, rows)
                watch = returned_watch(kept, site)
                with suppress(Exception), as_outside(), watch:  # sharded weights, for one, are gone by now
                    call.module.forward(kept)
                return watch.floating()

            self.sight.see_returned(forward, number, x, call.output, seen)

    def _refuse_rewritten(self, call: Call, place: Place) -> None:
        tensor, written = call.seen(place.at, place.item)
        if tensor is None:
            raise RewrittenError(
                f"the state at {call.path} was not kept in the first forward; call the model once more: from the second "
                "forward on states are copied as they pass"
            )
        copied = (place.at, place.item) == ("output", 0) and call.copy is not None
        if not copied and written != version(tensor):
            raise RewrittenError(
                f"the state at {call.path} was rewritten in place before the first forward ended, so its value is lost; "
                "call the model once more: from the second forward on states are copied as they pass"
            )


def _sequences_at(x: torch.Tensor, site: Site, rows: torch.Tensor) -> torch.Tensor:
    """The sampled sequences of a connection's input, in the module's own layout."""
    rows = rows.to(x.device)
    return x[:, rows] if site.layout.startswith("N B") else x[rows]
