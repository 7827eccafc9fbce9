"""How much of the gradient of H_res reaches its logits in a measured step, and how far apart are these? Sums over its tokens.

In the user's own loop: the operations of a connection are recorded, the logits are found among their values once
(`depthscope.probes.connections.logits`), and their place is remembered. Hooks on the gradients leave with the forward.
Shapes: B batch, T token, n streams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from depthscope.probes.connections.logits import (
    NO_GRAPH,
    NOT_SEEN,
    SAME,
    FoundLogits,
    find_logits,
    is_same_matrix,
)
from depthscope.probes.connections.proof import spread
from depthscope.probes.model.hooks import Hook, Report
from depthscope.probes.model.tensors import version
from depthscope.probes.reading.graph import Graph, TracedValue, ValuePlace
from depthscope.probes.session.forward import Forward
from depthscope.probes.statistics.weight_updates import unreadable
from depthscope.probes.structure.model_structure import Structure

GRADIENT_SUMS = LOGIT_GRADIENT, MIXING_GRADIENT = ("logit_gradient_square_sum", "mixing_gradient_square_sum")
LOGIT_SUMS = ("logit_token_count", "logit_range_sum", *GRADIENT_SUMS)
"""Names of the sums, by connection; ``logit_range_max`` is a maximum."""

FIRST = "no forward after the first measured one has shown them yet"


@dataclass(frozen=True)
class _Place:
    """Where the logits and the matrix of a connection are computed."""

    logits: ValuePlace
    matrix: ValuePlace
    steps: int  # from one to the other: as many again, and the same code has run
    reading: int  # of `as_matrices`

    @classmethod
    def of(cls, graph: Graph, found: FoundLogits) -> _Place:
        logits, matrix = found.logits, found.matrix
        return cls(graph.place(logits), graph.place(matrix), matrix.number - logits.number, found.reading)

    def found_again(self, seen: ComputedValues) -> FoundLogits | None:
        """The same in another forward; None where other operations ran."""
        logits, matrix = (seen.graph.at(place) for place in (self.logits, self.matrix))
        if logits is None or matrix is None or not (seen.has(logits) and seen.has(matrix)):
            return None
        same = matrix.number - logits.number == self.steps
        return FoundLogits(logits, matrix, self.reading) if same else None


class LogitStatistics:
    """The logits of the connections of one model, forward by forward.

    ``gradients``: whether gradients are wanted.
    ``report``: called with every exception that a gradient hook raises.
    ``loss_scale``: gives the factor by which the loss is multiplied at present; None for 1.
    ``reasons``: why the logits of a connection are not known.
    ``seen``: in how many calls they were seen.
    """

    def __init__(
        self,
        gradients: bool,
        report: Report,
        loss_scale: Callable[[], torch.Tensor | None] | None,
    ):
        self._gradients, self._report, self._loss_scale = gradients, report, loss_scale
        self._places: dict[int, _Place] = {}
        self.reasons: dict[int, str] = {}
        self.seen: Counter[int] = Counter()
        # Of one matrix that all tokens share: the squares of its gradients do not add up over processes.
        self.of_all_tokens: set[tuple[str, int]] = set()  # names of sums, and connections

    def looks_for(self, number: int) -> bool:
        """Whether the logits of a connection are known, or may still be found."""
        return self.reasons.get(number, NO_GRAPH) == NO_GRAPH

    def known_values(self, graph: Graph, numbers: Iterable[int]) -> set[int] | None:
        """The values of a graph by which connections are recorded; None where the logits of one may still be found."""
        wanted = [number for number in numbers if self.looks_for(number)]
        places = [self._places.get(number) for number in wanted]
        values = [
            graph.at(at) for place in places if place is not None for at in (place.logits, place.matrix)
        ]
        found = {value.number for value in values if value is not None}
        return None if None in places or None in values else found

    def record(
        self,
        forward: Forward,
        number: int,
        mix_BTnn: torch.Tensor | None,
        seen: ComputedValues,
        within: range,
    ) -> None:
        """Add the logits of one call to the statistics, and hook their gradients.

        ``seen``: the matrices that were handled in the forward.
        ``within``: the numbers of the values between the states around the connection; another one may have equal matrices.
        """
        if mix_BTnn is None or not self.looks_for(number):
            return
        mix_BTnn = mix_BTnn.detach()
        place = self._places.get(number)
        again = None if place is None else place.found_again(seen)
        found = again or self._find(mix_BTnn, seen, within)
        if isinstance(found, str):
            self.reasons[number] = found
            self._places.pop(number, None)
            return
        self.reasons.pop(number, None)
        self._places[number] = _Place.of(seen.graph, found)
        logits, matrix = (seen.tensor(of) for of in found[:2])
        batch, tokens, n, _ = mix_BTnn.shape
        read = partial(found.turned, batch=batch, tokens=tokens, n=n)
        mask = forward.masks.get(0)
        self.seen[number] += 1
        self._add_range(forward, number, read(logits), mask)
        if not self._gradients:
            return
        for name, tensor in zip(GRADIENT_SUMS, (logits, matrix), strict=True):
            # Of a matrix that all tokens share, the gradient is one, whatever the mask.
            by_token = mask is not None and tensor.numel() > n * n
            if tensor.numel() <= n * n:
                self.of_all_tokens.add((name, number))
            if tensor.requires_grad:
                receive = partial(self._add_gradient, forward, number, name, read if by_token else None)
                forward.handles.append(tensor.register_hook(Hook(receive, self._report)))

    def _find(self, mix_BTnn: torch.Tensor, seen: ComputedValues, within: range) -> FoundLogits | str:
        """The logits among what a call handled, or why there are none."""
        if seen.graph.error is not None:
            return f"the tensors of the connection could not be looked at: {seen.graph.error}"
        batch, tokens = mix_BTnn.shape[:2]
        few = spread(batch, 2).tolist()
        wanted = mix_BTnn[few].float()
        values = [each for each in seen.in_order() if each.number in within]
        same = [
            each
            for each in values
            if is_same_matrix(seen.tensor(each).detach(), wanted, batch=batch, tokens=tokens, rows=few)
        ]
        if not same:
            return NOT_SEEN
        behind = seen.graph.ancestors([each.number for each in same])
        return find_logits(
            seen.graph,
            [each for each in values if each.number in behind],
            same,
            wanted,
            behind,
            seen.tensor,
            lambda value: seen.tensor(value).requires_grad,
            batch=batch,
            tokens=tokens,
            rows=few,
            rounding=max(SAME, torch.finfo(mix_BTnn.dtype).eps),
        )

    @staticmethod
    def _add_range(
        forward: Forward, number: int, logits_BTnn: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        # Tokens last in memory: maxima of rows of tokens are several times as fast as those of n numbers.
        flat = logits_BTnn.flatten(0, 1).movedim(0, -1).contiguous()  # (n, n, tokens)
        if not flat.shape[-1]:
            return
        # Along both axes: the proof decides later which one is that of the rows.
        ranges = torch.stack([flat.amax(axis) - flat.amin(axis) for axis in (1, 0)]).double().mT
        count = torch.tensor(float(flat.shape[-1]), dtype=torch.float64)
        if mask is not None:  # without a selection, which would wait for the device
            real = mask.flatten().to(flat.device)
            ranges, count = torch.where(real[:, None], ranges, 0.0), real.sum().double()  # (2, tokens, n)
        sums = {"logit_token_count": count, "logit_range_sum": ranges.mean(-1).sum(-1)}
        forward.chain_sums(0).add_values(number, sums, {"logit_range_max": ranges.amax((-2, -1))})

    def _add_gradient(
        self,
        forward: Forward,
        number: int,
        name: str,
        read: Callable[[torch.Tensor], torch.Tensor] | None,
        gradient: torch.Tensor | None,
    ) -> None:
        # A backward inside of the forward is of something that is not the loss.
        if gradient is None or not forward.ended:
            return
        values = gradient.detach().double()
        mask = forward.masks.get(0)
        if read is not None and mask is not None:
            values = torch.where(mask.to(values.device)[..., None, None], read(values), 0.0)
        square = values.square().sum()
        scale = self._loss_scale() if self._loss_scale is not None else None
        if scale is not None:
            square = square / scale.to(square.device, torch.float64).square()
        key = (name, 0, number)
        if key in forward.fired:  # the gradients of several backwards add up, and their squares do not
            square = torch.full_like(square, math.nan)
        forward.fired.add(key)
        forward.chain_sums(0).add_values(number, {name: square})


class ComputedValues:
    """The matrices (…, n, n) among the values of a forward that is recorded, by their numbers.

    ``graph``: of the forward.
    ``num_streams``: n.
    """

    def __init__(self, graph: Graph, num_streams: int):
        self.graph = graph
        self._shape = (num_streams, num_streams)
        # With torch's count of writes into the tensor at that time.
        self._taken: dict[int, tuple[torch.Tensor, int | None]] = {}

    def take(self, value: TracedValue, tensor: torch.Tensor) -> None:
        """Note a value that an operation takes: its tensor has its graph by now."""
        if value.shape[-2:] == self._shape and value.is_floating:
            self._taken[value.number] = tensor, version(tensor)

    def tensor(self, value: TracedValue) -> torch.Tensor:
        """The tensor of a value that was taken."""
        return self._taken[value.number][0]

    def has(self, value: TracedValue) -> bool:
        """Whether a value was taken and is what it was: not written in place, nor freed, as weights are that are gathered."""
        if value.number not in self._taken:
            return False
        tensor, written = self._taken[value.number]
        freed = tensor.numel() > 0 and not tensor.is_meta and not tensor.untyped_storage().size()
        return not freed and written == version(tensor)

    def in_order(self) -> list[TracedValue]:
        """All that are what they were."""
        return [value for n in sorted(self._taken) if self.has(value := self.graph.values[n])]


class ConnectionParameters:
    """The biases and gates of the connections.

    These are the parameters that the coefficients are computed from, with no more elements than the n² + 2n coefficients and
    no axis as wide as a state: static logits and biases, and the scalars α that scale what depends on the token.

    ``model``: the user's model; its parameters are only read.
    ``structure``: what it was found to be.
    ``cells``: for each connection that has some, the parameter that each element of `values` belongs to.
    """

    def __init__(self, model: nn.Module, structure: Structure):
        self._model, self._structure = model, structure
        self._names: dict[int, tuple[str, ...]] = {}
        self.cells: dict[int, tuple[str, ...]] = {}
        own, listed = dict(model.named_parameters(remove_duplicate=False)), set[str]()
        for number, connection in enumerate(structure.connections):
            names = [name for name in connection.parameters if name in own and name not in listed]
            chosen = {name: own[name] for name in names if self._is_small(own[name])}
            listed.update(chosen)  # what several connections share is listed once
            if chosen:
                self._names[number] = tuple(chosen)
                self.cells[number] = tuple([name for name, of in chosen.items() for _ in range(of.numel())])

    def _is_small(self, parameter: nn.Parameter) -> bool:
        n = self._structure.num_streams
        width = self._structure.chains[0].shapes[0][-1]  # streams may be a part of it
        widths = {width, width // n, width * n}
        return (
            not unreadable(parameter)
            and parameter.numel() <= n * (n + 2)
            and not widths & set(parameter.shape)
        )

    def values(self, number: int) -> torch.Tensor | None:
        """The present values of a connection's biases and gates, one after another; None where it has none.

        Returns: A copy in float32, as long as its `cells`.
        """
        names = self._names.get(number, ())
        # By name, since an optimizer or a loader may have put others in their place.
        parameters = [self._model.get_parameter(name) for name in names]
        if not parameters or sum(each.numel() for each in parameters) != len(self.cells[number]):
            return None
        return torch.cat([each.detach().flatten().float() for each in parameters])
