"""What does the head read from the state at each depth, and from each stream? The logit lens, by depth.

Shapes: B sequence, T token, N stream, D feature, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.experiments import LENS, declared, estimated
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.predictions import Pick, Targets, divergence
from depthscope.probes.interventions.targets import targets_of
from depthscope.probes.lens.head import Head, HeadError, find_head, user_head
from depthscope.probes.session.model_call import batches
from depthscope.probes.session.options import ModelOptions, Options, takes_options

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
        ``entropy``, ``cross_entropy``, ``kl`` to the output (nats) and ``agreement`` of the most likely prediction, by lens
        (``logit``), depth and stream (``all``, then each one), with ``_error``, ``_low`` and ``_high`` over
        sequences; ``prediction_depth`` (Baldock et al. 2021, here by the lens) and ``stream_disagreement``.

    Raises
    ------
    HeadError
        Where the output is computed from more than the last state.

    References
    ----------
    nostalgebraist, "interpreting GPT: the logit lens" (2020); Baldock, Maennel and Neyshabur, "Deep learning through the
    lens of example difficulty" (2106.09647).
    """
    readings = [_prepare(model, item, Options(**options), head, logits, chain) for item in batches(batch)]
    if not readings:
        raise InterventionError(
            "no batch was given; expected a mapping, a tensor, a tuple, or several of these"
        )
    for reading in readings:
        for depth in reading.depths:
            reading.read("logit", depth)
    return _dataset(readings, type(model).__name__, token_text)


@dataclass
class _Reading:
    """One batch: its states, its head, and what the head read."""

    model: ModelUnderTest
    head: Head
    logits: torch.Tensor
    targets: Targets
    counted: torch.Tensor
    depths: list[int]
    # By lens and depth: (quantity, stream, B, T), and the disagreement of streams (B, T).
    found: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    apart: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def read(self, name: str, depth: int) -> None:
        """Read one depth by one lens."""
        state = self.model.base.states[depth]
        quantities, log_ps = [], []
        for stream, shown in self._streams(state):
            with torch.no_grad():
                logits = self.head(shown).float()
            quantities.append(self._quantities(logits))
            if stream is not None:
                log_ps.append(torch.log_softmax(logits, -1))
        self.found[name, depth] = torch.stack(quantities, 1).cpu()
        if log_ps:
            self.apart[name, depth] = _disagreement(log_ps).cpu()

    def _streams(self, state: torch.Tensor) -> Iterator[tuple[int | None, torch.Tensor]]:
        yield None, state
        if state.shape[2] > 1:
            for stream in range(state.shape[2]):
                yield stream, state[:, :, stream : stream + 1].expand_as(state).contiguous()

    def _quantities(self, logits: torch.Tensor) -> torch.Tensor:
        entropy = torch.stack([_entropy(torch.log_softmax(row, -1)) for row in logits])
        agrees = (logits.argmax(-1) == self.logits.argmax(-1)).float()
        kl = divergence(self.logits.float(), logits)
        found = torch.stack([entropy, self.targets.next_token_loss(logits), kl, agrees])
        return found.masked_fill(~self.counted.to(found.device), torch.nan)


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _disagreement(log_ps: list[torch.Tensor]) -> torch.Tensor:
    """Mean over pairs of the Jensen-Shannon divergence, (B, T) in nats: at most ln 2."""
    pairs = []
    for one, other in combinations(log_ps, 2):
        middle = torch.logaddexp(one, other) - np.log(2)
        pairs.append(_entropy(middle) - (_entropy(one) + _entropy(other)) / 2)
    return torch.stack(pairs).mean(0).clamp_min(0)


