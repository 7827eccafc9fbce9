"""Whatever a label contains, plotly and matplotlib draw its letters: no markup, no links, no mathematics, no warning."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from depthscope.app.drawing.matplotlib import to_svg
from depthscope.app.drawing.plotly import to_plotly
from depthscope.app.figures import Heatmap, Line, Lines
from tests.app.hostile_text import TEXTS, mutated

CASES = TEXTS | mutated(seed=2, count=12)
# What plotly takes for a tag, an entity of its own or a value to fill in.
PLOTLY_MARKUP = re.compile(r"<|>|%\{|&(?!amp;|lt;|gt;|#37;)")
INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200c\u200e-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2067\ufeff]"
)
X = np.arange(3.0)


def curves(text: str) -> Lines:
    lines = (
        Line(X, X + 1, text, lower=X, upper=X + 2, group=text, text=[text] * 3),
        Line(X, X + 2, f"{text} · b", group=text),
        Line(X, X + 3, "c", group="c"),
        Line(X[:2], np.full(2, 2.0), text, role="threshold"),
    )
    return Lines("hostile", "Title", text, text, lines)


def cells(text: str) -> Heatmap:
    names = [text] * 3
    return Heatmap("hostile", "Title", X, X, np.eye(3), text, text, text, x_text=names, y_text=names)


def strings(value: object) -> list[str]:
    """All text of a plotly figure, but for its colours and fonts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [text for part in value for text in strings(part)]
    return []


def test_plotly_draws_the_letters():
    for case in CASES:
        text = CASES[case]
        for figure in (curves(text), cells(text)):
            sent = to_plotly(figure).to_plotly_json()
            # Our own line breaks, bold number and hover fields are the only markup.
            ours = re.compile(r"<br>|</?b>|<extra></extra>|%\{(text|(x|y|z|customdata):\.4~g)\}")
            found = strings(
                [[trace.get(key) for key in ("name", "text", "hovertemplate")] for trace in sent["data"]]
            )
            layout = sent["layout"]
            found += [layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
            for note in layout.get("annotations", ()):
                found += [note.get("text") or "", note.get("hovertext") or ""]
            for shown in found:
                bare = ours.sub("", shown)
                assert not PLOTLY_MARKUP.search(bare), shown
                assert not INVISIBLE.search(bare), shown
                assert len(shown) < 3000


def test_dollars_are_dollars():
    assert ">$x$<" in to_svg(replace(cells("a"), x_label="$x$"))
