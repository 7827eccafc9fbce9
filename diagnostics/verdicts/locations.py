"""Where is a finding, in words? Depths, connections and modules as people name them."""

from __future__ import annotations

import numpy as np
import xarray as xr

_SITES = {"mid": "inside block {layer}", "post": "after block {layer}", "final": "after the final norm"}


def state_name(site: str, layer: int) -> str:
    """Such as ``after block 3``, ``embedding`` or, of a site without a name of ours, ``SITE of block 3``."""
    if site == "final" or (site in _SITES and layer >= 0):
        return _SITES[site].format(layer=layer)
    # A negative layer is none: a state outside the blocks is named by its site.
    return {"embed": "embedding"}.get(site, site if layer < 0 else f"{site} of block {layer}")


def connection_name(branch: str, layer: int) -> str:
    """Such as ``mlp of block 3``."""
    if layer < 0:
        return branch
    return f"block {layer}" if branch == "block" else f"{branch} of block {layer}"


def place(values: xr.DataArray, position: int) -> str:
    """One position on the axis of a profile.

    ``values``: one dim, ``depth``, ``connection`` or ``weight``, with its coordinates.
    Returns: Such as ``after block 17 (depth 18)`` or ``at connection 41 (mlp of block 20)``.
    """
    # Coordinates may be missing, as in an analysis by hand: then the position alone is named.
    here = values.isel({values.dims[0]: position})
    if values.dims[0] == "weight":
        return f"in {here.coords['weight'].item() or 'the model'}"
    if values.dims[0] == "connection":
        if "branch" not in here.coords or "connection_layer" not in here.coords:
            return f"at connection {position}"
        name = connection_name(here.coords["branch"].item(), here.coords["connection_layer"].item())
        return f"at connection {position} ({name})"
    known = {name: here.coords[name].item() for name in ("layer", "site") if name in here.coords}
    site = known.get("site")
    if site == "embed":
        return f"at the embedding (depth {position})"
    if site in _SITES and "layer" in known:
        return f"{state_name(site, known['layer'])} (depth {position})"
    return f"at depth {position}"


def span(values: xr.DataArray, positions: np.ndarray) -> str:
    """Several positions on the axis of a profile.

    Returns: Such as ``from depth 3 to depth 12``, ``at 4 connections between 3 and 12`` or ``in 4 of 20 modules``.
    """
    axis, (first, last) = values.dims[0], positions[[0, -1]]
    if axis == "weight":
        return f"in {len(positions)} of {values.sizes['weight']} modules"
    if len(positions) == last - first + 1:
        return f"from {axis} {first} to {axis} {last}"
    return f"at {len(positions)} {axis}s between {first} and {last}"
