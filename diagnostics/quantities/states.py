"""What becomes of the states? Views of the streams depth by depth, which tokens count, and their spectra.

Shapes: ``V`` views of the streams (their mean, then each), ``S`` sequences, ``T`` tokens, ``D`` features,
``L`` depths, ``N`` tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.kernels import geometry, rank
from depthscope.diagnostics.quantities.registry import Unavailable, quantity

# States of depths that are kept between metrics take at most so many bytes.
KEPT = 256_000_000


class States:
    """States of one chain, one depth in memory at a time: the mean over streams and each of several.

    Parameters
    ----------
    states : DataArray
        Dims (depth, sample, token, stream, feature).
    mask : DataArray
        Dims (sample, token), true on real tokens.
    """

    def __init__(self, states: xr.DataArray, mask: xr.DataArray) -> None:
        self._states = states.transpose(*schema.STATE)
        self.mask = mask.transpose("sample", "token").values.astype(bool)
        if not self.mask.any():
            raise Unavailable("the mask leaves no token: every position is marked as padding")
        self.num_features = states.sizes["feature"]
        self.num_streams = states.sizes["stream"]
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._spoilt: dict[str, int] = {}

    def __len__(self) -> int:
        return int(self._states.sizes["depth"])

    @property
    def streams(self) -> list[str]:
        """Labels of the views: ``mean`` and, for several streams, their numbers."""
        return ["mean", *map(str, range(self.num_streams))] if self.num_streams > 1 else ["mean"]

    @property
    def coords(self) -> dict[str, Any]:
        """Coordinates of the depth."""
        return {str(name): c for name, c in self._states.coords.items() if c.dims == ("depth",)}

    def load(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one depth; kept for the next metric as long as all kept ones take less than `KEPT` bytes.

        Parameters
        ----------
        depth : int
            Position on the depth axis.

        Returns
        -------
        views : ndarray, shape (V, S, T, D)
            Zero on padding, and zero throughout in a view that is not finite; read-only.
        finite : ndarray of bool, shape (V,)
        """
        if depth in self._kept:
            return self._kept[depth]
        found = self._read(depth)
        if found[0].nbytes + sum(views.nbytes for views, _ in self._kept.values()) <= KEPT:
            self._kept[depth] = found
        return found

    def _read(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        streams = np.moveaxis(self._states.variable[depth].values, -2, 0)
        streams = streams[:] if self.mask.all() else np.where(self.mask[..., None], streams, 0)
        finite = np.isfinite(streams).all(axis=(1, 2, 3))
        if not finite.all():
            bad = ~np.isfinite(streams).all(axis=(0, 3))
            self._spoilt[str(self._states["depth"].values[depth])] = int(bad.sum())
            streams = np.where(finite[:, None, None, None], streams, 0)
        if len(streams) > 1:
            mean = streams.mean(axis=0, keepdims=True, dtype=np.float64).astype(streams.dtype) * finite.all()
            streams, finite = np.concatenate([mean, streams]), np.concatenate([[finite.all()], finite])
        streams.flags.writeable = False
        return streams, finite

    @property
    def spoilt(self) -> dict[str, dict[str, int]]:
        """An attribute for a metric that has read every depth: tokens that are not finite, by depth; none where all are."""
        return {schema.NOT_FINITE: dict(sorted(self._spoilt.items()))} if self._spoilt else {}

    def rows(self, views: np.ndarray) -> np.ndarray:
        """The real tokens of views, sequences and tokens as one axis.

        Parameters
        ----------
        views : ndarray, shape (V, S, T, D)
            What `load` gives.

        Returns
        -------
        ndarray, shape (V, N, D)
        """
        return kept_rows(views, self.mask)

    def over_depth(
        self, measure: Callable[[np.ndarray], np.ndarray], dims: tuple[str, ...] = (), **coords: Any
    ) -> xr.DataArray:
        """Measure every depth and every view; NaN where a state is not finite.

        Parameters
        ----------
        measure : function
            Views (V, S, T, D) in, values (V, ...) out.
        dims : tuple of str
            Names of the further dims of a value.
        **coords
            Their coordinates.

        Returns
        -------
        DataArray
            Dims (depth, stream, *dims).
        """
        values = [self._defined(measure, depth) for depth in range(len(self))]
        return self.labelled(np.stack(values), ("depth", "stream", *dims), **coords)

    def over_steps(
        self,
        measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
        dims: tuple[str, ...] = (),
        **coords: Any,
    ) -> xr.DataArray:
        """Measure every step from a depth to the next, on the real tokens; NaN at the first depth.

        Parameters
        ----------
        measure : function
            Views before and after (V, N, D), float64, in, values (V, ...) out.
        dims : tuple of str
            Names of the further dims of a value.
        **coords
            Their coordinates.

        Returns
        -------
        DataArray
            Dims (depth, stream, *dims); NaN where either state is not finite.
        """
        before, known = self._rows(0)
        found = []
        for depth in range(len(self)):
            after, finite = self._rows(depth)
            values = np.asarray(measure(before, after), dtype=float)
            values[~(known & finite) | (depth == 0)] = np.nan
            found.append(values)
            before, known = after, finite
        return self.labelled(np.stack(found), ("depth", "stream", *dims), **coords)

    def _rows(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        views, finite = self.load(depth)
        return self.rows(views).astype(np.float64), finite

    def over_sequences(
        self, measure: Callable[[np.ndarray, np.ndarray | None], np.ndarray], masks: xr.DataArray
    ) -> xr.DataArray:
        """Measure every sequence.

        Parameters
        ----------
        measure : function
            Views (V, S, T, D) and a mask (S, T), None where all tokens count, in, values (V, S) out.
        masks : DataArray
            Dims (tokens, sample, token): which tokens count, by kind.

        Returns
        -------
        DataArray
            Dims (tokens, depth, stream, sequence).
        """
        keeps = masks.transpose("tokens", "sample", "token").values

        def of_kinds(views: np.ndarray) -> np.ndarray:
            found = by_kind(keeps, lambda keep: measure(views, partial_mask(keep)))
            return np.stack(found, axis=1)

        found = self.over_depth(of_kinds, ("tokens", "sequence"), tokens=masks["tokens"])
        return found.transpose("tokens", "depth", "stream", "sequence")

    def _defined(self, measure: Callable[[np.ndarray], np.ndarray], depth: int) -> np.ndarray:
        views, finite = self.load(depth)
        values = np.asarray(measure(views), dtype=float)
        values[~finite] = np.nan
        return values

    def labelled(self, values: np.ndarray, dims: tuple[str, ...], **coords: Any) -> xr.DataArray:
        """Put the chain's coordinates on values.

        Parameters
        ----------
        values : ndarray
            Any values.
        dims : tuple of str
            Their dims; ``depth`` and ``stream`` get the chain's coordinates.
        **coords
            Further coordinates.

        Returns
        -------
        DataArray
        """
        known = self.coords | {"stream": self.streams} if "stream" in dims else self.coords
        if "other_depth" in dims:
            known = known | {"other_depth": ("other_depth", np.asarray(self._states["depth"].values))}
        return xr.DataArray(values, dims=dims, coords=known | coords)


def kept_rows(views: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Tokens that count as one axis, without a copy where all do.

    Parameters
    ----------
    views : ndarray, shape (V, S, T, D)
        Views.
    keep : ndarray of bool, shape (S, T)
        Which tokens count.

    Returns
    -------
    ndarray, shape (V, N, D)
    """
    return views.reshape(len(views), -1, views.shape[-1]) if keep.all() else views[:, keep]


def partial_mask(keep: np.ndarray) -> np.ndarray | None:
    """A mask for a kernel; None, which costs it nothing, where every token counts.

    Parameters
    ----------
    keep : ndarray of bool
        Which tokens count.

    Returns
    -------
    ndarray of bool or None
    """
    return None if keep.all() else keep


def by_kind(keeps: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Measure every kind of token; one that keeps the tokens of the first is not measured again.

    Parameters
    ----------
    keeps : ndarray of bool, shape (kinds, ...)
        Which tokens count, by kind.
    measure : function
        A mask (...) in, values out.

    Returns
    -------
    list of ndarray
        By kind.
    """
    found: list[np.ndarray] = []
    for keep in keeps:
        found.append(found[0] if found and np.array_equal(keep, keeps[0]) else measure(keep))
    return found


@quantity
def residual_states(residual: xr.DataArray, mask: xr.DataArray) -> States:
    """The residual, depth by depth."""
    return States(residual, mask)


@quantity
def stream_states(residual_states: States) -> States:
    """The residual of a run with several streams, for what compares one stream with another."""
    if residual_states.num_streams == 1:
        raise Unavailable("the run has one stream")
    return residual_states


@quantity
def gradient_states(gradient: xr.DataArray, mask: xr.DataArray) -> States:
    """The gradient of the loss with respect to the residual, depth by depth."""
    return States(gradient, mask)


@dataclass(frozen=True)
class Massive:
    """Massive activations of a run: where they are and how large.

    Parameters
    ----------
    token : DataArray
        Dims (sample, token): true where a token holds one at any depth, in any stream.
    fraction : DataArray
        Dims (depth, stream): share of the real tokens that hold one.
    ratio : DataArray
        Dims (depth, stream): the largest activation over the median one.
    features : tuple of int
        Features that hold one.
    """

    token: xr.DataArray
    fraction: xr.DataArray
    ratio: xr.DataArray
    features: tuple[int, ...]

    @property
    def places(self) -> dict[str, list[Any]]:
        """Where they are: features, and (sequence, position) of the first few tokens."""
        tokens = np.argwhere(self.token.values)
        return {"massive_features": list(self.features[:10]), "massive_tokens": tokens[:10].tolist()}


@quantity
def massive(residual_states: States, mask: xr.DataArray) -> Massive:
    """Massive activations at every depth, found in one pass."""
    real = residual_states.mask
    token = np.zeros(real.shape, dtype=bool)
    feature = np.zeros(residual_states.num_features, dtype=bool)

    def measure(views: np.ndarray) -> np.ndarray:
        found = geometry.massive_activations(views, mask=partial_mask(real))
        token[found.any(axis=(0, 3))] = True
        feature[found.any(axis=(0, 1, 2))] = True
        count = np.where(real.sum() > 0, real.sum(), np.nan)
        return np.stack(
            [found.any(axis=3).sum(axis=(1, 2)) / count, _largest_over_median(views, real)], axis=1
        )

    both = residual_states.over_depth(measure, ("what",))
    features = tuple(int(index) for index in np.flatnonzero(feature))
    flags = mask.transpose("sample", "token").copy(data=token)
    return Massive(flags, both.isel(what=0), both.isel(what=1), features)


def _largest_over_median(views: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The largest magnitude over the median one of views (V, S, T, D); NaN where the median is zero."""
    halves = (
        np.abs(kept_rows(views, keep)).reshape(len(views), -1) / 2
    )  # so that the mean of two stays finite
    if not halves.size:
        return np.full(len(views), np.nan)
    middle = np.median(halves, axis=1)
    return halves.max(axis=1) / np.where(middle > 0, middle, np.nan)


@quantity
def token_masks(mask: xr.DataArray, massive: Massive, tokens: tuple[str, ...]) -> xr.DataArray:
    """Which tokens count, by kind: all real ones, or those that are massive at no depth and in no stream.

    One mask for every depth, so that numbers at two depths rest on the same tokens.
    """
    kinds = {"all": mask, "ordinary": mask & ~massive.token}
    chosen = [kinds[kind].transpose("sample", "token").reset_coords(drop=True) for kind in tokens]
    return xr.concat(
        chosen, xr.Variable("tokens", list(tokens)), coords="minimal", compat="override", join="override"
    )


@quantity
def token_counts(token_masks: xr.DataArray, scope: tuple[str, ...]) -> xr.DataArray:
    """How many tokens stand behind a number, by kind and group: each sequence, all pooled; NaN for none."""
    counts = token_masks.sum("token")
    groups = {
        "sequence": counts.rename(sample="group"),
        "data": counts.sum("sample").expand_dims("group", -1),
    }
    stacked = np.concatenate([groups[label].transpose("tokens", "group").values for label in scope], axis=1)
    labels = [label for label in scope for _ in range(groups[label].sizes["group"])]
    coords = {"tokens": token_masks["tokens"], "scope": ("group", labels)}
    return xr.DataArray(np.where(stacked > 0, stacked, np.nan), dims=("tokens", "group"), coords=coords)


@quantity
def singular_values(
    residual_states: States, token_masks: xr.DataArray, token_counts: xr.DataArray, centering: tuple[str, ...]
) -> xr.DataArray:
    """Singular values of the tokens of each sequence and of all pooled; zero beyond the rank."""
    keeps = token_masks.values
    scopes = list(dict.fromkeys(token_counts["scope"].values.tolist()))

    def decompose(views: np.ndarray) -> np.ndarray:
        return np.stack(by_kind(keeps, lambda keep: _spectra(views, keep, scopes, centering)), axis=1)

    dims = ("tokens", "centering", "group", "component")
    labels = {"tokens": token_masks["tokens"], "centering": list(centering), "scope": token_counts["scope"]}
    return residual_states.over_depth(decompose, dims, **labels)


def _spectra(
    views: np.ndarray, keep: np.ndarray, scopes: list[str], centering: tuple[str, ...]
) -> np.ndarray:
    """Spectra (V, centering, group, component) of the kept tokens of views (V, S, T, D)."""
    width = min(keep.size, views.shape[-1])
    spectra = np.zeros((len(views), len(centering), _num_groups(keep, scopes), width))
    for v, view in enumerate(views):
        for c, label in enumerate(centering):
            found = [_spectra_of[scope](view, keep, label == "centred") for scope in scopes]
            for group, values in zip(spectra[v, c], [s for part in found for s in part], strict=True):
                group[: len(values)] = values
    return spectra


def _num_groups(keep: np.ndarray, scopes: list[str]) -> int:
    return sum(len(keep) if scope == "sequence" else 1 for scope in scopes)


def _sequence_spectra(view: np.ndarray, keep: np.ndarray, center: bool) -> np.ndarray:
    return rank.singular_values(view, center=center, mask=partial_mask(keep))


def _pooled_spectra(view: np.ndarray, keep: np.ndarray, center: bool) -> np.ndarray:
    rows = kept_rows(view[None], keep)[0]
    return rank.singular_values(rows[None], center=center) if len(rows) else np.zeros((1, 0))


_spectra_of = {"sequence": _sequence_spectra, "data": _pooled_spectra}


RANKS = ("effective_rank", "entropy_rank", "participation_ratio", "stable_rank")


def free_rows(token_counts: xr.DataArray, centering: tuple[str, ...]) -> xr.DataArray:
    """How many rows noise has that are free: one fewer where the mean is removed; NaN for none.

    Parameters
    ----------
    token_counts : DataArray
        Numbers of tokens.
    centering : tuple of str
        "raw" and "centred".

    Returns
    -------
    DataArray
        With the dim ``centering``.
    """
    of_each = {"raw": token_counts, "centred": (token_counts - 1.0).where(token_counts > 1)}
    return xr.concat([of_each[label] for label in centering], xr.Variable("centering", list(centering)))


@lru_cache(maxsize=4096)
def noise_ranks(num_tokens: float, num_features: int) -> dict[str, float]:
    """The ranks of iid noise of that size, by the Marchenko-Pastur law; NaN for no tokens.

    Parameters
    ----------
    num_tokens : float
        Rows; NaN for none.
    num_features : int
        Columns.

    Returns
    -------
    dict of str to float
        By the name of the rank.
    """
    if np.isnan(num_tokens):
        return dict.fromkeys(RANKS, float("nan"))
    law = rank.marchenko_pastur(int(num_tokens), num_features)
    return {name: float(getattr(law, name)) for name in RANKS}


class MeanStates:
    """The mean over streams of every real token at every depth, in memory once.

    Parameters
    ----------
    states : States
        The states.
    masks : DataArray
        Dims (tokens, sample, token): which tokens count, by kind.
    """

    def __init__(self, states: States, masks: xr.DataArray) -> None:
        real = states.mask
        self._rows = masks.transpose("tokens", "sample", "token").values[:, real]
        loaded = [self._first(states, depth) for depth in range(len(states))]
        self.values = np.stack([view for view, _ in loaded])
        self.finite = np.array([finite for _, finite in loaded])

    @staticmethod
    def _first(states: States, depth: int) -> tuple[np.ndarray, bool]:
        views, finite = states.load(depth)
        return states.rows(views)[0], bool(finite[0])

    def over_kinds(self, measure: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Measure the tokens of each kind; what two kinds share is measured once.

        Parameters
        ----------
        measure : function
            States (L, N, D) in, values (...) out.

        Returns
        -------
        ndarray
            (tokens, ...).
        """
        kept = by_kind(self._rows, lambda rows: measure(self.values if rows.all() else self.values[:, rows]))
        return np.stack(kept)


@quantity
def mean_states(residual_states: States, token_masks: xr.DataArray) -> MeanStates:
    """The mean over streams of every real token at every depth."""
    return MeanStates(residual_states, token_masks)
