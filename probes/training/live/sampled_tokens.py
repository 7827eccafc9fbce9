"""Which live metrics are of the sampled tokens? Those that compare tokens, or the depths of a token.

Shapes: L depth, K sampled token, V view of the streams (their mean, then each of several), N stream, D feature, C connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.kernels.mixing import stream_shares
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.metrics.logits import saturation
from depthscope.diagnostics.quantities.mixing_matrices import Mixing, over_tokens
from depthscope.diagnostics.quantities.over_sequences import fold
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import STATE
from depthscope.probes.statistics.compiled_sample import token_sizes
from depthscope.probes.statistics.live_sums import LiveSums, with_mean
from depthscope.probes.training.live.every_token import ABSOLUTE, RELATIVE
from depthscope.probes.training.live.group import LiveGroup
from depthscope.probes.training.live.live_value import LiveValue, sampled
from depthscope.probes.training.live.mean_states import mean_state_metrics, rank_metrics
from depthscope.probes.training.live.mixing_products import mixing_metrics

# Of the mean over streams, whose tokens of all depths are compared.
OF_MEAN = (
    *(
        "effective_rank",
        "entropy_rank",
        "participation_ratio",
        "corrected_participation_ratio",
        "stable_rank",
    ),
    *("cka", "adjacent_cka", "angular_distance", "block_influence", "num_tokens"),
)
# Of the spectra in the mean over streams too; those of every stream would cost as many times as much.
OF_MEAN_SPECTRA = (
    *(
        "numerical_rank",
        "top_energy",
        "alpha_req",
        "alpha_req_error",
        "singular_value",
        "intrinsic_dimension",
    ),
)
OF_MIXING = (
    *("deflated_gain", "relative_deflated_gain", "identity_distance", "composite_identity_distance"),
    *("doubly_stochastic_violation", "composite_attenuation", "composite_singular_value"),
)
OF_CONNECTIONS = (*OF_MIXING, "signal_share")
# They compare tokens of a sequence that follow each other, or all of a sequence's tokens.
OF_SEQUENCES = (
    *("dong_residual", "dirichlet_energy", "curvature", "gradient_rank", "gradient_cosine"),
    *("variance_growth", "relative_turn", "effective_depth"),
)

# Pooled: the sampled tokens are of many sequences. And as they are few, a biased CKA would be that of noise.
CHOSEN = {"scope": "data", "estimator": "unbiased"}


class SampledTokens:
    """The sampled tokens of one group in one step.

    Parameters
    ----------
    live : LiveSums
        Of the step.
    group : LiveGroup
        Which depths and connections.
    """

    def __init__(self, live: LiveSums, group: LiveGroup) -> None:
        self._live, self._group = live, group
        gradients = [live.gradient_norms.get(depth) for depth in group.depths]
        self.real = self._real(len(live.states[group.depths[0]]))
        self.states = [self._of_real(live.states[depth]) for depth in group.depths]  # (K, N, D) by depth
        self.count = len(self.states[0])
        sizes = [token_sizes(states_KND) for states_KND in self.states]
        self.mean_LKD, self.norms_LKV, self.medians_LV = (
            np.stack(parts) for parts in zip(*sizes, strict=True)
        )
        self.gradient_norms = [None if norm is None else self._of_real(norm) for norm in gradients]
        self.massive_K = self._massive()

    def _of_real(self, values_K: torch.Tensor) -> np.ndarray:
        values = values_K.cpu().numpy()
        return values if self.real.all() else values[self.real]

    def _real(self, count: int) -> np.ndarray:
        real = self._live.places[self._group.depths[0]].real_K
        return np.ones(count, dtype=bool) if real is None else real.cpu().numpy()

    def _massive(self) -> np.ndarray:
        """Which tokens have a massive activation at any depth."""
        found = np.zeros(self.count, dtype=bool)
        limits = np.maximum(ABSOLUTE, RELATIVE * self.medians_LV)
        for depth, view in np.argwhere(self._largest() > limits):  # none in most networks
            sizes = np.abs(with_mean(torch.from_numpy(self.states[depth])).numpy()[:, view])
            if np.isfinite(sizes).all():
                found |= (sizes > limits[depth, view]).any(axis=1)
        return found

    def _largest(self) -> np.ndarray:
        """The largest magnitude of every token, (L, V), at least that of the sampled ones."""
        values = [self._live.values["largest"][depth].amax(0) for depth in self._group.depths]
        return torch.stack(values).double().cpu().numpy()

    def mean_states(self, *, each_stream: bool) -> dict[str, LiveValue]:
        """Ranks, similarities and angles in the mean over streams.

        ``each_stream``: ranks of each of several streams too, which cost as much again for each; NaN otherwise.
        """
        found = {}
        streams = range(len(self._group.streams) - 1)
        single = []
        if each_stream:
            states_LKND = np.stack(self.states)
            single = [rank_metrics(states_LKND[:, :, stream], ~self.massive_K) for stream in streams]
        for name, (dims, values) in mean_state_metrics(self.mean_LKD, ~self.massive_K).items():
            metric = CATALOGUE[name]
            if "stream" in metric.dims:
                unknown = [np.full(values.shape, np.nan) for _ in streams]
                of_streams = [of_one[name][1] for of_one in single if name in of_one] or unknown
                dims, values = (*dims, "stream"), np.stack([values, *of_streams], axis=-1)
            found[name] = LiveValue(dims, values, sampled(self.count, metric.estimator))
        return found

    def connections(self) -> dict[str, LiveValue]:
        """What the products of the matrices do, and which stream gives most of what is read."""
        variables = self._coefficients()
        found: dict[str, LiveValue] = {}
        if "h_res" in variables:
            mask = xr.DataArray(np.ones((1, self.count), dtype=bool), dims=("sample", "token"))
            mixing = Mixing(xr.DataArray(variables["h_res"][1], dims=variables["h_res"][0]), mask)
            for name, (dims, values) in mixing_metrics(mixing).items():
                found[name] = LiveValue(dims, values, sampled(self.count, CATALOGUE[name].estimator))
        reads = [int(depth) for depth in self._group.connection_coords.get("depth_in", ((), ()))[1]]
        if "h_pre" in variables and set(reads) <= set(self._group.depths):
            sizes = self.norms_LKV[[self._group.depths.index(depth) for depth in reads]][..., 1:]
            weights = np.abs(variables["h_pre"][1][:, 0]) * sizes
            labelled = np.full((len(weights), 1 + weights.shape[-1]), np.nan)  # the mean has no share
            for shares, of_one in zip(labelled, weights, strict=True):
                if np.isfinite(of_one).all():
                    shares[1:] = stream_shares(of_one)
            how = sampled(self.count, CATALOGUE["signal_share"].estimator)
            found["signal_share"] = LiveValue(("connection", "stream"), labelled, how)
        return found

    def _measured(self, name: str, value: xr.DataArray) -> LiveValue:
        labelled = self._group.with_all_streams(value)
        how = sampled(self.count, CATALOGUE[name].estimator)
        return LiveValue(tuple(map(str, labelled.dims)), labelled.values.astype(np.float64), how)

    def saturation(self) -> dict[str, LiveValue]:
        """How much less of a gradient the projection of the logits lets through; empty where it is none that is known."""
        variables = self._coefficients()
        if "h_res" not in variables:
            return {}
        matrices = variables["h_res"][1][:, 0].astype(np.float64)
        finite = np.isfinite(matrices).all((1, 2, 3))
        values = np.full(matrices.shape[:2], np.nan)
        try:
            values[finite] = saturation(matrices[finite]) if finite.any() else np.nan
        except Unavailable:
            return {}
        how = sampled(self.count, CATALOGUE["logit_saturation"].estimator)
        return {"logit_saturation": LiveValue(("connection", "reduction"), over_tokens(values), how)}

    def measure(
        self, names: Iterable[str]
    ) -> tuple[dict[str, LiveValue], dict[str, xr.DataArray], dict[str, str]]:
        """Measure metrics of the catalogue.

        Returns: Values by name, nulls by name, and why others have no value.
        """
        values: dict[str, LiveValue] = {}
        nulls: dict[str, xr.DataArray] = {}
        reasons: dict[str, str] = {}
        sources: dict[bool, Quantities] = {}
        for name in names:
            metric = CATALOGUE[name]
            if name in OF_SEQUENCES:
                reasons[name] = "needs whole sequences: analyze the stored run"
                continue
            of_mean = name in OF_MEAN_SPECTRA
            if of_mean not in sources:
                sources[of_mean] = self._quantities(of_mean=of_mean)
            try:
                found = metric.evaluate(sources[of_mean])
            except Unavailable as reason:
                reasons[name] = str(reason)
                continue
            values[name] = self._measured(name, found[name])
            if f"{name}_null" in found:
                nulls[f"{name}_null"] = self._group.with_all_streams(found[f"{name}_null"])
        return values, nulls, reasons

    def nulls(self, names: Iterable[str]) -> dict[str, xr.DataArray]:
        """The nulls of metrics in the mean over streams, as `NAME_null`; empty for those whose null is a constant."""
        source = self._quantities(of_mean=True)
        found = {}
        for name in names:
            metric = CATALOGUE[name]
            if callable(metric.null):
                null = metric.stamp(fold(source.call(metric.null))[0], "expected of iid noise")
                found[f"{name}_null"] = self._group.with_all_streams(null)
        return found

    def relative_gradient(self) -> dict[str, LiveValue]:
        """Norms of the gradient times those of the state, token by token; empty without gradients."""
        if all(norm is None for norm in self.gradient_norms):
            return {}
        ordinary = ~self.massive_K
        sizes = self.norms_LKV[:, ordinary]
        found = np.full((len(sizes), sizes.shape[2]), np.nan)
        for at, norm in enumerate(self.gradient_norms):
            if norm is not None:
                streams = sizes[at][:, -norm.shape[1] :]  # of several, their mean has none
                found[at, -norm.shape[1] :] = np.sqrt(((norm[ordinary] * streams) ** 2).sum(axis=0))
        how = sampled(self.count, CATALOGUE["relative_gradient"].estimator)
        return {"relative_gradient": LiveValue(("depth", "stream"), found, how)}

    def _quantities(self, *, of_mean: bool) -> Quantities:
        """The quantities of a trace that has the sampled tokens as one sequence; only pooled tokens are measured."""
        states = self.mean_LKD[:, :, None] if of_mean else np.stack(self.states)
        variables = {
            "residual": (STATE, states[:, None]),
            "mask": (("sample", "token"), np.ones((1, self.count), dtype=bool)),
        }
        if not of_mean:
            variables.update(self._coefficients())
        coords = {**self._group.depth_coords, "stream": np.arange(states.shape[2])}
        if any(name in variables for name in ("h_res", "h_post")):
            coords.update(self._group.connection_coords)
        source = Quantities(xr.Dataset(variables, coords, attrs=self._group.attrs), choices=CHOSEN)
        mask = source["mask"]
        # Of every stream, also where only their mean is measured.
        source.give(
            "massive",
            Massive(
                token=mask.copy(data=self.massive_K[None]),
                fraction=xr.DataArray(np.nan),
                ratio=xr.DataArray(np.nan),
                features=(),
                tokens_per_sequence=float(self.count),
            ),
        )
        return source

    def _coefficients(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """The coefficients of the connections at the sampled tokens, as a trace has them."""
        group = self._group
        if not group.connections:
            return {}
        found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        route = ("connection", "sample", "token")
        mixes = self._of_connections(self._live.mixes)
        if group.mixes_known and mixes is not None:
            applied = [
                group.applied(number, mix) for number, mix in zip(group.connections, mixes, strict=True)
            ]
            found["h_res"] = ((*route, "stream_out", "stream_in"), self._stacked(applied))
        for name, parts, axis in (("h_pre", self._live.reads, -2), ("h_post", self._live.writes, -1)):
            known = self._of_connections(parts)
            if known is not None and all(part.shape[axis] == 1 for part in known):
                found[name] = ((*route, "stream"), self._stacked([part.squeeze(axis) for part in known]))
        return found

    def _of_connections(self, parts: Mapping[int, torch.Tensor]) -> list[torch.Tensor] | None:
        """One part of every connection of the group; None where some connection lacks it."""
        numbers = self._group.connections
        return [parts[number] for number in numbers] if all(number in parts for number in numbers) else None

    def _stacked(self, parts: list[torch.Tensor]) -> np.ndarray:
        return torch.stack(parts).cpu().numpy()[:, None, self.real]
