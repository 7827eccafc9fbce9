"""Hooks on, hooks off: what one model shows of its residual states in the forwards and backwards that its user runs.

A `Session` watches the first measured forward through hooks on every module, finds the chains in it, and from then on hooks
only the places that matter. It never runs the model itself, and returns nothing from any hook. Forwards in several threads
are kept apart.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.arguments import is_decoding, named_arguments
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Attachment, in_recomputation
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.session.current_forward import Here
from depthscope.probes.session.first_forward import AxisError, Discovery, RewrittenError
from depthscope.probes.session.forward import FINAL, Forward, Measured
from depthscope.probes.session.later_forwards import Following
from depthscope.probes.session.observer import Settings, Sight
from depthscope.probes.session.reservoir import Reservoir, weights_stamp
from depthscope.probes.structure.branch_sums import find_adds
from depthscope.probes.structure.find_chains import block_paths
from depthscope.probes.structure.tape import Tape

__all__ = ["CaptureError", "RewrittenError", "Session", "Settings"]


class Session(Sight):
    """The hooks of one probe on one model, and the forwards that they saw.

    Parameters
    ----------
    model : Module
        The user's model; it is only looked at.
    settings : Settings
        What to capture.
    """

    def __init__(self, model: nn.Module, settings: Settings):
        super().__init__(model, settings)
        self.forwards: list[Forward] = []
        self.last: Forward | None = None  # the last whole forward
        self.num_forwards = 0
        self.skipped = 0  # forwards of other threads while the chains were being found
        self.reservoir = Reservoir(settings.max_sequences, settings.seed)
        self._measured: list[Measured] = []
        self._here = Here()
        self._discovery = Discovery(self, self._here)
        self._following = Following(self, self._here, lambda: self.forwards[-1] if self.forwards else None)
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
            self._following.attach(attachment)
        else:
            self._discovery.attach(attachment)
        attachment.after(self.model, self._end)

    def detach(self) -> None:
        """Take every hook off; the gradient hooks of running graphs fall silent."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        self._here.let_go()
        self._discovering = None

    # --- one forward ---

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_recomputation() or self._here.paused:
            return
        self._here.let_go()  # of a forward that an error of the user's cut short
        named = named_arguments(module, args, kwargs)
        lead = next((t for t in tensors_in((args, kwargs)) if t.ndim > 0), None)
        if lead is None:
            raise CaptureError("the model was called without a tensor; expected a batch of tensors")
        with self._lock:
            if not self.chains and self._discovering is not None:
                self.skipped += 1  # another thread's forward is finding the chains
                return
            stamp = weights_stamp(module)
            batch_size = lead.shape[self.batch_axis]
            slots = self.reservoir.choose(batch_size, stamp)
            first_index = self.reservoir.total - batch_size
            if not self.chains:
                self._discovering = threading.get_ident()
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        self._here.forward = Forward(
            batch_size=batch_size,
            stamp=stamp,
            first_index=first_index,
            slots=slots,
            arguments=named,
            decoding=is_decoding(named),
            rows=rows,
            lead_shape=tuple(lead.shape),
            row_data=lead.detach().movedim(self.batch_axis, 0)[rows].clone(),
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
                self._discovery.find(tape, forward)
            except AxisError:
                self.reservoir = Reservoir(self.settings.max_sequences, self.settings.seed)
                raise
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
        if self.settings.gradients and not forward.arrived:
            raise CaptureError(
                "gradients were asked for but none arrived: call loss.backward() between the forward and step(), "
                "with gradients enabled in the forward"
            )
