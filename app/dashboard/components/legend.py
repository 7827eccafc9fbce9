"""Which run has which colour and mark? Said once, above all figures of a page."""

from __future__ import annotations

import html
from collections.abc import Mapping

import streamlit as st

from depthscope.app.figures.palette import Look, look_of
from depthscope.app.text.visible import LONGEST_NAME, visible

__all__ = ["show_legend"]

OUTLINES = {
    "triangle-up": "50% 0, 100% 100%, 0 100%",
    "triangle-down": "0 0, 100% 0, 50% 100%",
    "triangle-left": "100% 0, 100% 100%, 0 50%",
    "triangle-right": "0 0, 100% 50%, 0 100%",
    "diamond": "50% 0, 100% 50%, 50% 100%, 0 50%",
    "pentagon": "50% 0, 100% 40%, 80% 100%, 20% 100%, 0 40%",
    "cross": "35% 0, 65% 0, 65% 35%, 100% 35%, 100% 65%, 65% 65%, 65% 100%, 35% 100%, 35% 65%, 0 65%, 0 35%, 35% 35%",
    "x": "20% 0, 50% 30%, 80% 0, 100% 20%, 70% 50%, 100% 80%, 80% 100%, 50% 70%, 20% 100%, 0 80%, 30% 50%, 0 20%",
}
"""Shape of a mark → its corners; a circle and a square have none."""


def show_legend(colours: Mapping[str, int]) -> None:
    """The colours of some runs or groups of runs, by their numbers in the palette; nothing for a single one."""
    if len(colours) > 1:
        entries = [_entry(name, look_of(colour)) for name, colour in colours.items()]
        st.html(f'<div class="depthscope-legend">{"".join(entries)}</div>')


def _entry(name: str, look: Look) -> str:
    fill = f"border: 2px solid {look.colour}" if look.hollow else f"background: {look.colour}"
    shape = f"clip-path: polygon({OUTLINES[look.shape]})" if look.shape in OUTLINES else ""
    rounded = "border-radius: 50%" if look.shape == "circle" else ""
    return (
        f'<span><i class="line" style="background: {look.colour}"></i>'
        f'<i class="mark" style="{fill}; {shape}; {rounded}"></i>{html.escape(visible(name, longest=LONGEST_NAME))}</span>'
    )
