"""Which forwards of a step count, what they add up to, which sequences are stored raw, and what the loss is."""

from __future__ import annotations

import gc
import hashlib
import heapq
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from depthscope.diagnostics.schema import SUMS_OF_COEFFICIENTS
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import Hook, Report, in_reentrant_checkpoint, running_frames
from depthscope.probes.model.loss_graph import compared_by_gradient, read_task, squares_by_gradient
from depthscope.probes.model.modules import all_parameters
from depthscope.probes.model.preserved_state import COMPILER
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.model.user_modes import user_wants_graph
from depthscope.probes.session.forward import Edge, Forward, Measured, Sequence, Stamp, own_calls
from depthscope.probes.session.options import Options, Scope

DIGESTED = 2**20  # numbers of a batch that its digest is of
TRAINING = 2  # a call in training mode with a graph; 1 is one with a graph, 0 any other
RUN_BACKWARD = torch.autograd.graph._engine_run_backward.__code__


class Step:
    """The forwards of the present step that count, and the sample of all steps."""

    def __init__(self, options: Options, scope: Scope, loss: StepLoss):
        self.options, self.scope, self.loss = options, scope, loss
        self.forwards: list[Forward] = []  # that ended since the last fold
        self.last: Forward | None = None
        self.num_forwards = 0  # of all steps
        self.num_left_out = 0  # evaluations within steps of training
        # Whether a forward whose connections cannot be read counts without them.
        self.keeps_rest = not scope.only_own
        self._measured: list[Measured] = []
        self.draw_anew()
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.loss.clear()
        self.digest: torch.Tensor | None = None  # of the batches, where it is kept
        self.gradients_undefined = False  # of a forward
        self.without_gradients = False  # whether a backward ran, and no state had a graph
        self.without_connections = ""  # why some forwards count without them
        self._kind = 0  # of the calls that count
        self._num_without_graph = 0  # calls that can have no gradient

    def draw_anew(self) -> None:
        """Begin another sample."""
        self.reservoir = Reservoir(self.options.max_sequences, self.options.seed, self.options.first_sequence)

    @property
    def trains(self) -> bool:
        """Whether the forwards that count are those of a training."""
        return self._kind == TRAINING

    @property
    def is_empty(self) -> bool:
        """Whether no forward has ended since the last fold."""
        return not (self.forwards or self._measured)

    def counts(self, model: nn.Module) -> bool:
        """Whether a call that begins is one of those that the step measures.

        Where gradients are wanted, one that has none is not, such as a validation under ``no_grad``. Evaluations do not mix
        with training: of the calls of a step count those that come closest to training: in training mode with a graph, else
        with a graph, else all. So a loop that only evaluates is measured, and an evaluation within a step of training is not.
        """
        if self.scope.only_own and not self.options.gradients:
            return True
        has_graph = user_wants_graph() or in_reentrant_checkpoint()
        if self.options.gradients and not has_graph:
            self._num_without_graph += 1
            return False
        if self.scope.only_own:
            return True
        kind = has_graph + (has_graph and model.training)
        if kind < self._kind:
            self.num_left_out += 1
            return False
        if kind > self._kind:
            self._kind = kind
            if not self.is_empty:  # which turn out to be evaluations
                self.num_left_out += len(self.forwards) + sum(of.num_forwards for of in self._measured)
                self.drop()
                self.reservoir.forget()
        return True

    def note_batch(self, lead: torch.Tensor) -> None:
        """Add what a call was made with to the digest of the step: a whole number below 2⁵² that other data hardly share."""
        numbers = lead.detach().flatten()[:DIGESTED]
        numbers = numbers.float().view(torch.int32) if lead.is_floating_point() else numbers
        weights = torch.arange(1, len(numbers) + 1, device=lead.device) * 2654435761 % 2147483647
        found = ((numbers.long() + 1) * weights % 2147483647).sum() + lead.numel()
        before = torch.zeros_like(found) if self.digest is None else self.digest
        self.digest = (before * 31 + found) % 2**52

    def add(self, forward: Forward) -> None:
        """Add a forward that has ended."""
        self.forwards.append(forward)
        self.last = forward
        if not self.options.gradients:
            self._absorb()  # no backward will add to it, so a loop that never steps stores one forward at most

    def drop(self) -> None:
        """Forget the forwards since the last fold."""
        for forward in self.forwards:
            forward.release()
        self.forwards, self._measured, self.without_connections = [], [], ""

    def fold(self) -> list[Measured]:
        """What the forwards since the last fold add up to; their sampled sequences go to the reservoir.

        Returns: One for each change of the weights, mostly one.
        Raises CaptureError: Where no gradient arrived, or nothing was called; none of these forwards counts then.
        """
        self._absorb()
        done, self._measured = self._measured, []
        for chain in (of for each in done for of in each.sums) if self.without_connections else ():
            # Other forwards of it show connections: no mean over the step's tokens is known.
            chain.forget("gain_sum", "gain_max", *SUMS_OF_COEFFICIENTS)
            if chain.live is not None:
                chain.live.forget_connections()
        if self.without_connections and not self.reservoir.stored:
            raise CaptureError(self.without_connections)
        self.loss.clear()
        if not done:
            raise CaptureError(self._why_nothing())
        return done

    def _why_nothing(self) -> str:
        if self._num_without_graph:
            return (
                "gradients were asked for but none arrived: every forward of the step ran without a graph, as under "
                "torch.no_grad(); such forwards count to no step that measures gradients"
            )
        if self.scope.only_own:
            return (
                "no forward of the model was seen: the batch is empty, or the model is not called through Module.__call__, "
                "which runs the hooks; nothing to measure"
            )
        nothing = "the model was not called between two steps, or with empty batches only"
        if COMPILER not in sys.modules:
            return f"{nothing}; nothing to measure"
        return (
            f"{nothing}, or only inside of code that was compiled, traced or exported as a whole: record the module that "
            "torch.compile returned, or compile the model and not the function around it"
        )

    def _absorb(self) -> None:
        done, self.forwards = self.forwards, []
        counted = self._with_gradients(done)
        try:
            for forward in counted:  # all are checked before any is counted
                self._require_gradients(forward)
        finally:
            for forward in done:
                forward.release()
        for forward in counted:
            self.num_forwards += 1
            self.gradients_undefined |= forward.gradients_undefined
            self.without_connections = self.without_connections or forward.without_connections
            if not forward.without_connections:
                self.reservoir.store(forward.sequences(), forward.stamp)
            if not self._measured or self._measured[-1].stamp != forward.stamp:
                self._measured.append(Measured(forward.stamp))
            self._measured[-1].add(forward)

    def _with_gradients(self, done: list[Forward]) -> list[Forward]:
        """The forwards that a backward followed, where there is one: others of the step were looked at and not trained on."""
        if not self.options.gradients or self.scope.only_own:
            return done
        trained = [forward for forward in done if forward.arrivals]
        # The sample was drawn from all of them: where it has none of those with gradients, the step is not measured.
        if not any(forward.slots for forward in trained):
            return done
        self.num_left_out += len(done) - len(trained)
        return trained

    def _require_gradients(self, forward: Forward) -> None:
        if not self.options.gradients or forward.arrivals:
            return
        if self.scope.only_own:
            raise CaptureError(
                "no gradient of the loss arrives at any state: the graph is cut between the last block and the loss; look "
                "for a detach, a no_grad or an argmax there"
            )
        if forward.expected_gradients or not self.loss.backwards:
            raise CaptureError(
                "gradients were asked for but none arrived: call loss.backward() between the forward and step(), "
                "with gradients enabled in the forward"
            )
        self.without_gradients = True


