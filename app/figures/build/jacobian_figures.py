"""How do blocks stretch small changes of the state? The Jacobians that were saved for some runs, by depth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from depthscope.app.figures.build.captions import describe_lines, describe_matrix
from depthscope.app.figures.palette import colour_numbers
from depthscope.app.figures.specification import Analyses, Heatmap, Line, Lines
from depthscope.app.text.numbers import number, quantity

ISOMETRY = "Mean 1 and variance 0: every small change keeps its size (dynamical isometry)."

CURVES = {
    "singular_value": (
        "largest_jacobian_singular_value",
        "Largest singular value of each block's Jacobian",
        "σ₁ (at least)",
        1.0,
    ),
    "mean_square": (
        "jacobian_mean_square",
        "Mean squared singular value of each block's Jacobian",
        "mean σ²",
        1.0,
    ),
    "square_variance": (
        "jacobian_square_variance",
        "Spread of the squared singular values",
        "variance of σ²",
        0.0,
    ),
}
"""Variable of a result → name, title and vertical axis of its figure, and the value of an isometry."""


def jacobian_figures(results: Mapping[str, xr.Dataset], analyses: Analyses) -> list[Lines]:
    """Curves of some runs over depth: largest singular value, and mean and variance of σ².

    ``results``: run name → of `depthscope.probes.jacobian.jacobians_by_depth`; runs that have some.
    ``analyses``: of all runs that are shown together, for their colours.
    """
    return [_curve(results, analyses, variable) for variable in CURVES]


def _curve(results: Mapping[str, xr.Dataset], analyses: Analyses, variable: str) -> Lines:
    name, title, y_label, level = CURVES[variable]
    lines = []
    for run, found in results.items():
        value, error = (_largest(found[f"{variable}{part}"]) for part in ("", "_error"))
        lines.append(
            Line(
                np.asarray(found["depth"].values, dtype=np.float64),
                value,
                run,
                # The value that is found is a lower bound.
                lower=value if variable == "singular_value" else value - error,
                upper=value + error,
                group=run,
                text=[f"from depth {depth - 1} to {depth}" for depth in found["depth"].values.tolist()],
            )
        )
    ends = np.array([1.0, max((float(line.x.max()) for line in lines), default=1.0)])
    isometry = Line(ends, np.full(2, level), f"isometry: {level:g}", role="threshold")
    band = "± standard error over random probes"
    if variable == "singular_value":
        band = "the residual above the lower bound that is drawn"
    whole = "; ".join(f"{run} {_whole(found, variable)}" for run, found in results.items())
    missing = [run for run in analyses if run not in results]
    return Lines(
        name=name,
        title=title,
        x_label="depth (of the later state)",
        y_label=y_label,
        lines=(*lines, isometry),
        log_y=variable == "singular_value",
        caption=" ".join(
            [
                f"∂ state / ∂ state before. {_how(results)} Shaded: {band}.",
                f"From the first state to the last: {whole}.",
                *([] if variable == "singular_value" else [ISOMETRY]),
                *([f"Not measured in {', '.join(missing)}."] if missing else []),
            ]
        ),
        alt=describe_lines(lines, title, "depth"),
        runs=colour_numbers(analyses),
    )


def jacobian_maps(results: Mapping[str, xr.Dataset]) -> dict[str, Heatmap]:
    """The singular values of every block of each run, as a heat map over depth."""
    maps = {}
    for run, found in results.items():
        title = "Singular values of each block's Jacobian"
        z = np.asarray(found["singular_value"].transpose("order", "depth").values, dtype=np.float64)
        depths = [f"depth {depth}" for depth in found["depth"].values.tolist()]
        orders = [f"σ{order}" for order in found["order"].values.tolist()]
        maps[run] = Heatmap(
            name="jacobian_singular_values",
            title=title if len(results) == 1 else f"{title}: {run}",
            x=np.asarray(found["depth"].values, dtype=np.float64),
            y=np.asarray(found["order"].values, dtype=np.float64),
            z=z,
            x_label="depth (of the later state)",
            y_label="order (1 = largest)",
            z_label="singular value",
            log_z=True,
            caption=f"Run {run}. {_how({run: found})} The largest ones of {found.attrs['num_directions']} directions.",
            alt=describe_matrix(z, orders, depths, title=title, run=run),
            x_text=depths,
            y_text=orders,
            run=run,
            square=False,
        )
    return maps


def _largest(values: xr.DataArray) -> np.ndarray:
    first = values.isel(order=0) if "order" in values.dims else values
    return np.asarray(first.values, dtype=np.float64)


def _whole(found: xr.Dataset, variable: str) -> str:
    value, error = (float(_largest(found[f"whole_{variable}{part}"])) for part in ("", "_error"))
    if variable == "singular_value":
        return f"≥ {number(value)} (residual {number(error)})"
    return quantity(value, error) if np.isfinite(error) else number(value)


def _how(results: Mapping[str, xr.Dataset]) -> str:
    """Which tokens and coefficients moved; once where all runs were measured in the same way."""
    words = {
        run: f"{found.attrs['num_tokens']} tokens, "
        f"{'every token moves every token' if found.attrs['tokens'] == 'all' else 'each token by itself'}, "
        f"routing {found.attrs['routing']}"
        for run, found in results.items()
    }
    if len(set(words.values())) == 1:
        return f"{next(iter(words.values()))}."
    return "; ".join(f"{run}: {how}" for run, how in words.items()) + "."
