"""A bundle or a report of a few figures in place of a hundred, where it is not the drawings that count."""

from __future__ import annotations

import pytest

from depthscope.app.figures.composed import QUESTIONS
from depthscope.app.paper import contents, export


def draw_few(
    patch: pytest.MonkeyPatch, *, every: int = 100, composed: tuple[str, ...] = ("collapse",)
) -> None:
    """Draw every so manieth figure, and of the composed ones these; the tests over all figures draw all of them."""
    draw = contents.draw_all
    patch.setattr(contents, "draw_all", lambda readings, view: draw(readings, view)[::every])
    patch.setattr(export, "QUESTIONS", {name: QUESTIONS[name] for name in composed})
