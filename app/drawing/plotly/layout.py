"""How are the options of a drawing's layout set? All at once: one by one they take plotly ten times as long."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go


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
