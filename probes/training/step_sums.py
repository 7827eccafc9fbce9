"""What do the forwards of a step add up to? Their sums, and those of all steps with the same weights."""

from __future__ import annotations

import math

import torch

from depthscope.probes.run.statistics_dataset import GRADIENT
from depthscope.probes.session.forward import Measured
from depthscope.probes.session.logit_statistics import GRADIENT_SUMS
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums, merge_sums


class PooledSums:
    """The sums of all steps since the weights last changed, by chain."""

    def __init__(self) -> None:
        self.sums: list[TokenSums] = []
        self._stamp: int | None = None

    def is_of(self, stamp: int | None) -> bool:
        """Whether what is pooled has these weights."""
        return stamp == self._stamp

    def add(self, parts: list[Measured]) -> None:
        """Add the parts of a step."""
        # An error from here on leaves half of a sum: what is pooled begins anew then.
        (pooled, self.sums), (stamp, self._stamp) = (self.sums, []), (self._stamp, None)
        for part in parts:
            # Sums over several steps describe one model only as long as its weights are the same.
            if part.stamp != stamp:
                pooled, stamp = [], part.stamp
            pooled = merge_sums(pooled, part.sums)
        self.sums, self._stamp = pooled, stamp


def added_up(parts: list[Measured]) -> list[TokenSums]:
    """The sums of all forwards of a step, by chain."""
    sums: list[TokenSums] = []
    for part in parts:
        sums = merge_sums(sums, part.sums)
    return sums


def finite_gradients(sums: list[TokenSums]) -> bool:
    """Whether no gradient overflowed."""
    gradients = (chain.sums.get(GRADIENT, {}) for chain in sums)
    return all(bool(value.isfinite().all()) for parts in gradients for value in parts.values())


def make_gradients_undefined(sums: list[TokenSums]) -> None:
    """Put NaN in place of every sum of gradients."""
    for chain in sums:
        for name in (GRADIENT, *GRADIENT_SUMS):
            parts = chain.sums.get(name, {})
            chain.sums[name] = {key: torch.full_like(value, math.nan) for key, value in parts.items()}


def num_tokens(parts: list[Measured]) -> float:
    """The number of real tokens of all chains, at their first depths."""
    counts = [chain.sums.get("token_count", {}) for part in parts for chain in part.sums]
    return sum(float(next(iter(count.values()))) for count in counts if count)


def forget_shared_gradients(session: Session, sums: list[TokenSums]) -> None:
    """Make the gradients undefined of matrices that all tokens share: their squares are no sum over processes."""
    logits = session.observer.logits
    for name, number in () if logits is None else logits.of_all_tokens:
        known = sums[0].sums.get(name, {})
        if number in known:
            known[number] = torch.full_like(known[number], torch.nan)
