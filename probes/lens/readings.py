"""What does the head read from the state at each depth, and from each stream? The logit lens, by depth.

Shapes: B sequence, T token, N stream, D feature, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.experiments import LENS, declared, estimated
from depthscope.probes.connections.proof import relative_error
from depthscope.probes.interventions.effects import texts_of
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.predictions import Pick, by_token, divergence, named_logits
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.reading.graph import TracedValue
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.model_call import batches
from depthscope.probes.session.options import ModelOptions, Options, takes_options

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""``head(state)``: logits (B, T, V) from a state (B, T, N, D)."""

# Of the logits run again: the same operations in the same precision on the same shapes; a heuristic of ours.
HEAD_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HINT = (
    "pass head=lambda state: …, the final norm and the unembedding of the model, which gets a state (B, T, D)"
)


class HeadError(InterventionError):
    """A head that cannot be found, or that does not give the model's output."""


class HeadRecording:
    """The operations of a recorded forward from the last state on."""

    def __init__(self, model: ModelUnderTest) -> None:
        self.recorder = GraphRecorder(model.model, list(tensors_in(model.batch)))
        self.state: torch.Tensor | None = None
        self._roots: list[TracedValue] = []

    def start(self, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        """Hold what operations take from now on; what they make of the tensors that hold this state is run again."""
        self._roots = [self.recorder.known(tensor) for tensor in own]
        self.state = state.detach().clone()  # it may be written in place
        self.recorder.on_taken = self.recorder.hold

    def steps_to(self, target: torch.Tensor) -> list[TracedValue]:
        """The operations that made a tensor of the state, in order; none where none did."""
        graph, end, roots = self.recorder.graph, self.recorder.known(target), self._roots
        if graph.error is not None:
            return []
        held = {root.number for root in roots}
        behind = [graph.values[number] for number in sorted(graph.ancestors([end.number], stop=held) - held)]
        return [value for value in behind if any(graph.depends(value, root) for root in roots)]

    def replay(self, steps: Sequence[TracedValue], state: torch.Tensor) -> torch.Tensor:
        """What the last step would have made of another state, in the model's own layout; with a graph where that has one."""
        parts = list(state) if len(self._roots) > 1 else [state]
        graph, values = (
            self.recorder.graph,
            {root.number: part for root, part in zip(self._roots, parts, strict=True)},
        )

        def given(of: TracedValue) -> torch.Tensor:
            return values[of.number] if of.number in values else graph.tensor(of)

        for value in steps:
            values[value.number] = graph.run(value, given)
        return values[steps[-1].number]


def find_head(model: ModelUnderTest, pick: Pick | None = None) -> Head:
    """The operations from the last state of the chain to the logits.

    Returns: For states of this batch's shape; differentiable.
    Raises HeadError: Where the output does not depend on the last state alone.
    """
    recording, last = HeadRecording(model), len(model.chain.points) - 1

    def shown(depth: int, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        if depth == last:
            recording.start(state, own)

    steps = recording.steps_to(_logits(model.observed(recording.recorder, shown), pick))
    like = recording.state
    if like is None or not steps:
        raise HeadError(f"the output was not seen to be computed from the last state of the chain; {HINT}")

    def head(state: torch.Tensor) -> torch.Tensor:
        # The graph, where there is one, goes through the rearrangement.
        return by_token(recording.replay(steps, model.native(state, like, last)), model.structure.batch_axis)

    require_head(head, model, pick)
    return head


def _logits(output: Any, pick: Pick | None) -> torch.Tensor:
    if pick is not None:
        return pick(output)
    named = named_logits(output)
    if named is not None:
        return named
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.ndim >= 2]
    if not tensors:
        raise HeadError(f"the output has no floating tensor; {HINT}")
    return tensors[0]


def require_head(head: Head, model: ModelUnderTest, pick: Pick | None) -> None:
    """Require that a head gives the output from the last state: of the batch, and of the same sequences in another order."""
    last = len(model.chain.points) - 1
    _compare(head, model.base.states[last], model.values(model.base.output, pick), "")
    other = rearranged_batch(model.batch, len(model.base.states[last]), model.structure.batch_axis)
    if other is None:
        raise HeadError(
            "the head is proven on other sequences, and the batch has one; call the model with at least two sequences"
        )
    seen: dict[int, torch.Tensor] = {}

    def shown(depth: int, state: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
        if depth == last:
            seen[depth] = model.canonical(state, depth).clone()

    output = model.observed(nullcontext(), shown, other)
    _compare(head, seen[last], model.values(output, pick), " of other sequences")


def _compare(head: Head, state: torch.Tensor, logits: torch.Tensor, which: str) -> None:
    with torch.no_grad():
        found = head(state)
    if found.shape != logits.shape:
        raise HeadError(
            f"the head gives shape {tuple(found.shape)}, the output has {tuple(logits.shape)}; {HINT}"
        )
    error = relative_error(found.double() - logits.double(), logits.double())
    limit = HEAD_ERROR.get(state.dtype, HEAD_ERROR[torch.float32])
    if not error <= limit:
        raise HeadError(
            f"applied to the last state{which}, the head misses the output by a relative error of {error:.1e} (limit "
            f"{limit:.0e}): the output is computed from more than the last state; {HINT}"
        )


def rearranged_batch(batch: Any, size: int, axis: int) -> Any:
    """The batch with its sequences moved on by one; None where it has one sequence alone."""
    if size < 2:
        return None
    if isinstance(batch, torch.Tensor):
        return batch.roll(1, axis) if batch.ndim > axis and batch.shape[axis] == size else batch
    if isinstance(batch, Mapping):
        return {name: rearranged_batch(value, size, axis) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(rearranged_batch(value, size, axis) for value in batch)
    return batch


def user_head(
    given: Callable[[torch.Tensor], torch.Tensor], model: ModelUnderTest, pick: Pick | None
) -> Head:
    """A head of the user's, proven like one that was found; it gets (B, T, D), or (B, T, N, D) of several streams."""

    def head(state: torch.Tensor) -> torch.Tensor:
        return by_token(given(state.squeeze(2) if state.shape[2] == 1 else state), model.structure.batch_axis)

    require_head(head, model, pick)
    return head


ALL = "all"  # the state with every stream as it is
QUANTITIES = ("entropy", "cross_entropy", "kl", "agreement")


@takes_options(ModelOptions)
def lens(
    model: nn.Module,
    batch: Any,
    *,
    head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    logits: Pick | None = None,
    chain: str | None = None,
    token_text: Any = None,
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
    head : callable, optional
        ``head(state)`` returns logits from (B, T, D), or (B, T, N, D) of several streams; it is proven too.
    logits : callable, optional
        ``logits(output)``, where the output has several tensors.
    chain : str, optional
        Which of several chains; its last state must lead to the output.
    token_text : sequence of sequences of str, optional
        Text of the tokens.
    **options
        Each option of `Options`.

    Returns
    -------
    Dataset
        ``entropy``, ``cross_entropy``, ``kl`` to the output (nats) and ``agreement`` of the most likely prediction, by depth
        and stream (``all``, then each one), with ``_error``, ``_low`` and ``_high`` over sequences; ``prediction_depth``
        (Baldock et al. 2021, here by the lens) and ``stream_disagreement``.

    Raises
    ------
    HeadError
        Where the output is computed from more than the last state.

    References
    ----------
    nostalgebraist, "interpreting GPT: the logit lens" (2020); Baldock, Maennel and Neyshabur, "Deep learning through the
    lens of example difficulty" (2106.09647).
    """
    readings = [_read(model, item, Options(**options), head, logits, chain) for item in batches(batch)]
    if not readings:
        raise InterventionError(
            "no batch was given; expected a mapping, a tensor, a tuple, or several of these"
        )
    return _dataset(readings, type(model).__name__, token_text)


@dataclass
class _Reading:
    """What the head read of one batch.

    ``found``: by depth, (quantity, stream, B, T).
    ``apart``: by depth, the disagreement of the streams (B, T), where there are several.
    """

    model: ModelUnderTest
    counted: torch.Tensor
    why: str
    found: dict[int, torch.Tensor]
    apart: dict[int, torch.Tensor]


def _read(
    model: nn.Module, batch: Any, options: Options, head: Any, pick: Pick | None, chain: str | None
) -> _Reading:
    under_test = ModelUnderTest(model, batch, options, chain=chain)
    try:
        reader = find_head(under_test, pick) if head is None else user_head(head, under_test, pick)
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
    reading = _Reading(under_test, counted, targets.why, {}, {})
    # A state of another width or resolution does not fit the head.
    for depth in (depth for depth in sorted(states) if states[depth].shape == last.shape):
        quantities, log_ps = [], []
        for stream, state in _streams(states[depth]):
            with torch.no_grad():
                found = reader(state).float()
            log_p = torch.log_softmax(found, -1)
            agrees = (found.argmax(-1) == logits.argmax(-1)).float()
            kl = divergence(logits.float(), found)
            of_state = torch.stack([_entropy(log_p), targets.next_token_loss(found), kl, agrees])
            quantities.append(of_state.masked_fill(~counted.to(found.device), torch.nan))
            log_ps += [] if stream is None else [log_p]
        reading.found[depth] = torch.stack(quantities, 1).cpu()
        if log_ps:
            reading.apart[depth] = _disagreement(log_ps).cpu().masked_fill(~counted, torch.nan)
    return reading


def _streams(state: torch.Tensor) -> Iterator[tuple[int | None, torch.Tensor]]:
    """The state as it is, and each of several streams in the place of all."""
    yield None, state
    for stream in range(state.shape[2]) if state.shape[2] > 1 else ():
        yield stream, state[:, :, stream : stream + 1].expand_as(state).contiguous()


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _disagreement(log_ps: list[torch.Tensor]) -> torch.Tensor:
    """Mean over pairs of the Jensen-Shannon divergence, (B, T) in nats: at most ln 2."""
    pairs = []
    for one, other in combinations(log_ps, 2):
        middle = torch.logaddexp(one, other) - np.log(2)
        pairs.append(_entropy(middle) - (_entropy(one) + _entropy(other)) / 2)
    return torch.stack(pairs).mean(0).clamp_min(0)


# --- the result


def _dataset(readings: list[_Reading], name: str, token_text: Any) -> xr.Dataset:
    first = readings[0]
    depths = list(first.found)
    streams = max(values.shape[1] for values in first.found.values())
    tokens = max(reading.counted.shape[1] for reading in readings)
    samples = sum(len(reading.counted) for reading in readings)
    # (quantity, depth, stream, sample, token)
    values = np.full((len(QUANTITIES), len(depths), streams, samples, tokens), np.nan)
    apart = np.full((len(depths), samples, tokens), np.nan)
    begin = 0
    for reading in readings:
        rows = slice(begin, begin + len(reading.counted))
        begin = rows.stop
        for depth, found in reading.found.items():
            at = depths.index(depth)
            values[:, at, : found.shape[1], rows, : found.shape[3]] = found.numpy()
            if depth in reading.apart:
                apart[at, rows, : found.shape[3]] = reading.apart[depth].numpy()
    variables: dict[str, Any] = {}
    for position, quantity in enumerate(QUANTITIES):
        variables |= estimated(quantity, ("depth", "stream"), values[position])
    agrees = values[QUANTITIES.index("agreement")]
    variables["token_agreement"] = (("depth", "stream", "sample", "token"), agrees)
    of_depth = prediction_depth(agrees, np.array(depths))
    variables["prediction_depth"] = (("stream", "sample", "token"), of_depth)
    counts = np.isfinite(apart).sum((-1, -2))
    means = np.divide(np.nansum(apart, (-1, -2)), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    variables["stream_disagreement"] = (("depth",), means)
    coords: dict[str, Any] = {
        "depth": np.array(depths),
        "stream": np.array([ALL, *map(str, range(streams - 1))], dtype=object),
        "layer": ("depth", np.array([first.model.chain.points[depth].layer for depth in depths])),
    }
    if token_text is not None:
        coords["token_text"] = (("sample", "token"), texts_of(token_text, (samples, tokens)))
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
