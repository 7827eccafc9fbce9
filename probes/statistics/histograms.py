"""How are values of every token distributed, where only sums can be exchanged? Counts in bins of equal ratio.

Shapes: t every token, V a value's components, b bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from depthscope.diagnostics.quantities.mixing_matrices import QUANTILES


@dataclass(frozen=True)
class Bins:
    """Bins whose upper edges are first · 2^(i / per_octave); one more bin has what is above the last edge."""

    first: float  # the lowest edge, below which all values are in one bin
    octaves: int  # how many doublings lie between the lowest edge and the highest
    per_octave: int  # number of bins in each

    @property
    def edges(self) -> np.ndarray:
        """Upper edges, which belong to their bin."""
        return self.first * 2.0 ** (np.arange(self.octaves * self.per_octave + 1) / self.per_octave)

    @property
    def number(self) -> int:
        """Number of bins."""
        return self.octaves * self.per_octave + 2


# Gains of products: e^-11 to e^17. A massive activation is above 100, so that this limit is an edge.
BINS = {"largest": Bins(100.0, 32, 8)}
OF_GAINS = Bins(2.0**-16, 40, 16)


def bins_of(name: str) -> Bins:
    """The bins of one of `LiveSums.values`."""
    return BINS.get(name, OF_GAINS)


@dataclass(frozen=True)
class Histogram:
    """The distribution of values over tokens."""

    bins: Bins  # what is counted together
    count_Vb: np.ndarray  # number of tokens
    undefined_V: np.ndarray  # number of tokens whose value is NaN, which are in no bin
    total_V: np.ndarray  # sum of the defined values
    lowest_V: np.ndarray  # of the defined values
    highest_V: np.ndarray  # of the defined values

    def number_above(self, limit_V: np.ndarray) -> np.ndarray:
        """Number of tokens (V,) above a limit, rounded up to the next edge; NaN where a value or the limit is undefined."""
        edges = self.bins.edges
        found = []
        for count_b, limit, undefined in zip(self.count_Vb, limit_V, self.undefined_V, strict=True):
            above = count_b[np.searchsorted(edges, limit) + 1 :].sum()
            found.append(np.nan if undefined or np.isnan(limit) else above)
        return np.array(found, dtype=np.float64)

    def reductions(self) -> np.ndarray:
        """Mean, quantiles and maximum (V, reduction), as `over_last` gives them; quantiles to the width of a bin."""
        found = np.full((len(self.total_V), len(QUANTILES) + 2), np.nan)
        for v, count_b in enumerate(self.count_Vb):
            number = count_b.sum()
            if number and not self.undefined_V[v]:
                quantiles = [self._quantile(v, share) for share in QUANTILES]
                found[v] = [self.total_V[v] / number, *quantiles, self.highest_V[v]]
        return found

    def _quantile(self, v: int, share: float) -> float:
        """A quantile of one component: values lie evenly within their bin, and all of them between lowest and highest."""
        cumulative = self.count_Vb[v].cumsum()
        wanted = share * (cumulative[-1] - 1)
        b = int(np.searchsorted(cumulative, wanted, side="right"))
        edges = self.bins.edges
        lower = max(self.lowest_V[v], edges[b - 1] if b else -np.inf)
        upper = min(self.highest_V[v], edges[b] if b < len(edges) else np.inf)
        if not upper > lower or not np.isfinite(upper - lower):
            return float(upper)
        inside = (wanted - (cumulative[b] - self.count_Vb[v][b])) / max(self.count_Vb[v][b] - 1, 1)
        return float(lower + (upper - lower) * min(inside, 1.0))


def counts(values_tV: torch.Tensor, bins: Bins) -> torch.Tensor:
    """What can be added of some values: (V, number of bins + 2), counts, then the number of NaN and the sum of the others."""
    values = values_tV.double()
    defined = ~values.isnan()
    edges = torch.from_numpy(bins.edges).to(values.device)
    found = values.new_zeros(values.shape[1], bins.number + 2)
    place = torch.bucketize(values.nan_to_num(0.0, torch.inf, -torch.inf).contiguous(), edges)
    for v in range(values.shape[1]):
        of_defined = place[:, v][defined[:, v]]
        found[v, : bins.number] = torch.bincount(of_defined, minlength=bins.number)
    found[:, -2] = (~defined).sum(0)
    found[:, -1] = torch.where(defined, values, 0.0).sum(0)
    return found


def extremes(values_tV: torch.Tensor) -> torch.Tensor:
    """What combines by maximum of some values: (V, 2), the negative of the lowest and the highest, without NaN."""
    values = values_tV.double()
    missing = values.isnan()
    lowest = (
        torch.where(missing, torch.inf, values).amin(0)
        if len(values)
        else values.new_full(values.shape[1:], torch.inf)
    )
    highest = torch.where(missing, -torch.inf, values).amax(0) if len(values) else -lowest
    return torch.stack([-lowest, highest], dim=1)


def histogram(bins: Bins, counted: np.ndarray, extreme: np.ndarray) -> Histogram:
    """The histogram of added `counts` and combined `extremes`.

    ``counted, extreme``: (V, number of bins + 2) and (V, 2).
    """
    return Histogram(
        bins,
        counted[:, :-2],
        counted[:, -2],
        counted[:, -1],
        lowest_V=-extreme[:, 0],
        highest_V=extreme[:, 1],
    )
