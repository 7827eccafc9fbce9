"""Where does what one input has and another has not go through? The effect of a patch by depth and token, as a heat map."""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import describe_matrix
from depthscope.app.figures.specification import Array, Heatmap
from depthscope.app.text.numbers import number
from depthscope.app.text.visible import LONGEST_LABEL, visible
from depthscope.diagnostics.errors import InputError, did_you_mean

SITE_WORDS = {"residual": "the state", "h_res": "H_res", "h_pre": "H_pre", "h_post": "H_post"}
"""Site of a patch → what was put in."""

ALL = -1
"""Of a token or stream: all of them at once."""


def patching_map(
    result: xr.Dataset,
    *,
    site: str | None = None,
    stream: int = ALL,
    value: Literal["effect", "change"] | None = None,
) -> Heatmap:
    """The effect, or the change of the measure, of one site and stream; undefined where nothing was patched.

    ``result``: of `depthscope.interventions.patch`.
    ``site``: the first one by default. ``stream``: −1 for all streams at once.
    ``value``: the effect where it is defined, else the change.
    Raises InputError: For a site, stream or value that the result does not have.
    """
    sites = [str(name) for name in result["site"].values]
    site = sites[0] if site is None else site
    if site not in sites:
        raise InputError(f"no site {site!r} was patched; {did_you_mean(site, sites)}")
    streams = result["stream"].values.tolist()
    if stream not in streams:
        raise InputError(
            f"stream {stream} was not patched; expected one of {', '.join(map(str, streams))} (−1: all at once)"
        )
    if value is None:
        value = "change" if result.attrs["no_effect"] else "effect"
    if value not in ("effect", "change"):
        raise InputError(f"value is {value!r}; expected effect or change")
    cells = result[value].sel(site=site, stream=stream).transpose("depth", "token")
    patched = np.isfinite(result["change"].sel(site=site, stream=stream).transpose("depth", "token").values)
    cells = cells.isel(depth=patched.any(axis=1))
    z = np.asarray(cells.values, dtype=np.float64)
    depths = [f"depth {depth}" for depth in cells["depth"].values.tolist()]
    tokens = _token_names(result)
    what = SITE_WORDS[site] if stream == ALL else f"{SITE_WORDS[site]}, stream {stream}"
    title = f"What comes back with {what} of the clean input"
    return Heatmap(
        name=f"patching_{site}",
        title=title,
        x=np.asarray(cells["token"].values, dtype=np.float64),
        y=np.asarray(cells["depth"].values, dtype=np.float64),
        z=z,
        x_label="token",
        y_label="depth (of the later state)" if site.startswith("h_") else "depth",
        z_label="effect (0 corrupted, 1 clean)" if value == "effect" else _change_label(result),
        limits=_limits(z) if value == "effect" else None,
        diverging=value == "change",
        caption=_caption(result, what, value, cells),
        alt=describe_matrix(z, depths, tokens, title=title, run=str(result.attrs["model"])),
        x_text=tokens,
        y_text=depths,
        run=str(result.attrs["model"]),
        square=False,
        categorical=("x",),
        x_names=tuple(tokens),
    )


def _change_label(result: xr.Dataset) -> str:
    units = result["change"].attrs.get("units", "")
    return f"change of {result.attrs['measured']}" + (f" [{units}]" if units not in ("", "1") else "")


def _limits(z: Array) -> tuple[float, float]:
    known = z[np.isfinite(z)]
    ends = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return min(0.0, ends[0]), max(1.0, ends[1])


def _token_names(result: xr.Dataset) -> list[str]:
    """Position and text of each token, both texts where sequences differ in few; the position alone where they do in many."""
    numbers = result["token"].values.tolist()
    if "token_text" not in result:
        return ["all" if token == ALL else str(token) for token in numbers]
    names = []
    for token, column in zip(numbers, result["token_text"].values.T, strict=True):
        texts = list(dict.fromkeys(str(text).strip() for text in column if str(text)))
        text = visible(" / ".join(texts), longest=LONGEST_LABEL // 3) if 0 < len(texts) <= 2 else ""
        names.append(f"{token} {text}".strip())
    return names


def _caption(result: xr.Dataset, what: str, value: str, cells: xr.DataArray) -> str:
    attrs = result.attrs
    clean, corrupted = (float(result[name].mean()) for name in ("clean", "corrupted"))
    count = result.sizes["sample"]
    errors = result[f"{value}_error"].sel(site=cells["site"], stream=cells["stream"]).values
    known = errors[np.isfinite(errors)]
    parts = [
        f"{attrs['model']}: {what} of the clean input in the forward of the corrupted one, one place at a time;",
        f"{count} pair{'s' * (count != 1)} of inputs. Measured: {attrs['measured']}, {number(clean)} clean and",
        f"{number(corrupted)} corrupted"
        + ("." if value == "change" else ", of which the effect is the share that comes back."),
        f"Standard error of a cell: at most {number(float(known.max()))}." if known.size else "",
        f"No effect is defined: {attrs['no_effect']}." if attrs["no_effect"] else "",
        f"Note: {attrs['other_paths']}." if attrs["other_paths"] else "",
    ]
    return " ".join(filter(None, parts))
