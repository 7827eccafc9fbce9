"""How does text get into a plotly figure? With its signs as entities: plotly reads tags and links in every label."""

from __future__ import annotations

import html

from depthscope.app.text.visible import LONGEST_LABEL, shortened, visible


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
