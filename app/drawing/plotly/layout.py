"""How are the options of a drawing's layout set? All at once: one by one they take plotly ten times as long."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from depthscope.app.figures.palette import RUN_COLOURS
from depthscope.app.text.visible import LONGEST_LABEL, shortened, visible


def set_layout(drawn: go.Figure, **options: Any) -> None:
    """Set options of a layout; what is already set of an axis stays."""
    known = drawn.layout.to_plotly_json()
    drawn.layout = {
        **known,
        **{
            name: {**value, **known[name]} if isinstance(value, dict) and name in known else value
            for name, value in options.items()
        },
    }


def words(text: str, longest: int = LONGEST_LABEL) -> str:
    """Text that plotly draws as it is.

    ``text``: label of a line, an axis, a position.
    ``longest``: letters after which the middle is left out.

    Examples
    --------
    >>> words("<a href='javascript:x'>R&D</a> %{x}")
    "&lt;a href='javascript:x'&gt;R&amp;D&lt;/a&gt; &#37;{x}"
    """
    # An entity also for the percent sign: a template of a hover would fill in what "%{…}" names.
    shown = shortened(visible(shortened(text, longest, counted=False)), longest, counted=False)
    return html.escape(shown, quote=False).replace("%{", "&#37;{")


PALETTE = RUN_COLOURS
DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
# Half grey, and colours that let the page through: legible on white and on black.
GREY = "rgba(128, 128, 128, 0.9)"
FAINT = "rgba(128, 128, 128, 0.18)"
HEALTHY = "rgba(34, 136, 51, 0.07)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
DIVERGING = ((0.0, "#2166AC"), (0.25, "#92C5DE"), (0.5, "#F7F7F7"), (0.75, "#F4A582"), (1.0, "#B2182B"))


_STEPS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
)
"""Round numbers of a decade, from few to many."""


def round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from one exponent of ten to another: as many as are allowed, and where they can be at least two.

    Examples
    --------
    >>> round_numbers(0.0, 1.0, 3), round_numbers(-5.2, -4.8, 5), round_numbers(0.30, 0.32, 3)
    ([1.0, 3.0, 10.0], [8e-06, 1e-05, 1.2e-05, 1.5e-05], [2.0, 2.05])
    """
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    # 1e-6: an end that is a round number is not lost to the rounding of its logarithm.
    found = [
        [
            step * 10.0**decade
            for decade in decades
            for step in steps
            if low - 1e-6 <= np.log10(step) + decade <= high + 1e-6
        ]
        for steps in _STEPS
    ]
    few = [each for each in found if len(each) <= most]
    if few and len(few[-1]) > 1:
        return [float(f"{each:.6g}") for each in few[-1]]
    if few and high - low > 1:
        return few[-1]
    first, last = 10.0**low, 10.0**high
    if last <= first * (1 + 1e-6):
        return [float(f"{first:.6g}")]
    size = 10.0 ** np.floor(np.log10(last - first))
    for step in (size * each for each in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)):
        ticks = np.arange(np.ceil(first / step - 1e-6), np.floor(last / step + 1e-6) + 1) * step
        if len(ticks) <= most:
            return [float(f"{each:.6g}") for each in ticks]
    return []


def log_ticks(low: float, high: float, most: int = 6) -> dict[str, Any]:
    """Ticks of a logarithmic axis between two exponents of ten."""
    values = round_numbers(low, high, most)
    names = [f"{value:g}".replace("e-0", "e-").replace("e+0", "e") for value in values]
    return {"tickvals": values, "ticktext": names} if values else {}
