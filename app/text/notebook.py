"""How does a notebook show findings and figures? As HTML, legible on white and black, without a network.

Datasets and runs are xarray's, which show themselves. Classes of this project belong to rooms that know no HTML: they are
registered with IPython here, once, when depthscope is imported in a notebook.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from markupsafe import Markup, escape

from depthscope.app.text.visible import visible

# Colours that are legible on white and on black, next to the word of the severity.
_STYLE = Markup(
    ".depthscope .card{border:1px solid rgba(128,128,128,.35);border-left-width:4px;border-radius:4px;"
    "padding:.35em .8em;margin:.4em 0;max-width:60em}.depthscope .card p{margin:.15em 0}"
    ".depthscope .card.fail{border-left-color:#e03131}.depthscope .card.warn{border-left-color:#e8890c}"
    ".depthscope .card.info{border-left-color:#5c8fd6}.depthscope .card.pass{border-left-color:#2f9e44}"
    ".depthscope .severity{font-variant:small-caps}.depthscope pre{white-space:pre-wrap}"
)


@cache
def _card_template() -> Any:
    from depthscope.app.text.latex import html_template

    return html_template("depthscope.app.text", "card.html.jinja")


def card_html(card: Any) -> Markup:
    """A card as HTML, with its equation and sources folded."""
    from depthscope.app.text.cards import explanation

    return Markup(_card_template().render(card=card, explanation=explanation(card.finding.verdict)))


def _findings_html(findings: Iterable[Any]) -> str:
    from depthscope.app.text.cards import ABOUT_THE_READING, card_of

    parts: list[Markup] = []
    heading = Markup("<p>{}</p>").format(ABOUT_THE_READING)
    for finding in findings:
        if finding.about == "reading" and heading not in parts:
            parts.append(heading)
        parts.append(card_html(card_of(finding)))
    shown = Markup("").join(parts) or Markup("<p>Nothing found: no metric crossed its threshold.</p>")
    return Markup('<div class="depthscope"><style>{}</style>{}</div>').format(_STYLE, shown)


def _figure_png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, bbox_inches="tight")
    return file.getvalue()


# By name: a notebook that shows no finding imports none of these.
_SHOWN: dict[tuple[str, str], Callable[[Any], str]] = {
    ("depthscope.diagnostics.verdicts.finding", "Finding"): lambda finding: _findings_html([finding]),
    ("depthscope.diagnostics.verdicts.finding", "Findings"): _findings_html,
    ("depthscope.probes.description", "Description"): lambda value: (
        f"<pre>{escape(visible(str(value), lines=True))}</pre>"
    ),
}


def show_in_notebooks() -> None:
    """Tell IPython how to show the classes of this project; outside of IPython nothing happens."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    for (module, name), show in _SHOWN.items():
        formatters["text/html"].for_type_by_name(module, name, show)
    # A figure of `ds.figures` is made without pyplot, which would tell the notebook how to show it.
    formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", _figure_png)
