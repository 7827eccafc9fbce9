"""Which colours and dashes does the screen use? Distinct for colour-blind eyes, on white and on black pages."""

from __future__ import annotations

from depthscope.app.figures.palette import RUN_COLOURS

PALETTE = RUN_COLOURS
DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
# Half grey, and colours that let the page through: legible on white and on black.
GREY = "rgba(128, 128, 128, 0.9)"
FAINT = "rgba(128, 128, 128, 0.18)"
HEALTHY = "rgba(34, 136, 51, 0.07)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
DIVERGING = ((0.0, "#2166AC"), (0.25, "#92C5DE"), (0.5, "#F7F7F7"), (0.75, "#F4A582"), (1.0, "#B2182B"))
