"""What did all processes measure in a step? A header decides whether they can be added, then their sums, once.

A measured step takes four collectives: a MAX of twelve integers, one SUM and one MAX of all statistics, and one SUM of the
sampled tokens on the process that writes. Each process enters each of them, with data or without. Where the tokens of a
sequence are spread over processes, a fifth one joins the parts of the raw sequences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.sequence_shards import TokenShards
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.statistics.weight_updates import VARIABLES, WeightNorms
from depthscope.probes.training.live.findings import TrainingStopped
from depthscope.probes.training.ranks.channel import Channel, LostError
from depthscope.probes.training.ranks.group import DataGroup
from depthscope.probes.training.ranks.layout import Layout, digest, layout_of
from depthscope.probes.training.ranks.packing import (
    keep_own,
    maxima_vector,
    samples_vector,
    sums_vector,
    unpacked,
)

LARGEST = 2**62  # of what a number and its complement add up to
NUM_SHOWN = 3  # differences between two processes that a sentence names

# Of the loss of a process: the mean over its tokens, the sum over them, or its share of the mean over all tokens times the
# number of processes, which data-parallel wrappers divide by.
MEAN, SUM, GLOBAL_MEAN = "mean", "sum", "global_mean"
ASSUMED = {
    MEAN: "each process's loss is the mean over its own n_r of N tokens: its gradients count n_r/N, as in the mean over all",
    SUM: "each process's loss is the sum over its tokens: its gradients count as they are",
    GLOBAL_MEAN: "each process's loss is R times its part of the mean over all tokens: its gradients count 1/R",
}


@dataclass(frozen=True)
class Measurement:
    """What one process measured in a step, or what all did together."""

    sums: list[TokenSums]  # by chain
    tokens: float  # how many
    sequences: float  # how many
    loss: float | None  # of the step
    loss_terms: float | None = None  # of how many terms the loss is a mean; None for the number of tokens
    # what has to be the same in all processes: the sites and their types
    facts: Sequence[str] = field(default_factory=tuple)
    # which part of the tokens of its sequences a process has; 1 but where these are spread over several
    share: float = 1.0
    parts: torch.Tensor | None = None  # see `parts_vector`


class Ranks:
    """One recorder's part in the measurement of several processes.

    ``group``: who measures together.
    ``loss_reduction``: one of `ASSUMED`; where None, `MEAN` is assumed.
    ``live_tokens, seed``: of the samples.
    ``timeout``: seconds that a process waits for the others.
    ``settings``: of the recorder, which have to be the same in all processes.
    ``shards``: how the tokens of a sequence are spread over some of the processes.
    """

    def __init__(
        self,
        group: DataGroup,
        loss_reduction: str | None,
        *,
        live_tokens: int,
        seed: int,
        timeout: float,
        settings: Mapping[str, Any],
        shards: TokenShards | None = None,
    ) -> None:
        self.group, self.shards = group, shards
        # How many of the processes have a loss, and sequences, of their own.
        self._num_losses = group.size // (1 if shards is None else len(shards.ranks))
        self._settings = dict(settings)
        self._reduction = loss_reduction or MEAN
        self._live_tokens, self._seed, self._timeout = live_tokens, seed, timeout
        self._channel: Channel | None = None
        self._layouts: dict[int, Layout] = {}  # that this process had, by their digests
        self._stopped: TrainingStopped | None = None
        self._stops_now = False
        assumed = "" if loss_reduction else "; assumed, since loss_reduction was not given"
        self.attrs: dict[str, Any] = {
            "processes": group.size,
            "processes_chosen": group.chosen,
            "processes_loss": ASSUMED[self._reduction] + assumed,
            "processes_sample": "the sampled tokens are of all processes, in proportion to their tokens; the raw sequences, "
            "their digest and what queries attend to are of the first process",
        }

    @property
    def writes(self) -> bool:
        """Whether this is the process that has the rows."""
        return self.group.rank == 0

    @property
    def is_open(self) -> bool:
        """Whether the processes can exchange anything."""
        return self._channel is not None and self._channel.is_open

    def open(self, first_step: int) -> int:
        """Connect the processes, and require that all measure the same.

        ``first_step``: number of the first step; where the first process resumes a store, only it knows the number.
        Raises CaptureError: In all processes, where settings differ; LostError where a process does not come.
        """
        self._channel = Channel(self.group, self._timeout)
        reports = self._channel.texts(json.dumps({"first_step": first_step, "settings": self._settings}))
        every = [json.loads(text) for text in reports]
        here = every[0]["settings"]
        for rank, other in enumerate(every):
            there = other["settings"]
            different = [
                f"{name} is {here.get(name)!r} in process {self.group.ranks[0]} and {there.get(name)!r} in process "
                f"{self.group.ranks[rank]}"
                for name in sorted({*here, *there})
                if here.get(name) != there.get(name)
            ]
            if different:
                self.close()
                raise CaptureError(f"{'; '.join(different[:NUM_SHOWN])}; expected the same in all processes")
        return int(every[0]["first_step"])

    def close(self) -> None:
        """Leave; nothing waits for the others."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    # --- the end of a step ---

    def exchange(
        self,
        step: int,
        local: Measurement | None,
        weights: WeightNorms | None,
        num_modules: int,
        failure: str = "",
    ) -> tuple[Measurement, WeightNorms | None] | None:
        """Add what all processes measured in a step.

        ``local``: of this process; None where it had no data, or could not measure.
        ``weights``: of this process's weights, or of its shards; None where they are not measured.
        ``num_modules``: how many entries the weights of every process have; 0 where they are not measured.
        ``failure``: why this process could not measure, empty where it could.
        Returns: What all measured, in the process that writes; None in the others.
        Raises CaptureError: In all processes, where one could not measure, none had data, or they measured different
        things; LostError where a process does not come.
        """
        assert self._channel is not None
        # What may fail comes before the first collective, so that all learn of it; the others wait for nobody.
        mine = None
        if local is not None and not failure:
            try:
                mine = self._prepared(local)
            except Exception as error:
                failure = str(error) or type(error).__name__
        header = self._header(step, mine, failure)
        self._stops_now = bool(header[5])
        self._require_addable(header, step, [] if mine is None else mine.facts, failure)
        statistics = torch.zeros(int(header[6]), dtype=torch.float64) if mine is None else mine.sums
        base = torch.zeros(NUM_BASE, dtype=torch.float64) if mine is None else mine.base
        of_weights = _weights_vector(weights, num_modules)
        summed = self._channel.sum(torch.cat([base, of_weights, statistics]))
        base, of_weights, statistics = summed.tensor_split([NUM_BASE, NUM_BASE + 4 * num_modules])
        maxima = (
            torch.full((int(header[7]),), -torch.inf, dtype=torch.float64) if mine is None else mine.maxima
        )
        maxima = self._channel.maximum(maxima)
        sampled = self._sampled(local, mine, statistics, int(header[8]))
        parts = self._parts(local, int(header[11]))
        if not self.writes:
            return None
        known = self._layouts.get(header[2])
        if known is None:
            raise CaptureError(
                "the process that writes had no data in it, and has not met data of this kind before"
            )
        factor = self._common_factor(base)
        sums = unpacked(known, self.group.size, statistics, maxima, sampled, factor, self._seed)
        if local is not None:
            keep_own(sums, local.sums)
        loss = None if base[4] else float(base[3]) * factor
        together = Measurement(sums, float(base[0]), float(base[1]), loss, parts=parts)
        return together, None if weights is None else _norms(weights, of_weights, num_modules)

    def _prepared(self, local: Measurement) -> _Prepared:
        """The vectors of this process."""
        layout = layout_of(local.sums, self._live_tokens)
        terms = "tokens" if local.loss_terms is None else "loss_terms that were given"
        facts = [*local.facts, f"losses weighted by {terms}", *layout.facts()]
        key = digest(facts)
        self._layouts[key] = layout
        factor = self._factor(local)
        loss = 0.0 if local.loss is None else factor * local.loss * local.share
        return _Prepared(
            layout,
            facts,
            key,
            torch.tensor(
                [local.tokens, local.sequences * local.share, factor * local.share, loss, local.loss is None],
                dtype=torch.float64,
            ),
            sums_vector(local.sums, layout, self.group.rank, self.group.size, factor),
            maxima_vector(local.sums, layout),
            0 if local.parts is None else len(local.parts),
        )

    def _sampled(
        self, local: Measurement | None, mine: _Prepared | None, statistics: torch.Tensor, length: int
    ) -> torch.Tensor:
        """The sampled tokens of all processes, on the one that writes."""
        assert self._channel is not None
        sampled = torch.zeros(length, dtype=torch.int32)
        if local is not None and mine is not None:
            sets, ranks = mine.layout.num_sets, self.group.size
            numbers = statistics[: sets * ranks].view(sets, ranks)
            try:
                sampled = samples_vector(
                    local.sums, mine.layout, numbers, self.group.rank, self._factor(local)
                )
            except Exception as error:  # zeros would look like tokens: leave, which all others notice at once
                self.close()
                raise LostError(f"the sampled tokens of this process could not be sent: {error}") from error
        return self._channel.sum_on_first(sampled) if length else sampled

    def _parts(self, local: Measurement | None, length: int) -> torch.Tensor | None:
        """The raw sequences of the processes that share those of the first one, put together there; None where none are."""
        if not length:
            return None
        assert self._channel is not None
        joined = torch.zeros(length)
        of_first = self.shards is not None and self.group.ranks[0] in self.shards.ranks
        if of_first and local is not None and local.parts is not None:
            joined[: len(local.parts)] = local.parts
        return self._channel.sum_on_first(joined)

    def _header(self, step: int, mine: _Prepared | None, failure: str) -> list[int]:
        """The largest of twelve numbers of all processes; of a number and its complement, one alone shows a difference."""
        assert self._channel is not None
        knows = mine is not None or not self.writes or bool(self._layouts)
        numbers = [step, LARGEST - step, 0, 0, int(bool(failure)), int(self._stopped is not None)]
        numbers += [0, 0, 0, 0, int(not knows), 0]
        if mine is not None:
            numbers[2:4] = [mine.key, LARGEST - mine.key]
            numbers[6:10] = [len(mine.sums), len(mine.maxima), mine.layout.sample_length, 1]
            numbers[11] = mine.num_parts
        return self._channel.maximum(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def _require_addable(self, header: list[int], step: int, facts: list[str], failure: str) -> None:
        """Raise the same error in all processes, where they cannot be added."""
        same_step = header[0] + header[1] == LARGEST
        same_layout = not header[9] or header[2] + header[3] == LARGEST
        if header[4] or not same_step or not same_layout:
            assert self._channel is not None
            reports = self._channel.texts(json.dumps({"step": step, "failure": failure, "facts": facts}))
            raise CaptureError(self._difference([json.loads(text) for text in reports]))
        if not header[9]:
            raise CaptureError("no process had a real token in it; nothing to measure")
        if header[10]:
            raise CaptureError(
                f"process {self.group.ranks[0]}, which writes, has had no data yet and does not know the model's sites; the "
                "steps from its first batch on are measured"
            )

    def _difference(self, reports: list[dict[str, Any]]) -> str:
        """Which process could not measure, or what differs between two of them."""
        ranks = self.group.ranks
        for rank, each in enumerate(reports):
            if each["failure"]:
                return f"process {ranks[rank]} could not measure it: {each['failure']}"
        steps = sorted({each["step"] for each in reports})
        if len(steps) > 1:
            named = [f"process {ranks[rank]} is at step {each['step']}" for rank, each in enumerate(reports)]
            return f"{', '.join(named[:4])}: recorder.step() has to be called equally often in all processes"
        with_data = [rank for rank, each in enumerate(reports) if each["facts"]]
        first = with_data[0]
        for rank in with_data[1:]:
            here, there = reports[first]["facts"], reports[rank]["facts"]
            parts = [
                f"only process {ranks[of]} has {'; '.join(only[:NUM_SHOWN])}"
                f"{f' and {len(only) - NUM_SHOWN} more' if len(only) > NUM_SHOWN else ''}"
                for of, only in ((first, _missing(here, there)), (rank, _missing(there, here)))
                if only
            ]
            if parts:
                return f"the processes measured different things: {', '.join(parts)}; expected one model and one kind of batch"
        return "the processes measured the same things in another order; expected one model"

    # --- what is added ---

    def _factor(self, local: Measurement) -> float:
        """By which a process multiplies its gradients before they are added."""
        if self._reduction != MEAN:
            return 1.0
        return local.tokens / local.share if local.loss_terms is None else local.loss_terms

    def _common_factor(self, base: torch.Tensor) -> float:
        """By which the added gradients are multiplied."""
        if self._reduction == MEAN:
            return 1.0 / float(base[2]) if base[2] > 0 else float("nan")
        return 1.0 if self._reduction == SUM else 1.0 / self._num_losses

    # --- stopping ---

    def stop_later(self, stopped: TrainingStopped) -> None:
        """Stop all processes at the end of the next measured step: its header informs the others."""
        self._stopped = self._stopped or stopped

    def stop_now(self, step: int) -> None:
        """Raise `TrainingStopped` in all processes where the first one asked for it."""
        if self._stops_now:
            self._stops_now = False
            raise self._stopped or TrainingStopped(step, ())


NUM_BASE = 5  # tokens, sequences, the factors of the gradients, losses times these, processes without a loss


class _Prepared(NamedTuple):
    """The vectors of one process, before anything is exchanged."""

    layout: Layout
    facts: list[str]
    key: int
    base: torch.Tensor
    sums: torch.Tensor
    maxima: torch.Tensor
    num_parts: int


def _weights_vector(weights: WeightNorms | None, num_modules: int) -> torch.Tensor:
    """The numbers of elements and the squared norms; NaN where they could not be measured."""
    if weights is None:
        return torch.full((4 * num_modules,), torch.nan, dtype=torch.float64)
    columns = [weights.counts, *(weights.values[name] for name in VARIABLES)]
    return torch.from_numpy(np.concatenate(columns).astype(np.float64))


def _missing(here: Sequence[str], there: Sequence[str]) -> list[str]:
    known = set(there)
    return [fact for fact in here if fact not in known]


def _norms(weights: WeightNorms, summed: torch.Tensor, num_modules: int) -> WeightNorms:
    """The norms of the weights of all processes, in place of those of this one."""
    columns = summed.view(4, num_modules).numpy()
    gradient = columns[1 + VARIABLES.index("weight_gradient_square_norm")]
    return replace(
        weights,
        counts=columns[0].copy(),
        values={name: columns[1 + at].copy() for at, name in enumerate(VARIABLES)},
        overflowed=weights.overflowed or bool(np.isinf(gradient).any()),
    )
