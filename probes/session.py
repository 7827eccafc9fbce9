"""Hooks on, hooks off: what one model shows of its residual states in the forwards and backwards that its user runs.

A `Session` watches the first measured forward through hooks on every module (the tape), finds the chains in it, and from then
on hooks only the places that matter. It never runs the model itself, and returns nothing from any hook. Forwards in several
threads are kept apart.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from probes.adds import find_adds
from probes.chain import block_paths, find_chains
from probes.connections import Site, opened_site, pair_of
from probes.forward import FINAL, Forward, Listener, Measured
from probes.hooks import Attachment, Hook, MethodWatch, first_float, in_recomputation, tensors_in
from probes.inputs import CaptureError, Mask, arguments, find_mask, fit_mask
from probes.layout import canonical, count_streams, infer_layout
from probes.pairs import Opening
from probes.place import Chain, Link, Place
from probes.reading import Parts, read_returned, returned_watch
from probes.sampling import Reservoir, weights_stamp
from probes.sites import Selection
from probes.tape import FORWARD, Call, Tape, version


class RewrittenError(CaptureError):
    """A state of the first forward was rewritten in place before it could be copied."""


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


@dataclass
class Seeing:
    """A mode to run a method in, and what to do when it is done."""

    mode: AbstractContextManager[Any]
    done: Callable[[Any], None]


class _Thread(threading.local):
    """What one thread is in the middle of."""

    forward: Forward | None = None
    tape: Tape | None = None
    openings: dict[str, list[Opening]] | None = None
    paused = False


class Session:
    """The hooks of one probe on one model, and the forwards that they saw.

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
        self.forwards: list[Forward] = []
        self.last: Forward | None = None  # the last whole forward
        self.num_forwards = 0
        self.skipped = 0  # forwards of other threads while the chains were being found
        self.errors: list[Exception] = []
        self.dtype = torch.float32
        self.reservoir = Reservoir(settings.max_sequences, settings.seed)
        self._measured: list[Measured] = []
        self._named_streams = 1
        self._here = _Thread()
        self._lock = threading.RLock()
        self._discovering: int | None = None
        self._attachment: Attachment | None = None

    # --- hooks on, hooks off ---

    def attach(self) -> None:
        """Put the hooks on: on every module until the chains are known, then on their places only."""
        self.detach()
        attachment = self._attachment = Attachment(self.errors.append)
        attachment.before(self.model, self._begin)
        if self.chains:
            self._attach_places(attachment)
        else:
            self._attach_tape(attachment)
        attachment.after(self.model, self._end)

    def detach(self) -> None:
        """Take every hook off; the gradient hooks of running graphs fall silent."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        if self._here.forward is not None:
            self._here.forward.let_go()
        self._here.forward = self._here.tape = None
        self._discovering = None

    def _attach_tape(self, attachment: Attachment) -> None:
        for path, module in self.model.named_modules():
            attachment.before(module, partial(self._tape_enter, path))
            attachment.after(module, self._tape_leave)
            pair = pair_of(module)
            if pair is not None:
                attachment.around(module, pair.opens, partial(self._tape_opens, path))
                attachment.around(module, pair.closes, partial(self._tape_closes, path, pair.closes))

    def _attach_places(self, attachment: Attachment) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        inputs, outputs = self._spots("input"), self._spots("output")
        methods = {path for path, method in (*inputs, *outputs) if method != FORWARD}
        for (path, method), spots in inputs.items():
            if method == FORWARD:
                attachment.before(modules[path], partial(self._see_input, path, spots))
        for path in {link.path for link in self.links if link.style == "returned"}:
            attachment.around(modules[path], FORWARD, partial(self._returns, path))
        for path in {link.path for link in self.links if link.style in ("width", "altup")} | methods:
            pair = pair_of(modules[path])
            assert pair is not None
            opened, closed = inputs.get((path, pair.opens), []), outputs.get((path, pair.closes), [])
            attachment.around(modules[path], pair.opens, partial(self._opens, path, pair.opens, opened))
            attachment.around(modules[path], pair.closes, partial(self._closes, path, pair.closes, closed))
        for path in {link.branch_path for chain in self.chains for link in chain.links if link.branch_path}:
            attachment.after(modules[path], partial(self._see_branch, path))
        for (path, method), spots in outputs.items():
            if method == FORWARD:
                attachment.after(modules[path], partial(self._see_output, path, spots))

    def _spots(self, at: str) -> dict[tuple[str, str], list[tuple[int, int, Place]]]:
        """The places on one side of calls, by the module and method that show them."""
        spots: dict[tuple[str, str], list[tuple[int, int, Place]]] = {}
        for number, depth, place in self.places():
            if place.at == at:
                spots.setdefault((place.path, place.method), []).append((number, depth, place))
        return spots

    def places(self) -> Iterable[tuple[int, int, Place]]:
        """Every place that is captured: chain number, depth (`FINAL` behind the last norm), place."""
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
        return self.sites[0].num_streams if self.sites else self._named_streams

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

    # --- one forward ---

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_recomputation() or self._here.paused:
            return
        if self._here.forward is not None:
            self._here.forward.let_go()  # one that an error of the user's cut short
        named = arguments(module, args, kwargs)
        lead = next((t for t in tensors_in((args, kwargs)) if t.ndim > 0), None)
        if lead is None:
            raise CaptureError("the model was called without a tensor; expected a batch of tensors")
        with self._lock:
            if not self.chains and self._discovering is not None:
                self.skipped += 1  # another thread's forward is finding the chains
                return
            stamp = weights_stamp(module)
            slots = self.reservoir.choose(lead.shape[0], stamp)
            first_index = self.reservoir.total - lead.shape[0]
            if not self.chains:
                self._discovering = threading.get_ident()
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        self._here.forward = Forward(
            batch_size=lead.shape[0],
            stamp=stamp,
            first_index=first_index,
            slots=slots,
            arguments=named,
            rows=rows,
            row_data=lead.detach()[rows].clone(),
        )
        if not self.chains:
            layers = self.settings.layers
            finds = find_adds if self.settings.selection.inside_blocks else None
            self._here.tape = Tape(keep=block_paths(module, layers) if layers else (), on_block=finds)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, self._here.forward = self._here.forward, None
        tape, self._here.tape = self._here.tape, None
        if forward is None or in_recomputation():
            return
        if tape is not None:
            self._here.forward = forward
            try:
                self._discover(tape, forward)
            finally:
                self._here.forward = None
                self.attach()
        for sums in forward.sums:
            sums.end_forward()
        forward.ended()
        with self._lock:
            self.forwards.append(forward)
            self.last = forward
            if not self.settings.gradients:
                self._absorb()  # nothing more will come, so a loop without steps holds no more than one forward

    # --- the first forward: everything is looked at, then the chains are found in it ---

    def _tape_enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._here.tape is None or self._here.paused or in_recomputation():
            return
        call = self._here.tape.enter(path, module, args, kwargs)
        self._watch_gradient(call.x)

    def _tape_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._here.tape is None or self._here.paused or in_recomputation():
            return
        call = self._here.tape.leave(module, output)
        self._watch_gradient(call.y)

    def _tape_opens(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        tape, forward = self._here.tape, self._here.forward
        x, pair = first_float(args, kwargs), pair_of(module)
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
    ) -> MethodWatch | None:
        tape, forward = self._here.tape, self._here.forward
        if tape is None or forward is None or in_recomputation() or not forward.openings.get(path):
            return None
        opening, branch_out = forward.openings[path].pop(), _branch_output(module, args, kwargs)
        watch = opening.closing_watch(branch_out)

        def done(result: Any) -> None:
            output = first_float(result)
            if output is not None:
                parts = opening.close(branch_out, result, watch)
                tape.closed(opening.key, method, branch_out, output, parts)
                self._watch_gradient(output)

        return Seeing(watch, done)

    def _watch_gradient(self, tensor: torch.Tensor | None) -> None:
        """In the first forward every tensor may turn out to be a state, so every gradient is listened to."""
        forward = self._here.forward
        if not self.settings.gradients or forward is None or tensor is None or not tensor.requires_grad:
            return
        known = forward.watched.get(id(tensor))
        if known is None or known.tensor() is not tensor:  # the number of a freed tensor may come again
            listener = forward.watched[id(tensor)] = Listener(weakref.ref(tensor))
            tensor.register_hook(Hook(partial(self._see_watched, forward, listener), self.errors.append))

    def _see_watched(self, forward: Forward, listener: Listener, gradient: torch.Tensor) -> None:
        if listener.key is not None:
            self._see_gradient(forward, *listener.key, gradient)

    def _discover(self, tape: Tape, forward: Forward) -> None:
        chains = find_chains(tape, self.model, layers=self.settings.layers)
        calls = {call.key: call for call in tape.calls}
        opened = {(call.path, call.index): call.site for call in tape.calls if call.site is not None}
        self.sites = {
            number: site
            for number, link in enumerate(chains[0].links)
            if (site := opened.get((link.path, link.index))) is not None and chains[0].has_streams
        }
        self.layouts = [self._layout(chain, forward) for chain in chains]
        if not self.sites:
            self._named_streams = self.settings.streams or count_streams(
                chains[0].shapes[0], self.layouts[0], forward.batch_size
            )
        self.settings.selection.require(chains)
        self.chains = chains
        self._here.paused = True
        try:
            self._replay(calls, forward)
        except RewrittenError:
            raise  # the chains are right: from the next forward on states are copied as they pass
        except Exception:
            self.chains = []
            raise
        finally:
            self._here.paused = False

    def _layout(self, chain: Chain, forward: Forward) -> str:
        if self.settings.layout is not None:
            return self.settings.layout
        if self.sites:
            return self.sites[0].layout
        return infer_layout(
            chain.shapes[0], batch_size=forward.batch_size, channels_first=chain.channels_first
        )

    def _replay(self, calls: dict[Any, Call], forward: Forward) -> None:
        """Feed what the tape kept to the same functions that later forwards feed from their hooks."""
        for number, depth, place in self.places():
            call = calls[place.path, place.method, place.index]
            self._refuse_rewritten(call, place.at)
            tensor = call.x if place.at == "input" else call.y
            value = call.x if place.at == "input" else call.value
            assert tensor is not None
            assert value is not None
            listener = forward.watched.get(id(tensor))
            if listener is not None and listener.tensor() is tensor:
                listener.key = number, depth
                self._expect(forward, (number, depth), tensor)
            self._see_state(forward, number, depth, value)
        for number, link in enumerate(self.links):
            self._replay_link(calls, forward, number, link)
        for number, chain in enumerate(self.chains):
            for position, link in enumerate(chain.links):
                if link.branch_path is not None:
                    branch = calls[link.branch_path, FORWARD, link.branch_index]
                    self._keep_branch(forward, number, position, branch.y)

    def _replay_link(self, calls: dict[Any, Call], forward: Forward, number: int, link: Link) -> None:
        call = next(
            c for c in calls.values() if c.site is not None and (c.path, c.index) == (link.path, link.index)
        )
        if call.closing is not None and call.closing.parts is not None:
            self._keep_parts(forward, number, call.closing.parts)
        elif link.style == "returned" and call.x is not None:
            x, site, rows = call.x.detach(), self.sites[number], forward.rows

            def seen() -> list[torch.Tensor]:
                kept = _sequences_at(x, site, rows)
                with torch.no_grad(), returned_watch(kept, site) as watch:
                    call.module.forward(kept)
                return watch.floating()

            self._see_returned(forward, number, x, call.output, seen)

    def _refuse_rewritten(self, call: Call, at: str) -> None:
        tensor = call.x if at == "input" else call.y
        if tensor is None:
            raise CaptureError(f"the state at {call.path} was not kept; name the blocks with layers=")
        copied = at == "output" and call.copy is not None
        if not copied and call.versions[0 if at == "input" else 1] != version(tensor):
            raise RewrittenError(
                f"the state at {call.path} was rewritten in place before the first forward ended, so its value is lost; "
                "call the model once more: from the second forward on states are copied as they pass"
            )

    # --- every forward: states, connections, branches, gradients ---

    def _see_input(
        self, path: str, spots: list[tuple[int, int, Place]], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._see_spots("input", path, FORWARD, spots, first_float(args, kwargs))

    def _see_output(
        self,
        path: str,
        spots: list[tuple[int, int, Place]],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        self._see_spots("output", path, FORWARD, spots, first_float(output))

    def _see_spots(
        self,
        at: str,
        path: str,
        method: str,
        spots: list[tuple[int, int, Place]],
        tensor: torch.Tensor | None,
    ) -> None:
        if self._here.paused or tensor is None:
            return
        if in_recomputation():
            self._see_recomputed(spots, tensor)
            return
        forward = self._here.forward
        if forward is None:
            return
        index = forward.turn(f"{at} {method}", path)
        for number, depth, place in spots:
            if place.index == index:
                self._see_state(forward, number, depth, tensor)
                self._listen(forward, number, depth, tensor)

    def _see_recomputed(self, spots: list[tuple[int, int, Place]], tensor: torch.Tensor) -> None:
        """In a reentrant checkpoint only the recomputed tensor has a gradient; take it where none is expected yet."""
        if len(spots) != 1 or not self.forwards:
            return
        number, depth, _ = spots[0]
        self._listen(self.forwards[-1], number, depth, tensor)

    def _see_state(self, forward: Forward, number: int, depth: int, tensor: torch.Tensor) -> None:
        forward.fired.add(("state", number, depth))
        if depth == FINAL:
            if len(forward.rows):
                forward.states[number, depth] = forward.sampled(self._final(forward, tensor.detach()))
            return
        state = self._canonical(forward, number, tensor.detach())
        mask = self._mask(forward, number, state)
        self.dtype = tensor.dtype
        if len(forward.rows):
            forward.states[number, depth] = forward.sampled(state)
        forward.chain_sums(number).see_state(depth, state, mask)

    def _listen(self, forward: Forward, number: int, depth: int, tensor: torch.Tensor) -> None:
        key = (number, depth)
        if self.settings.gradients and tensor.requires_grad and key not in forward.hooked:
            self._expect(forward, key, tensor)
            tensor.register_hook(
                Hook(partial(self._see_gradient, forward, number, depth), self.errors.append)
            )

    def _expect(self, forward: Forward, key: tuple[int, int], tensor: torch.Tensor) -> None:
        if not any(number == key[0] for number, _ in forward.hooked):
            forward.sources.append(
                tensor
            )  # the first state of a chain, up to which a backward of our own must reach
        forward.hooked.add(key)

    def _see_gradient(self, forward: Forward, number: int, depth: int, gradient: torch.Tensor) -> None:
        scale = self.settings.scale() if self.settings.scale is not None else None
        whole = gradient.detach()
        if scale is not None:
            whole = whole.float() / scale.to(whole.device)
        if depth == FINAL:
            state = self._final(forward, whole)
        else:
            state = self._canonical(forward, number, whole)
            forward.chain_sums(number).see_gradient(depth, state, forward.masks.get(number))
        if len(forward.rows):
            kept = forward.sampled(state)
            held = forward.gradients.get((number, depth))
            forward.gradients[number, depth] = kept if held is None else held + kept

    def _returns(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> MethodWatch | None:
        """A returned connection is called: its own run is watched for the weights that it keeps to itself."""
        forward, x = self._here.forward, first_float(args, kwargs)
        if forward is None or x is None or self._here.paused or in_recomputation():
            return None
        number = self._link_number(forward, path)
        if number is None:
            return None
        watch = returned_watch(x, self.sites[number])
        return Seeing(
            watch, lambda output: self._see_returned(forward, number, x.detach(), output, watch.floating)
        )

    def _opens(
        self,
        path: str,
        method: str,
        spots: list[tuple[int, int, Place]],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> MethodWatch | None:
        x = first_float(args, kwargs)
        self._see_spots("input", path, method, spots, x)
        forward = self._here.forward
        if forward is None or x is None or self._here.paused or in_recomputation():
            return None
        number = self._link_number(forward, path)
        if number is None:
            return None
        opening = Opening(self.sites[number], forward.batch_size, x.detach(), key=number)
        forward.openings.setdefault(path, []).append(opening)
        watch = opening.watch()
        return Seeing(watch, lambda result: opening.read(result, watch))

    def _closes(
        self,
        path: str,
        method: str,
        spots: list[tuple[int, int, Place]],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> MethodWatch | None:
        forward = self._here.forward
        if self._here.paused or (forward is None and not in_recomputation()):
            return None
        if in_recomputation() or forward is None or not forward.openings.get(path):
            return Seeing(
                nullcontext(),
                lambda result: self._see_spots("output", path, method, spots, first_float(result)),
            )
        opening, branch_out = forward.openings[path].pop(), _branch_output(module, args, kwargs)
        watch = opening.closing_watch(branch_out)

        def done(result: Any) -> None:
            self._see_spots("output", path, method, spots, first_float(result))
            self._keep_parts(forward, opening.key, opening.close(branch_out, result, watch))

        return Seeing(watch, done)

    def _link_number(self, forward: Forward, path: str) -> int | None:
        index = forward.turn("link", path)
        return next(
            (n for n, link in enumerate(self.links) if (link.path, link.index) == (path, index)), None
        )

    def _see_returned(
        self,
        forward: Forward,
        number: int,
        x: torch.Tensor,
        output: Any,
        seen: Callable[[], list[torch.Tensor]],
    ) -> None:
        rows = forward.rows.to(x.device)
        sampled, whole = read_returned(self.sites[number], x, output, rows, seen)
        self._keep_parts(forward, number, whole, sampled)

    def _keep_parts(self, forward: Forward, number: int, whole: Parts, sampled: Parts | None = None) -> None:
        forward.fired.add(("connection", 0, number))
        if len(forward.rows):
            rows = forward.rows.to(whole.write.device)
            forward.parts[0, number] = (whole.at(rows) if sampled is None else sampled).detached()
        if whole.mix is not None:
            forward.chain_sums(0).see_mixing(number, whole.mix, forward.masks.get(0))

    def _see_branch(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, tensor = self._here.forward, first_float(output)
        if forward is None or self._here.paused or in_recomputation() or tensor is None:
            return
        index = forward.turn("branch", path)
        for number, chain in enumerate(self.chains):
            for position, link in enumerate(chain.links):
                if (link.branch_path, link.branch_index) == (path, index):
                    self._keep_branch(forward, number, position, tensor)

    def _keep_branch(self, forward: Forward, number: int, position: int, tensor: torch.Tensor | None) -> None:
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
            tensor,
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

    # --- the end of a step ---

    def fold(self) -> list[Measured]:
        """Hand on what the whole forwards since the last fold add up to; their sampled sequences go to the reservoir.

        Returns
        -------
        list of Measured
            One for each change of the weights, mostly one.

        Raises
        ------
        CaptureError
            Where a place did not fire, or no gradient arrived; nothing of these forwards is kept.
        """
        with self._lock:
            self._absorb()
            done, self._measured = self._measured, []
            return done

    @property
    def pending(self) -> bool:
        """Whether forwards ended, or errors came, since the last fold."""
        return bool(self.forwards or self._measured or self.errors)

    def drop(self) -> None:
        """Forget the forwards since the last fold."""
        for forward in self.forwards:
            forward.let_go()
        self.forwards, self._measured = [], []
        self.errors.clear()

    def _absorb(self) -> None:
        done, self.forwards = self.forwards, []
        for forward in done:
            self._require_whole(forward)
        for forward in done:
            forward.let_go()
            self.num_forwards += 1
            self.reservoir.keep(forward.sequences(), forward.stamp)
            if not self._measured or self._measured[-1].stamp != forward.stamp:
                self._measured.append(Measured(forward.stamp, 0, []))
            self._measured[-1].add(forward)

    def _require_whole(self, forward: Forward) -> None:
        missing = [
            f"{self.chains[number].name or 'depth'} {'final' if depth == FINAL else depth}: "
            f"{place.at} of {place.path or 'the model'}"
            for number, depth, place in self.places()
            if ("state", number, depth) not in forward.fired
        ]
        missing += [
            f"connection {number}: {link.path}"
            for number, link in enumerate(self.links)
            if ("connection", 0, number) not in forward.fired
        ]
        if missing:
            raise CaptureError(
                f"{len(missing)} requested places did not fire in a forward: {', '.join(missing[:5])}. "
                "A compiled model skips hooks (capture before compiling), and a skipped layer has no state"
            )
        if self.settings.gradients and not forward.gradients and forward.rows.numel():
            raise CaptureError(
                "gradients were asked for but none arrived: call loss.backward() between the forward and step(), "
                "with gradients enabled in the forward"
            )


def _branch_output(module: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    """What the branch gave, among what the closing method of a connection takes."""
    pair = pair_of(module)
    floating = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.ndim >= 2]
    if pair is None or len(floating) <= pair.branch_argument:
        raise CaptureError(f"{type(module).__name__} closed a connection without its branch's output")
    return floating[pair.branch_argument].detach()


def _sequences_at(x: torch.Tensor, site: Site, rows: torch.Tensor) -> torch.Tensor:
    """The sampled sequences of a connection's input, in the module's own layout."""
    rows = rows.to(x.device)
    return x[:, rows] if site.layout.startswith("N B") else x[rows]