# --- the sample ---


@dataclass
class Reservoir:
    """A uniform sample of sequences, restarted when the weights change: those with the lowest `rank_in_sample`.

    The rank of a sequence depends on the seed and on its number alone, so that processes that each see a part of the data draw
    what one process would draw of all: the lowest ranks of their samples together (a bottom-k sample, Cohen and Kaplan,
    doi:10.1145/1281100.1281133).

    Choosing and storing are two steps: rows are chosen when a forward begins, and its sequences replace stored ones only when
    it has ended well. Hence two stamps of the weights: those of the sequences chosen from, and those of the stored ones.
    """

    size: int  # number of stored sequences at most
    seed: int  # seed of the ranks; torch's and Python's global random states are not touched
    first: int = 0  # number of the first sequence
    seen: int = 0
    total: int = 0
    stamp: Stamp | None = None
    stored_stamp: Stamp | None = None
    stored: dict[int, Sequence] = field(default_factory=dict)  # by slot
    # A heap of (−rank, slot) of the chosen sequences: the one that is replaced next comes first.
    _chosen: list[tuple[int, int]] = field(init=False, default_factory=list)

    def choose(self, batch_size: int, stamp: Stamp) -> dict[int, int]:
        """Choose the rows of a batch that are stored.

        ``stamp``: another one than before restarts the sample, with the same seed.
        """
        if stamp != self.stamp:
            self.stamp, self.seen, self._chosen = stamp, 0, []
        chosen: dict[int, int] = {}
        for row in range(batch_size):
            rank = rank_in_sample(self.seed, self.first + self.seen)
            self.seen += 1
            if len(self._chosen) < self.size:
                chosen[row] = len(self._chosen)
                heapq.heappush(self._chosen, (-rank, chosen[row]))
            elif rank < -self._chosen[0][0]:
                slot = self._chosen[0][1]
                heapq.heapreplace(self._chosen, (-rank, slot))
                # A later row of the same batch may take the slot of an earlier one.
                chosen = {other: taken for other, taken in chosen.items() if taken != slot}
                chosen[row] = slot
        self.total += batch_size
        return chosen

    def new_forward(
        self, lead: torch.Tensor, batch_axis: int, stamp: Stamp, arguments: Mapping[str, Any]
    ) -> Forward:
        """A forward that begins, with the sequences of its batch that are sampled."""
        batch_size = lead.shape[batch_axis]
        slots = self.choose(batch_size, stamp)
        rows = torch.tensor(sorted(slots), dtype=torch.long, device=lead.device)
        row_data = lead.detach().movedim(batch_axis, 0)[rows].clone()
        first_index = self.first + self.total - batch_size
        return Forward(batch_size, stamp, first_index, slots, arguments, rows, row_data)

    def forget(self) -> None:
        """Drop what was stored of the present weights, and draw anew: it was of forwards that do not count."""
        if self.stored_stamp == self.stamp:
            self.stored, self.stored_stamp = {}, None
        self.stamp = None

    def in_order(self) -> list[Sequence]:
        """The stored sequences in the order of the data; slots are in none."""
        return sorted(self.stored.values(), key=lambda sequence: sequence.index)

    def store(self, sequences: Iterable[tuple[int, Sequence]], stamp: Stamp) -> None:
        """Put complete sequences into their slots; those of earlier weights are dropped."""
        if stamp != self.stored_stamp:
            self.stored, self.stored_stamp = {}, stamp
        self.stored.update(sequences)


