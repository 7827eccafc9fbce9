"""Which names are public? Each has its docstring on the page of the API, and a link to a page that was run with it."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import depthscope

if TYPE_CHECKING:  # a test of what a user has reads this module too, without Sphinx
    from sphinx.application import Sphinx

MARK = "<!-- public names -->"
DOCS = Path(__file__).parents[1]
LISTED = ("figures", "interventions")
"""Modules whose names are public too."""
MOST_PAGES = 3
GROUPS = {
    "Probe a model": (
        "load",
        "capture",
        "record",
        "Recorder",
        "describe",
        "describe_weights",
    ),
    "Measure and judge": ("analyze", "judge", "Finding", "Severity", "training_curves"),
    "Runs on disk": ("open_run", "save_run", "validate"),
    "Experiments": ("interventions", "lens", "jacobian"),
}
# Of the rooms only what is named elsewhere on this page; the metrics have a page of their own.
ROOMS = ("app", "diagnostics", "probes", "metrics", "CATALOGUE", "kernels")


def public_names() -> str:
    """The sections of the page, in Markdown."""
    named = {name for names in GROUPS.values() for name in names} | set(ROOMS)
    others = [name for name in depthscope.__all__ if name not in named]
    errors = [name for name in others if _is_error(getattr(depthscope, name))]
    groups = GROUPS | {"More": [name for name in others if name not in errors], "Errors and warnings": errors}
    lines = []
    for title, names in groups.items():
        if names:
            lines += [f"## {title}", "", "```{eval-rst}", ".. currentmodule:: depthscope", ""]
            lines += [line for name in names for line in _directive(name)]
            lines += ["```", ""]
    return "\n".join(lines)


@cache
def executed_pages() -> dict[str, str]:
    """The code that is run when the site is built, by page."""
    found = {}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if "kernelspec:" in text:
            cells = re.findall(r"^```\{code-cell\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            found[page.relative_to(DOCS).with_suffix("").as_posix()] = "\n".join(cells)
    return found


def shown_in(name: str) -> list[str]:
    """The pages that are run with a public name, such as ``figures.gains``, those of the gallery first."""
    used = re.compile(rf"\bds\.{re.escape(name)}\b")
    pages = [page for page, code in executed_pages().items() if used.search(code)]
    return sorted(pages, key=lambda page: (page.startswith("api/"), page))


def names_of(module: ModuleType) -> list[str]:
    """The public names of a module of `LISTED`."""
    return [str(name) for name in module.__all__]


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _directive(name: str) -> list[str]:
    value = getattr(depthscope, name)
    if inspect.ismodule(value):
        within = [
            line
            for each in names_of(value)
            for line in _entry(f"{name}.{each}", value.__name__, getattr(value, each))
        ]
        return [f".. automodule:: {value.__name__}", "   :no-index:", "", *within]
    return _entry(name, "depthscope", value)


def _entry(name: str, module: str, value: Any) -> list[str]:
    """The docstring of one name, and where it is shown."""
    path = f"{module}.{name.rpartition('.')[2]}"
    pages = ", ".join(f":doc:`/{page}`" for page in shown_in(name)[:MOST_PAGES])
    shown = ["", f"   Shown with what it gives: {pages}."] if pages else []
    options = ["   :no-index:"] if "." in name else []
    if inspect.isclass(value) and not _is_error(value):
        options.append("   :members:")
    # The docstring of a constant is that of its class.
    kind = (
        "autoclass" if inspect.isclass(value) else "autofunction" if inspect.isroutine(value) else "py:data"
    )
    return [f".. {kind}:: {path}", *options, *shown, ""]


def plain_bars(lines: list[str]) -> None:
    """Write the bars of a docstring's formulas, such as ``|P|``, so that they are no substitutions of reStructuredText.

    ``lines``: changed in place; equations and code keep theirs.
    """
    block = -1  # the indentation of the directive whose content is left alone
    for number, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if block >= 0 and line.strip() and indentation <= block:
            block = -1
        if block < 0 and line.strip().startswith((".. math::", ".. code-block::")):
            block = indentation
        if block < 0 and not line.lstrip().startswith(">>>"):
            parts = line.split("``")
            parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
            lines[number] = "``".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Fill the page where the mark is."""

    def fill(app: Sphinx, docname: str, source: list[str]) -> None:
        if MARK in source[0]:
            source[0] = source[0].replace(MARK, public_names())

    def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        plain_bars(lines)

    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", escape)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
