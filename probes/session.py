"""Hooks on, hooks off: what one model shows of its residual states in the forwards and backwards that its user runs.

A `Session` watches the first measured forward through hooks on every module (the tape), finds the chains in it, and from then
on hooks only the places that matter. It never runs the model itself, and returns nothing from any hook.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from probes.accumulate import Sums, merged
from probes.chain import Chain, Link, Place, block_paths, find_chains
from probes.connections import Parts, Site, read_returned, read_width
from probes.hooks import Attachment, Hook, first_float, in_recomputation, tensors_in
from probes.inputs import CaptureError, Mask, arguments, find_mask, fit_mask
from probes.layout import canonical, count_streams, infer_layout
from probes.sampling import Reservoir, Sequence, weights_stamp
from probes.tape import Tape, version


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


@dataclass
class Listener:
    """The gradient hook on one tensor of the first forward, which may turn out to be a state."""

    tensor: weakref.ref[torch.Tensor]
    key: tuple[int, int] | None = None


@dataclass
class Forward:
    """What was seen in one call of the model."""

    batch_size: int
    stamp: int
    first_index: int
    slots: dict[int, int]
    arguments: Mapping[str, Any]
    rows: torch.Tensor
    row_data: torch.Tensor | None
    masks: dict[int, torch.Tensor | None] = field(default_factory=dict)
    states: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    hooked: set[tuple[int, int]] = field(default_factory=set)
    watched: dict[int, Listener] = field(default_factory=dict)
    parts: dict[int, Parts] = field(default_factory=dict)
    branches: dict[int, torch.Tensor] = field(default_factory=dict)
    sums: list[Sums] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def turn(self, kind: str, path: str) -> int:
        """Index of this call among the calls of one module in this forward."""
        index = self.counts.get((kind, path), 0)
        self.counts[kind, path] = index + 1
        return index


@dataclass
class Measured:
    """What whole forwards with the same weights add up to."""

    stamp: int
    batch_size: int
    sums: list[Sums]

    def add(self, forward: Forward) -> None:
        """Add one more forward."""
        self.batch_size += forward.batch_size
        self.sums = merged(self.sums, forward.sums)


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
        self._measured: list[Measured] = []
        self.errors: list[Exception] = []
        self.dtype = torch.float32
        self.reservoir = Reservoir(settings.max_sequences, settings.seed)
        self._named_streams = 1
        self._open: Forward | None = None
        self._tape: Tape | None = None
        self._paused = False
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
        self._open = self._tape = None

    def _attach_tape(self, attachment: Attachment) -> None:
        for path, module in self.model.named_modules():
            attachment.before(module, partial(self._tape_enter, path))
            attachment.after(module, self._tape_leave)

    def _attach_places(self, attachment: Attachment) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        inputs: dict[str, list[tuple[int, int, Place]]] = {}
        outputs: dict[str, list[tuple[int, int, Place]]] = {}
        for number, chain in enumerate(self.chains):
            for depth, place in enumerate(chain.places):
                side = inputs if place.at == "input" else outputs
                side.setdefault(place.path, []).append((number, depth, place))
        for path, places in inputs.items():
            attachment.before(modules[path], partial(self._see_input, path, places))
        links = {
            path: module for path, module in modules.items() if path in {link.path for link in self.links}
        }
        for path, module in links.items():
            attachment.after(module, partial(self._see_link, path))
        for path in {link.branch_path for link in self.links if link.branch_path}:
            attachment.after(modules[path], partial(self._see_branch, path))
        for path, places in outputs.items():
            attachment.after(modules[path], partial(self._see_output, path, places))

    @property
    def links(self) -> tuple[Link, ...]:
        """The stream connections of the (only) chain that has them."""
        return self.chains[0].links if self.chains else ()

    @property
    def num_streams(self) -> int:
        """Number of residual streams n; 1 for a plain residual model."""
        return self.sites[0].num_streams if self.sites else self._named_streams

    @property
    def family(self) -> str:
        """The connection family: residual, hc, mhc or independent_hc."""
        if not self.sites:
            return "residual" if self.num_streams == 1 else "unknown"
        if not any(site.mixes for site in self.sites.values()):
            return "independent_hc"
        return "mhc" if all(site.constrained for site in self.sites.values()) else "hc"

    # --- one forward ---

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_recomputation() or self._paused:
            return
        named = arguments(module, args, kwargs)
        lead = next((t for t in tensors_in((args, kwargs)) if t.ndim > 0), None)
        if lead is None:
            raise CaptureError("the model was called without a tensor; expected a batch of tensors")
        stamp = weights_stamp(module)
        slots = self.reservoir.choose(lead.shape[0], stamp)
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        self._open = Forward(
            batch_size=lead.shape[0],
            stamp=stamp,
            first_index=self.reservoir.total - lead.shape[0],
            slots=slots,
            arguments=named,
            rows=rows,
            row_data=lead.detach()[rows].clone(),
        )
        layers = self.settings.layers
        self._tape = None if self.chains else Tape(keep=block_paths(module, layers) if layers else ())

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, self._open = self._open, None
        tape, self._tape = self._tape, None
        if forward is None or in_recomputation():
            return
        if tape is not None:
            self._open = forward
            try:
                self._discover(tape, forward)
            finally:
                self._open = None
                self.attach()
        for sums in forward.sums:
            sums.end_forward()
        forward.watched.clear()
        forward.arguments = {}  # the batch must not outlive the forward
        self.forwards.append(forward)
        self.last = forward
        if not self.settings.gradients:
            self._absorb()  # nothing more will come, so a loop without steps holds no more than one forward

    # --- the first forward: everything is looked at, then the chains are found in it ---

    def _tape_enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._tape is None or self._paused or in_recomputation():
            return
        call = self._tape.enter(path, module, args, kwargs)
        self._watch_gradient(call.x)

    def _tape_leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._tape is None or self._paused or in_recomputation():
            return
        call = self._tape.leave(module, output)
        self._watch_gradient(call.y)

    def _watch_gradient(self, tensor: torch.Tensor | None) -> None:
        """In the first forward every tensor may turn out to be a state, so every gradient is listened to."""
        forward = self._open
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
        self.sites = {
            number: calls[link.path, link.index].site  # type: ignore[misc]
            for number, link in enumerate(chains[0].links)
        }
        self.layouts = [self._layout(chain, forward.batch_size) for chain in chains]
        if not self.sites:
            self._named_streams = self.settings.streams or count_streams(
                chains[0].shapes[0], self.layouts[0], forward.batch_size
            )
        self.chains = chains
        self._paused = True
        try:
            self._replay(calls, forward)
        except RewrittenError:
            raise  # the chains are right: from the next forward on states are copied as they pass
        except Exception:
            self.chains = []
            raise
        finally:
            self._paused = False

    def _layout(self, chain: Chain, batch_size: int) -> str:
        if self.settings.layout is not None:
            return self.settings.layout
        if chain.links:
            return self.sites[0].layout
        return infer_layout(chain.shapes[0], batch_size=batch_size, channels_first=chain.channels_first)

    def _replay(self, calls: dict[tuple[str, int], Any], forward: Forward) -> None:
        """Feed what the tape kept to the same functions that later forwards feed from their hooks."""
        for number, chain in enumerate(self.chains):
            for depth, place in enumerate(chain.places):
                call = calls[place.path, place.index]
                tensor = call.x if place.at == "input" else call.y
                self._refuse_rewritten(call, tensor, 0 if place.at == "input" else 1)
                key = (number, depth)
                listener = forward.watched.get(id(tensor))
                if listener is not None and listener.tensor() is tensor:
                    listener.key = key
                    self._expect(forward, key, tensor)
                self._see_state(forward, number, depth, tensor)
        for number, link in enumerate(self.links):
            call = calls[link.path, link.index]
            self._see_parts(forward, number, call.module, call.x, call.output)
            if link.branch_path is not None:
                self._keep_branch(forward, number, calls[link.branch_path, link.branch_index].y)

    def _refuse_rewritten(self, call: Any, tensor: torch.Tensor | None, side: int) -> None:
        if tensor is None:
            raise CaptureError(f"the state at {call.path} was not kept; name the blocks with layers=")
        if call.versions[side] != version(tensor):
            raise RewrittenError(
                f"the state at {call.path} was rewritten in place before the first forward ended, so its value is lost; "
                "call the model once more: from the second forward on states are copied as they pass"
            )

    # --- every forward: states, connections, branches, gradients ---

    def _see_input(
        self, path: str, places: list[tuple[int, int, Place]], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._see_place("input", path, places, first_float(args, kwargs))

    def _see_output(
        self,
        path: str,
        places: list[tuple[int, int, Place]],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        self._see_place("output", path, places, first_float(output))

    def _see_place(
        self, at: str, path: str, places: list[tuple[int, int, Place]], tensor: torch.Tensor | None
    ) -> None:
        if self._paused or tensor is None:
            return
        if in_recomputation():
            self._see_recomputed(places, tensor)
            return
        forward = self._open
        if forward is None:
            return
        index = forward.turn(at, path)
        for number, depth, place in places:
            if place.index == index:
                self._see_state(forward, number, depth, tensor)
                self._listen(forward, number, depth, tensor)

    def _see_recomputed(self, places: list[tuple[int, int, Place]], tensor: torch.Tensor) -> None:
        """In a reentrant checkpoint only the recomputed tensor has a gradient; take it where none is expected yet."""
        if len(places) != 1 or not self.forwards:
            return
        number, depth, _ = places[0]
        self._listen(self.forwards[-1], number, depth, tensor)

    def _see_state(self, forward: Forward, number: int, depth: int, tensor: torch.Tensor) -> None:
        state = self._canonical(forward, number, tensor.detach())
        mask = self._mask(forward, number, state)
        self.dtype = tensor.dtype
        if len(forward.rows):
            forward.states[number, depth] = state[forward.rows.to(state.device)].float()
        self._sums(forward, number).see_state(depth, state, mask)

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
        state = self._canonical(forward, number, gradient.detach())
        self._sums(forward, number).see_gradient(depth, state, forward.masks.get(number))
        if len(forward.rows):
            kept = state[forward.rows.to(state.device)].float()
            held = forward.gradients.get((number, depth))
            forward.gradients[number, depth] = kept if held is None else held + kept

    def _see_link(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward = self._open
        if forward is None or self._paused or in_recomputation():
            return
        index = forward.turn("link", path)
        for number, link in enumerate(self.links):
            if (link.path, link.index) == (path, index):
                self._paused = True
                try:
                    self._see_parts(forward, number, module, first_float(args, kwargs), output)
                finally:
                    self._paused = False

    def _see_parts(self, forward: Forward, number: int, module: nn.Module, x: Any, output: Any) -> None:
        rows = forward.rows.to(x.device)
        site = self.sites[number]
        if site.style == "returned":
            sampled, whole = read_returned(module, x.detach(), output, rows)
        else:
            whole = read_width(module, x.detach(), site.num_streams)
            sampled = whole.at(rows)
        if len(rows):
            forward.parts[number] = sampled.detached()
        if whole.mix is not None:
            self._sums(forward, 0).see_mixing(number, whole.mix, forward.masks.get(0))

    def _see_branch(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward = self._open
        tensor = first_float(output)
        if forward is None or self._paused or in_recomputation() or tensor is None:
            return
        index = forward.turn("branch", path)
        for number, link in enumerate(self.links):
            if (link.branch_path, link.branch_index) == (path, index):
                self._keep_branch(forward, number, tensor)

    def _keep_branch(self, forward: Forward, number: int, tensor: torch.Tensor | None) -> None:
        if tensor is not None and len(forward.rows):
            forward.branches[number] = tensor.detach()[forward.rows.to(tensor.device)].float()

    # --- shapes and masks ---

    def _canonical(self, forward: Forward, number: int, tensor: torch.Tensor) -> torch.Tensor:
        return canonical(
            tensor, self.layouts[number], batch_size=forward.batch_size, num_streams=self.num_streams
        )

    def _sums(self, forward: Forward, number: int) -> Sums:
        while len(forward.sums) <= number:
            forward.sums.append(Sums())
        return forward.sums[number]

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
        self._absorb()
        done, self._measured = self._measured, []
        return done

    @property
    def pending(self) -> bool:
        """Whether forwards ended, or errors came, since the last fold."""
        return bool(self.forwards or self._measured or self.errors)

    def drop(self) -> None:
        """Forget the forwards since the last fold."""
        self.forwards, self._measured = [], []
        self.errors.clear()

    def _absorb(self) -> None:
        done, self.forwards = self.forwards, []
        for forward in done:
            self._require_whole(forward)
        for forward in done:
            forward.sources.clear()
            self.reservoir.keep(sequences_of(forward), forward.stamp)
            if not self._measured or self._measured[-1].stamp != forward.stamp:
                self._measured.append(Measured(forward.stamp, 0, []))
            self._measured[-1].add(forward)

    def _require_whole(self, forward: Forward) -> None:
        seen = [set(sums.sums.get("token_count", {})) for sums in forward.sums]
        missing = [
            f"{chain.name or 'depth'} {depth}: {place.at} of {place.path or 'the model'}"
            for number, chain in enumerate(self.chains)
            for depth, place in enumerate(chain.places)
            if number >= len(seen) or depth not in seen[number]
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


def sequences_of(forward: Forward) -> list[tuple[int, Sequence]]:
    """The sampled sequences of one forward, on the CPU, with their slots.

    Parameters
    ----------
    forward : Forward
        A forward that ended well.

    Returns
    -------
    list of (int, Sequence)
    """
    kept = []
    for position, row in enumerate(forward.rows.tolist()):
        masks = {number: mask[row].cpu() for number, mask in forward.masks.items() if mask is not None}
        sequence = Sequence(
            index=forward.first_index + row,
            mask=masks,
            states=_pick(forward.states, position),
            gradients=_pick(forward.gradients, position),
            parts={key: parts.at(position).detached() for key, parts in forward.parts.items()},
            branches=_pick(forward.branches, position),
            row=None if forward.row_data is None else forward.row_data[position].cpu().clone(),
        )
        kept.append((forward.slots[row], sequence))
    return kept


def _pick(tensors: Mapping[Any, torch.Tensor], position: int) -> dict[Any, torch.Tensor]:
    return {key: tensor[position].cpu().clone() for key, tensor in tensors.items()}
