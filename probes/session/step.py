"""Which forwards of a step count, and what they add up to."""

from __future__ import annotations

import torch
from torch import nn

from depthscope.diagnostics.schema import SUMS_OF_COEFFICIENTS
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import CompilerLog, in_reentrant_checkpoint
from depthscope.probes.model.user_modes import user_wants_graph
from depthscope.probes.session.backward_roots import StepLoss
from depthscope.probes.session.compiled_model import compiler_is_loaded
from depthscope.probes.session.forward import Forward, Measured
from depthscope.probes.session.options import Options
from depthscope.probes.session.reservoir import Reservoir, training_stamp, weights_stamp

DIGESTED = 2**20  # numbers of a batch that its digest is of
TRAINING = 2  # a call in training mode with a graph; 1 is one with a graph, 0 any other


class Step:
    """The forwards of the present step that count, and the sample of all steps.

    ``only_own``: whether only calls of ours are recorded, all of which count.
    """

    def __init__(self, options: Options, loss: StepLoss, *, only_own: bool):
        self.options, self.loss, self._only_own = options, loss, only_own
        self.forwards: list[Forward] = []  # that ended since the last fold
        self.last: Forward | None = None
        self.num_forwards = 0  # of all steps
        self.num_left_out = 0  # evaluations within steps of training
        self.gradients_undefined = False  # of forwards since the last fold but one
        # Whether a backward ran in the last fold's forwards, and no state had a graph.
        self.without_gradients = False
        # Whether a forward whose connections cannot be read counts without them, and why some of the last fold's did.
        self.keeps_rest, self.without_connections = not only_own, ""
        self._measured: list[Measured] = []
        self._num_measured = 0  # of the forwards that `_measured` adds up
        self.draw_anew()
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.loss.clear()
        self.digest: torch.Tensor | None = None  # of the batches, where it is kept
        self._kind = 0  # of the calls that count
        self._num_without_graph = 0  # calls that can have no gradient
        self._compiler_met = CompilerLog.met  # how often torch's compiler had met our hooks by now

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

    def stamp(self, model: nn.Module) -> int:
        """The stamp of forwards with the present weights.

        Sums and samples of an evaluation and of a training with the same weights do not mix, also in different steps.
        """
        stamp = weights_stamp(model)
        return training_stamp(stamp) if self.trains else stamp

    def may_have_gradients(self) -> bool:
        """Whether a call that begins can have gradients, where these are wanted: a validation under ``no_grad`` has none.

        It is no forward of the training that the step measures, so it counts nowhere.
        """
        if not self.options.gradients or user_wants_graph() or in_reentrant_checkpoint():
            return True
        self._num_without_graph += 1
        return False

    def includes(self, model: nn.Module) -> bool:
        """Whether a call that begins is one of those that the step measures: evaluations do not mix with training.

        Of the calls of a step count those that come closest to training: in training mode with a graph, else with a graph,
        else all. So a loop that only evaluates is measured, and an evaluation within a step of training is not.
        """
        if self._only_own:
            return True
        has_graph = user_wants_graph() or in_reentrant_checkpoint()
        kind = has_graph + (has_graph and model.training)
        if kind < self._kind:
            self.num_left_out += 1
            return False
        if kind > self._kind:
            self._kind = kind
            if seen := len(self.forwards) + self._num_measured:  # which turn out to be evaluations
                self.num_left_out += seen
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
        self.forwards, self._measured, self._num_measured = [], [], 0

    def fold(self) -> list[Measured]:
        """What the forwards since the last fold add up to; their sampled sequences go to the reservoir.

        Returns: One for each change of the weights, mostly one.
        Raises CaptureError: Where no gradient arrived, or nothing was called; none of these forwards counts then.
        """
        self.without_gradients = False
        self.gradients_undefined = any(forward.gradients_undefined for forward in self.forwards)
        self._absorb()
        done, self._measured, self._num_measured = self._measured, [], 0
        self.without_connections = next(filter(None, (each.without_connections for each in done)), "")
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
        if self._compiler_met != CompilerLog.met:
            return (
                "the model was only called inside of code that was compiled, traced or exported as a whole; record the module "
                "that torch.compile returned, or compile the model and not the function around it"
            )
        if self._only_own:
            return (
                "no forward of the model was seen: the batch is empty, or the model is not called through Module.__call__, "
                "which runs the hooks; nothing to measure"
            )
        hint = ", or only inside of compiled code" if compiler_is_loaded() else ""
        return f"the model was not called between two steps, or with empty batches only{hint}; nothing to measure"

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
            self._num_measured += 1
            if not forward.without_connections:
                self.reservoir.store(forward.sequences(), forward.stamp)
            if not self._measured or self._measured[-1].stamp != forward.stamp:
                self._measured.append(Measured(forward.stamp, 0, []))
            self._measured[-1].add(forward)

    def _with_gradients(self, done: list[Forward]) -> list[Forward]:
        """The forwards that a backward followed, where there is one: others of the step were looked at and not trained on."""
        if not self.options.gradients or self._only_own:
            return done
        trained = [forward for forward in done if forward.arrivals]
        # The sample was drawn from all of them: where it has none of those with gradients, the step is not measured.
        if not any(forward.slots for forward in trained):
            return done
        self.num_left_out += len(done) - len(trained)
        return trained

    def _require_gradients(self, forward: Forward) -> None:
        if not self.options.gradients:
            return
        if not forward.arrivals:
            if not self._only_own and not forward.expected_gradients and self.loss.backwards:
                self.without_gradients = True
                return
            if self._only_own:
                raise CaptureError(
                    "no gradient of the loss arrives at any state: the graph is cut between the last block and the loss; look "
                    "for a detach, a no_grad or an argmax there"
                )
            raise CaptureError(
                "gradients were asked for but none arrived: call loss.backward() between the forward and step(), "
                "with gradients enabled in the forward"
            )