def rank_in_sample(seed: int, number: int) -> int:
    """A 64-bit number, independent of those of other sequences and seeds: the lowest ones are in the sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")


def weights_stamp(model: nn.Module) -> int:
    """A number that changes when an optimizer or a loader writes the weights, or other ones take their place.

    Returns: A hash of the parameters' identities, addresses and version counters, which torch increments at every write
    in place. Reading them costs no synchronisation with the device. A write through ``.data`` in place is not seen.
    """
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return hash(tuple(_weight_stamp(p, sharded) for p in all_parameters(model)))


def _weight_stamp(parameter: nn.Parameter, sharded: bool) -> tuple[int, int, int]:
    # Lazy parameters have a type of their own; those made in inference mode count no versions.
    plain = type(parameter) is nn.Parameter
    lazy = not plain and isinstance(parameter, nn.parameter.UninitializedTensorMixin)
    written = 0 if lazy or parameter.is_inference() else parameter._version
    if not plain or "_fsdp_flattened" in vars(parameter):
        return 0, written, 0  # FSDP makes these anew
    # FSDP gathers a parameter at another address in every forward.
    return id(parameter), written, 0 if sharded or parameter.is_meta else parameter.data_ptr()


# --- the loss ---


def running_backward() -> list[Edge] | None:
    """The roots of the backward that runs this hook, as edges; None where they cannot be found."""
    frame = _running_frame()
    if frame is None:
        return None
    roots = frame.f_locals.get("t_outputs", ())
    return [(r.grad_fn, r.output_nr) if isinstance(r, torch.Tensor) else tuple(r) for r in roots]


def _running_frame() -> FrameType | None:
    """The call that runs this hook.

    torch does not tell it, but the function that runs the engine waits for it with the roots among its variables: in this
    thread, or for tensors on another device in the one that called it.
    """
    threads = sys._getframe(), *sys._current_frames().values()
    frames = (frame for innermost in threads for frame in running_frames(innermost))
    return next((frame for frame in frames if frame.f_code is RUN_BACKWARD), None)


def living_scalers() -> list[torch.amp.GradScaler]:
    """All scalers of the process that scale a loss."""
    # By their type: isinstance asks the objects themselves, some of which answer with a warning.
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
    return [scaler for scaler in found if scaler.is_enabled()]


class StepLoss:
    """The loss of a step, where the user does not give it: the sum of the scalars whose backward reached the model.

    Of micro-batches each loss is that share of the step's which the loop calls the backward on.

    ``loss_scale``: gives the factor by which losses are multiplied at present; None where no scaler is known.
    ``report``: called with every exception of ours.
    """

    def __init__(self, loss_scale: Callable[[], torch.Tensor | None] | None, report: Report) -> None:
        self._loss_scale, self.report = loss_scale, report
        self._handles: list[RemovableHandle] = []
        self._roots: list[torch.Tensor] = []
        self.backwards: set[int] = set()  # that have reached what the model returned
        self._is_scalar = True  # whether every backward began at one number
        self._is_product = False  # whether one began at a product, as of a loss and its scale
        self._is_scaled: bool | None = None  # by a scaler that nobody named
        self.task: dict[str, Any] = {}  # what the loss is of, as its graph says

    def scale(self) -> torch.Tensor | None:
        """By which factor the loss, and so every gradient, is multiplied at present; None for 1."""
        return None if self._loss_scale is None else self._loss_scale()

    def listen(self, output: Any) -> None:
        """Put hooks on what a call of the model returned; they leave at the end of the step."""
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None and own_calls.owner is None:
                hook = Hook(partial(self._note, tensor.detach()), self.report)
                self._handles.append(tensor.register_hook(hook))

    def _note(self, given: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Note the roots of the backward that runs: once, however many outputs it reaches."""
        frame, backward = _running_frame(), torch._C._current_graph_task_id()
        if frame is None or backward in self.backwards or not frame.f_locals["kwargs"].get("accumulate_grad"):
            return  # `torch.autograd.grad` computes a part of a loss, such as a penalty
        self.backwards.add(backward)
        scale = self.scale()
        for root in frame.f_locals["t_outputs"]:
            if not isinstance(root, torch.Tensor) or root.numel() != 1:
                # Such as a stage of a pipeline, which gets its gradient from the next one.
                self._is_scalar = False
                return
            self._is_product |= root.grad_fn is not None and root.grad_fn.name() == "MulBackward0"
            self.task = self.task or read_task(root, None)
            value = root.detach().float().reshape(())
            self._roots.append(value.clone() if scale is None else value / scale.to(value.device))
        # The graph of a loss that the loop computes is gone when the gradient reaches the output.
        if len(self._roots) != 1 or "constant" in self.task or gradient is None:
            return
        unscaled = gradient if scale is None else gradient / scale.to(gradient.device)
        self.task |= (
            compared_by_gradient(unscaled, self.task["classes"], float(self._roots[0]))
            if "classes" in self.task
            else squares_by_gradient(root, given, unscaled)
        )

    def value(self) -> float | None:
        """Of the present step; None where no backward reached the model, or by what its loss was scaled is not known."""
        if not self._roots or not self._is_scalar:
            return None
        if self._loss_scale is None and self._is_product:
            # Once: it takes some milliseconds for every 100 000 objects of the program.
            if self._is_scaled is None:
                self._is_scaled = bool(living_scalers())
            if self._is_scaled:
                return None
        return float(torch.stack([root.cpu() for root in self._roots]).sum())

    def clear(self) -> None:
        """Begin the next step."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._roots = [], []
        self._is_scalar, self._is_product = True, False
        self.task = {}
        self.backwards.clear()
