"""What does a figure keep when it leaves our hands? The settings it was made with, and no date."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure

from depthscope.app.drawing.matplotlib.style import Width, settings_of

# A date in the file would change its bytes on every export.
_UNDATED: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


class PaperFigure(Figure):
    """A figure that is drawn and saved with the settings it was made with.

    Matplotlib reads the kind of embedded fonts, the font of mathematics and others when a figure is saved: a figure that was
    made for a venue and saved later would have Type 3 fonts, which venues reject.

    ``size``: whose settings.
    ``figsize``: inches.
    ``layout``: engine of the layout.
    """

    def __init__(
        self,
        size: Width,
        figsize: tuple[float, float],
        layout: Literal["constrained", "compressed"] = "constrained",
    ) -> None:
        # As they are now: a figure for a page of HTML has some of its own.
        self._settings = {name: mpl.rcParams[name] for name in settings_of(size)}
        super().__init__(figsize=figsize, layout=layout)

    def draw(self, renderer: RendererBase) -> None:
        """Draw with the settings of the figure."""
        with mpl.rc_context(self._settings):
            super().draw(renderer)

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save with the settings of the figure: TrueType fonts and, unless ``metadata`` is given, no date."""
        ending = Path(fname).suffix.removeprefix(".") if isinstance(fname, str | PathLike) else ""
        ending = str(kwargs.get("format") or ending or mpl.rcParams["savefig.format"])
        if ending in _UNDATED:
            kwargs.setdefault("metadata", _UNDATED[ending])
        with mpl.rc_context(self._settings):
            super().savefig(fname, **kwargs)
