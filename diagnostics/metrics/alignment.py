"""Do depths agree by another measure than CKA? Canonical correlations, shapes, distances, neighbours.

States are compared in the mean over streams. All are expensive, up to seconds for a few tens of depths:
they are computed when requested by name, over at most `ROWS` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import similarity as kernel
from depthscope.diagnostics.metrics.declaration import Null, metric
from depthscope.diagnostics.quantities.mean_states import MeanStates
from depthscope.diagnostics.quantities.registry import Unavailable, quantity
from depthscope.diagnostics.quantities.tokens import evenly_spaced, for_each_count

# Tokens compared, evenly spaced over all of them: neighbours and distances cost their square. Heuristic.
ROWS = 512
# As in the paper on the platonic representation hypothesis (Huh et al. 2024).
NEIGHBOURS = 10
SAMPLED = f"over at most {ROWS} tokens, evenly spaced"
# One stack of states (L, N, D) in, all pairs (L, L) out; or two states (N, D) in, a number out.
Compare = Callable[..., np.ndarray]


# With the signature of `Metric.most_tokens`, as the next one, which does depend on the width.
def _most_tokens(width: int) -> int:
    return ROWS


class Pairs:
    """Pairs of depths of one chain.

    ``mean_states``: the mean over streams.
    """

    def __init__(self, mean_states: MeanStates) -> None:
        self._mean = mean_states

    def compare(self, measure: Compare, *, most: Callable[[int], int] = _most_tokens) -> xr.Variable:
        """Compare every depth with every other.

        ``measure``: states (L, N, D) in, all pairs (L, L) out; a ValueError is its refusal.
        ``most``: the number of features in, the most tokens that are taken out.
        Returns: Dims (tokens, depth, other_depth): ``depth`` is the first of the two. NaN where a state is not finite,
        and for a kind of token that the measure refuses.
        Raises Unavailable: Where it refuses every kind, with the reason that it gives.
        """
        # A kind of token may be too small while another is not: only if all are is the metric unavailable.
        refusals: list[str] = []
        limit = most(self._mean.values.shape[-1])
        tables = self._mean.over_kinds(partial(self._table, measure, refusals, limit))
        if np.isnan(tables).all() and refusals:
            raise Unavailable(refusals[0])
        tables = np.where(self._mean.finite_pairs, tables, np.nan)
        return xr.Variable(("tokens", "depth", "other_depth"), tables)

    @staticmethod
    def _table(measure: Compare, refusals: list[str], most: int, states: np.ndarray) -> np.ndarray:
        # The same choice as the jackknife makes (see `_thinned_mask` there).
        states = states[:, evenly_spaced(states.shape[1], most)]
        try:
            if not states.shape[1]:
                raise InputError("no token of this kind is left")
            return measure(states)
        except ValueError as refusal:
            refusals.append(str(refusal))
            return np.full((len(states), len(states)), np.nan)


@quantity
def depth_pairs(mean_states: MeanStates) -> Pairs:
    """Every pair of depths."""
    return Pairs(mean_states)


def _of_noise(measure: Compare, most: Callable[[int], int] = _most_tokens, draws: int = 1) -> Null:
    """What a measure gives for independent noise of the same size; NaN where it refuses that size."""

    @lru_cache(maxsize=256)
    def of_size(count: int, width: int) -> float:
        rng = np.random.default_rng(0)  # the same null for the same size in every analysis
        sides = (rng.standard_normal((2, count, width)) for _ in range(draws))
        try:
            return float(np.mean([measure(left, right) for left, right in sides]))
        except ValueError:  # too few tokens: what is measured is refused too
            return float("nan")

    def expectation(token_masks: xr.Variable, num_features: int) -> xr.Variable:
        """That of two independent sets of iid noise of the same size, drawn with a fixed seed."""
        counts = token_masks.sum(("sample", "token")).clip(max=most(num_features))
        return for_each_count(counts, lambda n: of_size(int(n), num_features))

    return expectation


@metric(
    symbol=r"\theta_{\mathrm{Procrustes}}",
    dims="tokens depth other_depth",
    label="Procrustes",
    units="rad",
    cite="williams2021generalized",
    basis="stream",
    null=_of_noise(kernel.procrustes),
    estimator=f"exact; {SAMPLED}",
    default=False,
    most_tokens=_most_tokens,
    null_error=0.02,
)
def procrustes(depth_pairs: Pairs) -> xr.Variable:
    r"""Procrustes distance between depths: the angle left after the best rotation, 0 for the same shape.

    .. math:: \arccos \|X^\top Y\|_* \quad\text{of centred states at } \|\cdot\|_F = 1
    """
    return depth_pairs.compare(kernel.procrustes)


def _shared_by_chance(token_masks: xr.Variable) -> xr.Variable:
    """k/(N − 1)."""
    # Two independent draws of k of the N − 1 other tokens have k²/(N − 1) in common, a share of k/(N − 1).
    count = token_masks.sum(("sample", "token")).clip(max=ROWS)
    return (NEIGHBOURS / (count - 1.0).where(count > NEIGHBOURS)).clip(max=1.0)


@metric(
    symbol=r"m_{\mathrm{kNN}}",
    dims="tokens depth other_depth",
    label="mutual kNN",
    cite="huh2024platonic",
    basis="stream",
    null=_shared_by_chance,
    estimator=f"{NEIGHBOURS} nearest by cosine; {SAMPLED}",
    default=False,
    most_tokens=_most_tokens,
    null_error=0.05,
)
def mutual_knn(depth_pairs: Pairs) -> xr.Variable:
    """Mutual nearest neighbours: the share of a token's ten nearest that two depths agree on."""
    return depth_pairs.compare(partial(kernel.mutual_knn, k=NEIGHBOURS))


@metric(
    symbol=r"\mathrm{CKNNA}",
    dims="tokens depth other_depth",
    label="CKNNA",
    cite="huh2024platonic",
    basis="stream",
    # Few pairs are among the nearest on both sides, so that one draw is rough: four halve its error.
    null=_of_noise(partial(kernel.cknna, k=NEIGHBOURS), draws=4),
    estimator=f"unbiased HSIC1 over the pairs among {NEIGHBOURS} nearest on both sides; {SAMPLED}",
    default=False,
    most_tokens=_most_tokens,
    null_error=0.15,
)
def cknna(depth_pairs: Pairs) -> xr.Variable:
    """CKA over shared nearest neighbours: agreement of the local geometry alone.

    Of unrelated data it is not 0 but about k/(N − 1), the share of neighbours that agree by chance.
    """
    return depth_pairs.compare(partial(kernel.cknna, k=NEIGHBOURS))
