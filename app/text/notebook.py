"""How does a notebook show findings, descriptions and metrics? As HTML, legible on white and black, without a network.

Analyses are xarray's datasets, which show themselves; of a run xarray would show 300 kB. Classes of this project belong to
rooms that know no HTML: they are registered with IPython here, once, when depthscope is imported in a notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from depthscope.app.text.visible import visible

LONGEST_LINE = 10**6
"""Letters: the browser breaks the lines."""

MOST_FINDINGS = 2
"""Of a run, the worst; `ds.judge` shows all."""

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
    from depthscope.app.text.sparkline import curve_svg
    from depthscope.app.text.templates import html_template

    return html_template("depthscope.app.text", "card.html.jinja", curve=lambda card: curve_svg(card.finding))


@cache
def card_style() -> Markup:
    """The style sheet of the drawings in cards, for a page that shows some."""
    return Markup(files("depthscope.app.text").joinpath("card.css").read_text(encoding="utf-8"))


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
    return Markup('<div class="depthscope"><style>{}{}</style>{}</div>').format(_STYLE, card_style(), shown)


def _metric_html(metric: Any) -> str:
    """A metric as its explanation, with the equations as they are printed."""
    from depthscope.app.text.cards import explanation

    parts = [
        _equation(part.strip())
        if part.startswith("    ")
        else Markup("<p>{}</p>").format(Markup("<br>").join(visible(line) for line in part.splitlines()))
        for part in explanation(metric.name, width=LONGEST_LINE).split("\n\n")
    ]
    return Markup('<div class="depthscope"><style>{}</style><div class="card">{}</div></div>').format(
        _STYLE, Markup("").join(parts)
    )


def _equation(tex: str) -> Markup:
    """MathML, which browsers draw without a script; TeX where its converter is not installed."""
    try:
        from latex2mathml.converter import convert
    except ImportError:
        return Markup("<pre>{}</pre>").format(tex)
    return Markup(convert(tex, display="block"))


def _tree_html(tree: Any) -> str:
    """A run as what it is, where from, whether it is proven, what is in it and found; any other tree as xarray shows it."""
    if "schema_version" not in tree.attrs:
        return str(tree._repr_html_())
    attrs = tree.attrs
    facts = {
        "Model": attrs.get("model"),
        "Family": attrs.get("family"),
        "Streams": attrs.get("n_streams"),
        "Reading": attrs.get("proof"),
        "States": f"{tree['trace'].sizes['depth']}"
        if "trace" in tree and "depth" in tree["trace"].sizes
        else None,
        "Sequences × tokens": _sizes(tree),
        "Precision": attrs.get("dtype"),
        "Seed": attrs.get("seed"),
        "Created": attrs.get("created"),
        "Has": ", ".join(tree.children),
        "Findings, of its stored metrics": _stored_findings(tree),
    }
    rows = Markup("").join(
        Markup(
            '<tr><th scope="row" style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
        ).format(name, visible(value, longest=300))
        for name, value in facts.items()
        if value not in (None, "")
    )
    return Markup(
        '<div class="depthscope"><style>{}</style><div class="card"><p><b>Run</b></p><table>{}</table>'
        "<p>Next: <code>analysis = ds.analyze(run)</code>, <code>ds.judge(analysis)</code>, "
        "<code>ds.figures.collapse(run)</code></p></div></div>"
    ).format(_STYLE + card_style(), rows)


def _stored_findings(tree: Any) -> str | None:
    """What verdicts say of the metrics that a run has; None where it has none: an analysis takes longer than a look."""
    if "metrics" not in tree:
        return None
    from depthscope.app.text.cards import card_of
    from depthscope.diagnostics import judge
    from depthscope.diagnostics.errors import InputError

    try:
        cards = [card_of(finding) for finding in judge(tree["metrics"].to_dataset())]
    except InputError as error:
        return f"not judged: {error}"
    more = f"; {len(cards) - MOST_FINDINGS} more" if len(cards) > MOST_FINDINGS else ""
    return (
        "; ".join(f"{card.title.rstrip('.')} ({card.where})" for card in cards[:MOST_FINDINGS]) + more
        or "none"
    )


def _sizes(tree: Any) -> str | None:
    sizes = tree["trace"].sizes if "trace" in tree else {}
    return f"{sizes['sample']} × {sizes['token']}" if {"sample", "token"} <= set(sizes) else None


def _figure_png(figure: Any) -> bytes:
    import io

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, bbox_inches="tight")
    return file.getvalue()


# By name: a notebook that shows no finding imports none of these.
_SHOWN: dict[tuple[str, str], Callable[[Any], str]] = {
    ("depthscope.diagnostics.verdicts.finding", "Finding"): lambda finding: _findings_html([finding]),
    ("depthscope.diagnostics.verdicts.finding", "Findings"): _findings_html,
    ("depthscope.diagnostics.metrics.declaration", "Metric"): _metric_html,
    ("depthscope.probes.description", "Description"): lambda value: (
        f"<pre>{escape(visible(str(value), lines=True))}</pre>"
    ),
    ("xarray.core.datatree", "DataTree"): _tree_html,
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
