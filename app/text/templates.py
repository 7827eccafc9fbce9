"""How are HTML and LaTeX filled in? By Jinja templates that escape every value."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from depthscope.app.text.latex import Latex, cite, tex
from depthscope.app.text.visible import visible

# A missing value is an error, never an empty place in somebody's paper.
_COMMON: dict[str, Any] = {
    "undefined": StrictUndefined,
    "trim_blocks": True,
    "lstrip_blocks": True,
    "keep_trailing_newline": True,
}


def html_template(package: str, name: str, **filters: Any) -> Template:
    """A template of HTML; what is not `markupsafe.Markup` is escaped."""
    # `finalize` sees every value that is printed, before it is escaped; markup of our own comes as `Markup`.
    environment = Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value, lines=True),
        **_COMMON,
    )
    environment.filters.update(filters)
    return environment.from_string(_source(package, name))


def latex_template(package: str, name: str, **filters: Any) -> Template:
    """A template of LaTeX: ``<% for … %>``, ``<< value >>``; what is not `Latex` is escaped.

    The filter ``latex`` marks text as code: the output of a macro, a label, a formula; ``cite`` makes a citation.

    ``package, name``: import name of the package, and its file.
    ``**filters``: filters by their names in the template.
    """
    environment = Environment(
        # Jinja's own delimiters are groups and comments of LaTeX.
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        # Jinja's autoescape knows HTML only; `finalize` sees every value that is printed.
        finalize=lambda value: tex(value if isinstance(value, str) else str(value)),
        autoescape=False,
        **_COMMON,
    )
    environment.filters.update(cite=cite, latex=Latex, tex=tex, **filters)
    return environment.from_string(_source(package, name))


def _source(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
