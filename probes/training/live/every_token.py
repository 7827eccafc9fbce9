"""Which live metrics are exact over every token? Those that sums, maxima and gains of every token give.

Shapes: L depth, V view of the streams (their mean, then each of several), C connection, N stream, t every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from depthscope.diagnostics.quantities.mixing_matrices import over_last
from depthscope.diagnostics.quantities.registry import LABELS
from depthscope.diagnostics.schema import CUT_GRADIENT, WITHOUT_GRADIENT
from depthscope.probes.run.statistics_dataset import GRADIENT
from depthscope.probes.session.logit_statistics import LOGIT_GRADIENT, MIXING_GRADIENT
from depthscope.probes.statistics.histograms import BINS, OF_GAINS, Histogram
from depthscope.probes.statistics.live_sums import PADDING, LiveSums
from depthscope.probes.statistics.token_sums import TokenSums
from depthscope.probes.training.live.live_value import LiveValue

PROFILE = ("depth", "stream")
# The absolute and the relative size of a massive activation, as in `kernels.geometry.massive_activations`.
ABSOLUTE, RELATIVE = 100.0, 1000.0


def state_metrics(sums: TokenSums, depths: Sequence[int], cut: Sequence[int] = ()) -> dict[str, LiveValue]:
    """Sizes, directions and gradients by depth and view.

    ``sums``: of all forwards of the step, of one chain.
    """
    count = _views(sums, "token_count", depths)
    found = {"residual_norm": LiveValue(PROFILE, np.sqrt(_views(sums, "square_norm_sum", depths) / count))}
    units = _views(sums, "unit_square", depths)
    directed = _views(sums, "unit_count", depths)
    pairs = directed * (directed - 1.0)
    cosine = (units - directed) / np.where(pairs > 0, pairs, np.nan)
    dims = ("scope", "tokens", "centering", *PROFILE)
    # Labelled as one variant of an analysis; the others, of ordinary or centred tokens, need every token twice.
    variants = np.full((1, 2, 2, *cosine.shape), np.nan)
    variants[0, 0, 0] = cosine
    found["token_cosine"] = LiveValue(dims, variants)
    adjacent = _views(sums, "adjacent_cosine_sum", depths) / count
    found["adjacent_cosine"] = LiveValue(PROFILE, adjacent)
    if _has_any(sums, GRADIENT, depths):
        norm = np.sqrt(_views(sums, GRADIENT, depths))
        last = norm[-1:]
        # Without these a gradient that no backward gives, such as that of an input, would look like a broken one.
        missing = [depth for depth in depths if depth not in sums.sums[GRADIENT]]
        listed = {WITHOUT_GRADIENT: missing, CUT_GRADIENT: [depth for depth in cut if depth in missing]}
        attrs = {name: of for name, of in listed.items() if of}
        found["gradient_norm"] = LiveValue(PROFILE, norm, attrs=attrs)
        found["backward_gain"] = LiveValue(PROFILE, norm / np.where(last > 0, last, np.nan))
    return found


def _views(sums: TokenSums, name: str, depths: Sequence[int]) -> np.ndarray:
    """One statistic of every view, (L, V): of the mean over several streams, then of each stream; NaN where missing."""
    parts = [sums] if sums.mean_view is None else [sums.mean_view, sums]
    arrays = []
    for part in parts:
        known = _squared_units(part) if name == "unit_square" else part.sums.get(name, {})
        arrays.append(_stacked(known, depths))
    widest = max((array.shape[1] for array in arrays), default=1)
    return np.concatenate(arrays, axis=1) if name != "token_count" else arrays[0][:, :widest]


def _squared_units(part: TokenSums) -> dict[int, torch.Tensor]:
    return {depth: unit.square().sum(-1) for depth, unit in part.sums.get("unit_sum", {}).items()}


def _stacked(parts: dict[int, torch.Tensor], keys: Sequence[int]) -> np.ndarray:
    """Vectors by key, (keys, …), read back from their device at once; NaN where one is missing."""
    known = [key for key in keys if key in parts]
    if not known:
        return np.full((len(keys), 1), np.nan)
    values = torch.stack([parts[key].double().reshape(-1) for key in known]).cpu().numpy()
    found = np.full((len(keys), values.shape[1]), np.nan)
    found[[list(keys).index(key) for key in known]] = values
    return found


def stream_metrics(live: LiveSums, depths: Sequence[int]) -> dict[str, LiveValue]:
    """Cosines between the streams of a token, by depth; empty for one stream."""
    if "stream_cosine_sum" not in live.sums:
        return {}
    total = _stacked(live.sums["stream_cosine_sum"], depths)[:, 0]
    count = _stacked(live.sums["stream_cosine_count"], depths)[:, 0]
    pairs = _stacked(live.sums["pair_cosine_sum"], depths)
    complete = _stacked(live.sums["pair_cosine_count"], depths)
    num_streams = round(pairs.shape[1] ** 0.5)
    upper = np.triu_indices(num_streams, 1)
    means = pairs.reshape(-1, num_streams, num_streams)[:, *upper] / np.where(complete > 0, complete, np.nan)
    return {
        "stream_cosine": LiveValue(("depth",), total / np.where(count > 0, count, np.nan)),
        "closest_stream_cosine": LiveValue(("depth",), means.max(axis=1)),
    }


def massive_tokens(
    live: LiveSums, depths: Sequence[int], medians: np.ndarray, count: np.ndarray, estimator: str
) -> dict[str, LiveValue]:
    """Massive activations: sizes of every token, beside the median of the sampled ones.

    ``live``: with the largest magnitude of every token.
    ``medians``: (L, V), of the magnitudes that are not zero.
    """
    how = f"largest activation of every token; median {estimator}"
    if live.histograms:
        return _massive_by_histogram(live, depths, medians, count, how)
    largest = [live.values["largest"][depth].cpu().numpy().astype(np.float64) for depth in depths]
    fractions, ratios = [], []
    for values_tV, median_V, real in zip(largest, medians, count, strict=True):
        massive = (values_tV > ABSOLUTE) & (values_tV > RELATIVE * median_V)
        undefined = np.where(np.isnan(values_tV).any(axis=0), np.nan, 0.0)
        fractions.append(massive.sum(axis=0) / real + undefined)
        ratios.append(values_tV.max(axis=0) / median_V)
    return {
        "massive_token_fraction": LiveValue(PROFILE, np.array(fractions), how),
        "massive_activation": LiveValue(PROFILE, np.array(ratios), how),
    }


def _massive_by_histogram(
    live: LiveSums, depths: Sequence[int], medians: np.ndarray, count: np.ndarray, how: str
) -> dict[str, LiveValue]:
    """The same of several processes, whose tokens are counted by size."""
    known = [live.histograms["largest"][depth] for depth in depths]
    limits = np.maximum(ABSOLUTE, RELATIVE * medians)
    above = np.array([of.number_above(limit_V) for of, limit_V in zip(known, limits, strict=True)])
    largest = np.array([np.where(of.undefined_V > 0, np.nan, of.highest_V) for of in known])
    counted = (
        f"{how}; limits are rounded up by at most a factor of {2 ** (1 / BINS['largest'].per_octave):.3f}"
    )
    return {
        "massive_token_fraction": LiveValue(PROFILE, above / count[:, None], counted),
        "massive_activation": LiveValue(PROFILE, largest / medians, how),
    }


def gain_metrics(live: LiveSums, connections: Sequence[int], transposed: bool) -> dict[str, LiveValue]:
    """Amax gains of every connection and of the products up to it, reduced over every token; empty without mixing.

    ``transposed``: whether the matrices are source by destination, as was proven.
    """
    # Of a matrix that is the transposed one, rows and columns change places, and so does the order of a product.
    product = "reversed_product_gain" if transposed else "product_gain"
    found = {}
    for name, source in (("mixing_gain", "gain"), ("composite_gain", product)):
        of_processes = live.histograms.get(source, {})
        if of_processes and all(number in of_processes for number in connections):
            found[name] = _gains_by_histogram([of_processes[number] for number in connections], transposed)
            continue
        known = live.values.get(source, {})
        if not all(number in known for number in connections):
            continue
        gains = torch.stack([known[number] for number in connections]).cpu().numpy()  # (C, t, 2)
        gains = gains[:, gains[0, :, 0] != PADDING]
        if transposed:
            gains = gains[..., ::-1]
        values = over_last(np.moveaxis(gains, 1, -1))  # (C, 2, reduction)
        found[name] = LiveValue(("direction", "connection", "reduction"), np.moveaxis(values, 1, 0))
    return found


def logit_metrics(sums: TokenSums, connections: Sequence[int], transposed: bool) -> dict[str, LiveValue]:
    """Range of the logits of H_res, and how much gradient reaches H_res and them; empty where they were not seen.

    ``sums``: of all forwards of the step, of the chain.
    ``transposed``: whether the matrices are source by destination, as was proven.
    Returns: Of the range over the tokens the mean alone: its quantiles would need the logits of every token.
    """
    found = {}
    if _has_any(sums, "logit_token_count", connections):
        count = _stacked(sums.sums["logit_token_count"], connections)[:, 0]
        total = _stacked(sums.sums["logit_range_sum"], connections)[:, int(transposed)]
        ranges = np.full((len(connections), len(LABELS["reduction"])), np.nan)
        ranges[:, LABELS["reduction"].index("mean")] = total / np.where(count > 0, count, np.nan)
        found["logit_range"] = LiveValue(("connection", "reduction"), ranges)
    names = {"logit_gradient": LOGIT_GRADIENT, "mixing_gradient": MIXING_GRADIENT}
    for name, source in names.items():
        if _has_any(sums, source, connections):
            square = _stacked(sums.sums[source], connections)[:, 0]
            found[name] = LiveValue(("connection",), np.sqrt(square))
    if names.keys() <= found.keys():
        arrived = found["mixing_gradient"].values
        share = found["logit_gradient"].values / np.where(arrived > 0, arrived, np.nan)
        found["logit_gradient_share"] = LiveValue(("connection",), share)
    return found


def _has_any(sums: TokenSums, name: str, keys: Sequence[int]) -> bool:
    """Whether a statistic was measured at all: its values do not say so, since NaN is one of them."""
    return any(key in sums.sums.get(name, {}) for key in keys)


def _gains_by_histogram(known: Sequence[Histogram], transposed: bool) -> LiveValue:
    """The same of several processes; mean and maximum are exact."""
    values = np.stack([of.reductions() for of in known], axis=1)  # (2, C, reduction)
    how = f"every token; quantiles from counts in {OF_GAINS.per_octave} bins per octave"
    return LiveValue(("direction", "connection", "reduction"), values[::-1] if transposed else values, how)


def share_metrics(live: LiveSums, connections: Sequence[int]) -> dict[str, LiveValue]:
    """Shares of the streams in what connections read and write; the label ``mean`` has none."""
    found = {}
    for name, source in (("read_share", "read_size_sum"), ("write_share", "write_size_sum")):
        known = live.sums.get(source, {})
        if all(number in known for number in connections):
            sizes = _stacked(known, connections)
            total = sizes.sum(axis=1, keepdims=True)
            shares = sizes / np.where(total > 0, total, np.nan)
            labelled = np.concatenate([np.full((len(sizes), 1), np.nan), shares], axis=1)
            found[name] = LiveValue(("connection", "stream"), labelled)
    return found
