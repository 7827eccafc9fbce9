"""Which live metrics are of the sampled tokens? Those of the catalogue that need all tokens of a depth, or all depths of a token.

Shapes: L depth, K sampled token, V view of the streams (their mean, then each of several), N stream, D feature, C connection.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.kernels import geometry
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from depthscope.diagnostics.quantities.tokens import Massive
from depthscope.diagnostics.schema import STATE
from depthscope.probes.statistics.live_sums import LiveSums, with_mean
from depthscope.probes.training.live.group import LiveGroup
from depthscope.probes.training.live.measured import Measured, sampled

# Of the mean over streams, whose tokens of all depths are compared.
OF_MEAN = (
    *("effective_rank", "entropy_rank", "participation_ratio", "corrected_participation_ratio", "stable_rank"),
    *("cka", "adjacent_cka", "angular_distance", "block_influence", "num_tokens"),
)
OF_CONNECTIONS = (
    *("deflated_gain", "relative_deflated_gain", "identity_distance", "composite_identity_distance"),
    *("doubly_stochastic_violation", "composite_attenuation", "composite_singular_value", "signal_share"),
)
# They compare tokens of a sequence that follow each other, or all of a sequence's tokens.
OF_SEQUENCES = ("dong_residual", "dirichlet_energy", "curvature", "gradient_rank", "gradient_cosine")

# The sampled tokens are of many sequences, and few beside the features: those of one sequence, and the biased CKA, say nothing.
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
        states = torch.stack([live.states[depth] for depth in group.depths])  # (L, K, N, D)
        gradients = [live.gradient_norms.get(depth) for depth in group.depths]
        self.real = self._real(states.shape[1])
        L, _, N, D = states.shape
        states = states.cpu()[:, self.real]
        self.count = states.shape[1]
        views = with_mean(states.reshape(-1, N, D)).reshape(L, self.count, -1, D)
        self.views_LKVD = views.numpy()
        self.streams_LKND = states.numpy()
        self.gradient_norms = [None if norm is None else norm.cpu().numpy()[self.real] for norm in gradients]
        self.medians_LV, self.massive_K = self._massive()

    def _real(self, count: int) -> np.ndarray:
        real = self._live.places[self._group.depths[0]].real_K
        return np.ones(count, dtype=bool) if real is None else real.cpu().numpy()

    def _massive(self) -> tuple[np.ndarray, np.ndarray]:
        """Medians of the magnitudes that are not zero, (L, V), and which tokens have a massive activation at any depth."""
        sizes = np.abs(np.moveaxis(self.views_LKVD, 2, 1))  # (L, V, K, D)
        medians = np.array([[_median(of_view) for of_view in of_depth] for of_depth in sizes])
        finite = np.isfinite(sizes).all(axis=(2, 3), keepdims=True)
        found = geometry.massive_activations(np.where(finite, np.moveaxis(self.views_LKVD, 2, 1), 0.0))
        return medians, found.any(axis=(0, 1, 3))

    def measure(self, names: Iterable[str]) -> tuple[dict[str, Measured], dict[str, xr.DataArray], dict[str, str]]:
        """Measure metrics of the catalogue.

        Parameters
        ----------
        names : iterable of str
            Their names.

        Returns
        -------
        tuple of dict
            Values by name, nulls by name, and why others have no value.
        """
        values: dict[str, Measured] = {}
        nulls: dict[str, xr.DataArray] = {}
        reasons: dict[str, str] = {}
        sources: dict[bool, Quantities] = {}
        for name in names:
            metric = CATALOGUE[name]
            if name in OF_SEQUENCES:
                reasons[name] = "needs whole sequences: analyze the stored run"
                continue
            of_mean = name in OF_MEAN
            if of_mean not in sources:
                sources[of_mean] = self._quantities(of_mean=of_mean)
            try:
                found = metric.evaluate(sources[of_mean])
            except Unavailable as reason:
                reasons[name] = str(reason)
                continue
            value = self._group.with_all_streams(found[name])
            values[name] = Measured(
                tuple(map(str, value.dims)), value.values.astype(np.float64), sampled(self.count, metric.estimator)
            )
            if f"{name}_null" in found:
                nulls[f"{name}_null"] = self._group.with_all_streams(found[f"{name}_null"])
        return values, nulls, reasons

    def relative_gradient(self) -> dict[str, Measured]:
        """Norms of the gradient times those of the state, token by token; empty without gradients."""
        if all(norm is None for norm in self.gradient_norms):
            return {}
        ordinary = ~self.massive_K
        sizes = np.linalg.norm(self.views_LKVD.astype(np.float64), axis=-1)[:, ordinary]
        found = np.full((len(sizes), sizes.shape[2]), np.nan)
        for at, norm in enumerate(self.gradient_norms):
            if norm is not None:
                found[at] = np.sqrt(((norm[ordinary] * sizes[at]) ** 2).sum(axis=0))
        how = sampled(self.count, CATALOGUE["relative_gradient"].estimator)
        return {"relative_gradient": Measured(("depth", "stream"), found, how)}

    def _quantities(self, *, of_mean: bool) -> Quantities:
        """The quantities of a trace that has the sampled tokens as one sequence; only pooled tokens are measured."""
        states = self.views_LKVD[:, :, :1] if of_mean else self.streams_LKND
        variables = {
            "residual": (STATE, states[:, None]),
            "mask": (("sample", "token"), np.ones((1, self.count), dtype=bool)),
        }
        if not of_mean:
            variables.update(self._coefficients())
        coords = {**self._group.depth_coords, "stream": np.arange(states.shape[2])}
        if any(name in variables for name in ("h_res", "h_post")):
            coords.update(self._group.connection_coords)
        source = Quantities(
            xr.Dataset(variables, coords, attrs=self._group.attrs), choices=CHOSEN
        )
        mask = source["mask"]
        # Of every stream, also where only their mean is measured.
        source.set(
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
        found = {}
        mixes = [self._live.mixes.get(number) for number in group.connections]
        if group.mixes_known and all(mix is not None for mix in mixes):
            applied = [group.applied(number, mix) for number, mix in zip(group.connections, mixes, strict=True)]
            found["h_res"] = (
                ("connection", "sample", "token", "stream_out", "stream_in"),
                self._stacked(applied),
            )
        for name, parts, axis in (("h_pre", self._live.reads, -2), ("h_post", self._live.writes, -1)):
            known = [parts.get(number) for number in group.connections]
            if all(part is not None and part.shape[axis] == 1 for part in known):
                squeezed = [part.squeeze(axis) for part in known]
                found[name] = (("connection", "sample", "token", "stream"), self._stacked(squeezed))
        return found

    def _stacked(self, parts: list[torch.Tensor]) -> np.ndarray:
        return torch.stack(parts).cpu().numpy()[:, None, self.real]


def _median(sizes: np.ndarray) -> float:
    """The median of those that are not zero; NaN where all are. Half of each: a mean of two could exceed float32."""
    known = sizes[sizes > 0]
    return float(2.0 * np.float64(np.median(known / 2))) if known.size else np.nan
