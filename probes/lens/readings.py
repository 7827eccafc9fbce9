"""What does the head read from the state at each depth, and from each stream? The logit lens, by depth.

Shapes: B sequence, T token, N stream, D feature, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.experiments import LENS, declared, estimated
from depthscope.probes.connections.proof import relative_error
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.predictions import Pick, by_token, divergence, named_logits
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.model.tensors import mapped, tensors_in
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.model_call import batches
from depthscope.probes.session.options import ModelOptions, Options, takes_options

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""``head(state)``: logits (B, T, V) from a state (B, T, N, D)."""

# Of the logits run again: the same operations in the same precision on the same shapes; a heuristic of ours.
HEAD_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class HeadError(InterventionError):
    """A head that cannot be found, or that does not give the model's output."""


class _Recording:
    """The operations of a recorded forward from the last state on, to be run again on other states."""

    def __init__(self, model: ModelUnderTest) -> None:
        self.recorder = GraphRecorder(model.model, list(tensors_in(model.batch)))
        self.state: torch.Tensor | None = None
        self.steps: list[TracedValue] = []
        self._roots: list[TracedValue] = []

    def start(self, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        """Hold what operations take from now on."""
        self._roots = [self.recorder.known(tensor) for tensor in own]
        self.state = state.detach().clone()  # it may be written in place
        self.recorder.on_taken = self.recorder.hold

    def end(self, target: torch.Tensor) -> None:
        """Find the operations that made a tensor of the state, in order; none where none did."""
        graph, end, roots = self.recorder.graph, self.recorder.known(target), self._roots
        if graph.error is None:
            held = {root.number for root in roots}
            behind = sorted(graph.ancestors([end.number], stop=held) - held)
            made = [graph.values[number] for number in behind]
            self.steps = [value for value in made if any(graph.depends(value, root) for root in roots)]

    def replay(self, state: torch.Tensor) -> torch.Tensor:
        """What the last operation would have made of another state, in the model's own layout."""
        graph, parts = self.recorder.graph, list(state) if len(self._roots) > 1 else [state]
        values = {root.number: part for root, part in zip(self._roots, parts, strict=True)}
        for value in self.steps:
            values[value.number] = graph.run(
                value, lambda of: values[of.number] if of.number in values else graph.tensor(of)
            )
        return values[self.steps[-1].number]


def find_head(model: ModelUnderTest, pick: Pick | None = None) -> Head:
    """The operations from the last state of the chain to the logits.

    Returns: For states of this batch's shape; it gives the output from the last state, of the batch, and of the same sequences
    in another order.
    Raises HeadError: Where the output does not depend on the last state alone.
    """
    recording, last = _Recording(model), len(model.chain.points) - 1
    seen: dict[int, torch.Tensor] = {}

    def shown(depth: int, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        if depth == last:
            recording.start(state, own)

    def shown_again(depth: int, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        seen[depth] = model.canonical(state, depth).clone()

    recording.end(_logits(model.observed(recording.recorder, shown), pick))
    like = recording.state
    if like is None or not recording.steps:
        raise HeadError("the output was not seen to be computed from the last state of the chain")

    def head(state: torch.Tensor) -> torch.Tensor:
        return by_token(recording.replay(model.native(state, like, last)), model.structure.batch_axis)

    _compare(head, model.base.states[last], model.values(model.base.output, pick), "")
    size = len(model.base.states[last])
    if size < 2:
        raise HeadError(
            "the head is proven on other sequences, and the batch has one; call the model with at least two sequences"
        )
    output = model.observed(
        nullcontext(), shown_again, _moved_on(model.batch, size, model.structure.batch_axis)
    )
    _compare(head, seen[last], model.values(output, pick), " of other sequences")
    return head


def _logits(output: Any, pick: Pick | None) -> torch.Tensor:
    if pick is not None:
        return pick(output)
    named = named_logits(output)
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.ndim >= 2]
    if named is None and not tensors:
        raise HeadError("the output has no floating tensor; pass logits=lambda output: …")
    return tensors[0] if named is None else named


def _compare(head: Head, state: torch.Tensor, logits: torch.Tensor, which: str) -> None:
    with torch.no_grad():
        found = head(state)
    error = relative_error(found.double() - logits.double(), logits.double())
    limit = HEAD_ERROR.get(state.dtype, HEAD_ERROR[torch.float32])
    if not error <= limit:
        raise HeadError(
            f"applied to the last state{which}, the head misses the output by a relative error of {error:.1e} (limit "
            f"{limit:.0e}): the output is computed from more than the last state"
        )


def _moved_on(batch: Any, size: int, axis: int) -> Any:
    """The batch with its sequences moved on by one."""

    def moved(one: torch.Tensor) -> torch.Tensor:
        return one.roll(1, axis) if one.ndim > axis and one.shape[axis] == size else one

    return mapped(batch, moved)


ALL = "all"  # the state with every stream as it is
QUANTITIES = ("entropy", "cross_entropy", "kl", "agreement")


@takes_options(ModelOptions)
def lens(
    model: nn.Module,
    batch: Any,
    *,
    logits: Pick | None = None,
    chain: str | None = None,
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    """What the model's head reads from the state at each depth: the logit lens.

    The head is everything that the model itself does with the last state: it is recorded in a forward and proven on the same
    sequences and on others. The lens puts an earlier state in the place of the last one. For a single stream every stream gets
    the state of that one, so that a head which merges streams reads it alone.

    Parameters
    ----------
    model : Module
        The model, run as it is; nothing of it is changed or trained.
    batch : mapping, tensor, tuple or iterable of these
        As in `capture`, with at least two sequences.
    logits : callable, optional
        ``logits(output)``, where the output has several tensors.
    chain : str, optional
        Which of several chains; its last state must lead to the output.
    **options
        Each option of `Options`.

    Returns
    -------
    Dataset
        ``entropy``, ``cross_entropy``, ``kl`` to the output (nats) and ``agreement`` of the most likely prediction, by depth
        and stream (``all``, then each one), with ``_error``, ``_low`` and ``_high`` over sequences; ``prediction_depth``
        (Baldock et al. 2021, here by the lens).

    Raises
    ------
    HeadError
        Where the output is computed from more than the last state.

    References
    ----------
    nostalgebraist, "interpreting GPT: the logit lens" (2020); Baldock, Maennel and Neyshabur, "Deep learning through the
    lens of example difficulty" (2106.09647).
    """
    readings = [_read(model, item, Options(**options), logits, chain) for item in batches(batch)]
    if not readings:
        raise InterventionError(
            "no batch was given; expected a mapping, a tensor, a tuple, or several of these"
        )
    return _dataset(readings, type(model).__name__)


@dataclass
class _Reading:
    """What the head read of one batch: by depth, (quantity, stream, B, T)."""

    model: ModelUnderTest
    counted: torch.Tensor
    why: str
    found: dict[int, torch.Tensor]


def _read(model: nn.Module, batch: Any, options: Options, pick: Pick | None, chain: str | None) -> _Reading:
    under_test = ModelUnderTest(model, batch, options, chain=chain)
    try:
        reader = find_head(under_test, pick)
    except HeadError as error:
        names = [each.name for each in under_test.structure.chains]
        if len(names) > 1:
            raise HeadError(
                f"{error}; or name another chain with chain=: {', '.join(map(repr, names))}"
            ) from None
        raise
    logits = under_test.values(under_test.base.output, pick)
    targets = under_test.targets(logits, pick)
    states = under_test.base.states
    last = states[len(under_test.chain.points) - 1]
    counted = torch.ones(logits.shape[:2], dtype=torch.bool)
    if targets.mask is not None and logits.shape[1] == last.shape[1]:
        counted = targets.mask.cpu()
    reading = _Reading(under_test, counted, targets.why, {})
    # A state of another width or resolution does not fit the head.
    for depth in (depth for depth in sorted(states) if states[depth].shape == last.shape):
        quantities = []
        for state in _streams(states[depth]):
            with torch.no_grad():
                found = reader(state).float()
            log_p = torch.log_softmax(found, -1)
            agrees = (found.argmax(-1) == logits.argmax(-1)).float()
            kl = divergence(logits.float(), found)
            of_state = torch.stack(
                [-(log_p.exp() * log_p).sum(-1), targets.next_token_loss(found), kl, agrees]
            )
            quantities.append(of_state.masked_fill(~counted.to(found.device), torch.nan))
        reading.found[depth] = torch.stack(quantities, 1).cpu()
    return reading


def _streams(state: torch.Tensor) -> Iterator[torch.Tensor]:
    """The state as it is, and each of several streams in the place of all."""
    yield state
    for stream in range(state.shape[2]) if state.shape[2] > 1 else ():
        yield state[:, :, stream : stream + 1].expand_as(state).contiguous()


# --- the result


def _dataset(readings: list[_Reading], name: str) -> xr.Dataset:
    first = readings[0]
    depths = list(first.found)
    streams = max(values.shape[1] for values in first.found.values())
    tokens = max(reading.counted.shape[1] for reading in readings)
    samples = sum(len(reading.counted) for reading in readings)
    # (quantity, depth, stream, sample, token)
    values = np.full((len(QUANTITIES), len(depths), streams, samples, tokens), np.nan)
    begin = 0
    for reading in readings:
        rows = slice(begin, begin + len(reading.counted))
        begin = rows.stop
        for depth, found in reading.found.items():
            at = depths.index(depth)
            values[:, at, : found.shape[1], rows, : found.shape[3]] = found.numpy()
    variables: dict[str, Any] = {}
    for position, quantity in enumerate(QUANTITIES):
        variables |= estimated(quantity, ("depth", "stream"), values[position])
    agrees = values[QUANTITIES.index("agreement")]
    of_depth = prediction_depth(agrees, np.array(depths))
    variables["prediction_depth"] = (("stream", "sample", "token"), of_depth)
    coords: dict[str, Any] = {
        "depth": np.array(depths),
        "stream": np.array([ALL, *map(str, range(streams - 1))], dtype=object),
        "layer": ("depth", np.array([first.model.chain.points[depth].layer for depth in depths])),
    }
    attrs = {
        "model": name,
        "num_streams": first.model.num_streams,
        "no_loss": first.why,
        "interval": "95 %, Student's t over sequences",
    }
    return declared(xr.Dataset(variables, coords, attrs), LENS)


def prediction_depth(agrees: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """The first depth from which on the most likely prediction is the output's, at all later depths too.

    ``agrees``: (depth, stream, sample, token): 1, 0, or NaN where the token does not count.
    Returns: (stream, sample, token); NaN on padding, and where even the last depth reads another prediction.
    """
    # From the last depth backwards: how many in a row agree.
    stays = np.cumprod(np.nan_to_num(agrees[::-1]), axis=0).sum(0).astype(int)
    first = np.where(stays > 0, depths[np.minimum(len(depths) - stays, len(depths) - 1)], np.nan)
    return np.where(np.isnan(agrees[-1]), np.nan, first)