def _prepare(
    model: nn.Module, batch: Any, options: Options, head: Any, pick: Pick | None, chain: str | None
) -> _Reading:
    under_test = ModelUnderTest(model, batch, options, chain=chain)
    try:
        found = find_head(under_test, pick) if head is None else user_head(head, under_test, pick)
    except HeadError as error:
        names = [each.name for each in under_test.structure.chains]
        if len(names) > 1:
            raise HeadError(
                f"{error}; or name another chain with chain=: {', '.join(map(repr, names))}"
            ) from None
        raise
    logits = under_test.values(under_test.base.output, pick)
    targets = targets_of(under_test, logits, pick)
    states = under_test.base.states
    last = states[len(under_test.chain.points) - 1]
    # A state of another width or resolution does not fit the head.
    depths = [depth for depth in sorted(states) if states[depth].shape == last.shape]
    counted = torch.ones(logits.shape[:2], dtype=torch.bool) if targets.mask is None else targets.mask.cpu()
    if logits.shape[1] != last.shape[1]:
        counted = torch.ones(logits.shape[:2], dtype=torch.bool)
    return _Reading(under_test, found, logits, targets, counted, depths)


# --- the result


def _dataset(readings: list[_Reading], name: str, token_text: Any) -> xr.Dataset:
    first = readings[0]
    names = ("logit",)
    streams = max(values.shape[1] for values in first.found.values())
    tokens = max(reading.counted.shape[1] for reading in readings)
    samples = sum(len(reading.counted) for reading in readings)
    # (quantity, lens, depth, stream, sample, token)
    values = np.full((len(QUANTITIES), len(names), len(first.depths), streams, samples, tokens), np.nan)
    apart = np.full((len(names), len(first.depths), samples, tokens), np.nan)
    begin = 0
    for reading in readings:
        rows = slice(begin, begin + len(reading.counted))
        begin = rows.stop
        for (lens_name, depth), found in reading.found.items():
            at = names.index(lens_name), first.depths.index(depth)
            values[:, at[0], at[1], : found.shape[1], rows, : found.shape[3]] = found.numpy()
            if (lens_name, depth) in reading.apart:
                masked = reading.apart[lens_name, depth].masked_fill(~reading.counted, torch.nan)
                apart[at[0], at[1], rows, : masked.shape[1]] = masked.numpy()
    variables: dict[str, Any] = {}
    for position, quantity in enumerate(QUANTITIES):
        variables |= estimated(quantity, ("lens", "depth", "stream"), values[position])
    agrees = values[QUANTITIES.index("agreement")]
    variables["token_agreement"] = (("lens", "depth", "stream", "sample", "token"), agrees)
    variables["prediction_depth"] = (
        ("lens", "stream", "sample", "token"),
        prediction_depth(agrees, np.array(first.depths)),
    )
    known = ~np.isnan(apart)
    counts = known.sum((-1, -2))
    means = np.divide(np.nansum(apart, (-1, -2)), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    variables["stream_disagreement"] = (("lens", "depth"), means)
    coords: dict[str, Any] = {
        "lens": np.array(names, dtype=object),
        "depth": np.array(first.depths),
        "stream": np.array([ALL, *map(str, range(streams - 1))], dtype=object),
        "layer": ("depth", np.array([first.model.chain.points[depth].layer for depth in first.depths])),
    }
    if token_text is not None:
        texts = np.full((samples, tokens), "", dtype=object)
        for row, words in enumerate(list(token_text)[:samples]):
            texts[row, : min(len(words), tokens)] = [str(word) for word in list(words)[:tokens]]
        coords["token_text"] = (("sample", "token"), texts)
    attrs = {
        "model": name,
        "num_streams": first.model.num_streams,
        "no_loss": first.targets.why,
        "interval": "95 %, Student's t over sequences",
    }
    return declared(xr.Dataset(variables, coords, attrs), LENS)


def prediction_depth(agrees: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """The first depth from which on the most likely prediction is the output's, at all later depths too.

    ``agrees``: (lens, depth, stream, sample, token): 1, 0, or NaN where the token does not count.
    Returns: (lens, stream, sample, token); NaN on padding, and where even the last depth reads another prediction.
    """
    # From the last depth backwards: how many in a row agree.
    stays = np.cumprod(np.nan_to_num(agrees[:, ::-1]), axis=1).sum(1).astype(int)
    first = np.where(stays > 0, depths[np.minimum(len(depths) - stays, len(depths) - 1)], np.nan)
    return np.where(np.isnan(agrees[:, -1]), np.nan, first)
