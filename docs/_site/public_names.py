"""Which names are public? Each name of `depthscope.__all__` gets its docstring on the page of the API, also a new one."""

from __future__ import annotations

import inspect
from typing import Any

from sphinx.application import Sphinx

import depthscope

MARK = "<!-- public names -->"
GROUPS = {
    "Probe a model": (
        "load",
        "capture",
        "record",
        "Recorder",
        "describe",
        "describe_weights",
        "initial_logits",
        "merge_runs",
    ),
    "Measure and judge": ("analyze", "judge", "Finding", "Severity", "training_curves", "with_replay"),
    "Runs on disk": ("open_run", "save_run", "validate"),
    "Experiments": ("interventions", "lens", "jacobian", "coordinate_check"),
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


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _directive(name: str) -> list[str]:
    value = getattr(depthscope, name)
    if inspect.ismodule(value):
        return [
            f".. automodule:: {value.__name__}",
            "   :members:",
            "   :imported-members:",
            "   :no-index:",
            "",
        ]
    if inspect.isclass(value):
        return [f".. autoclass:: depthscope.{name}", *(["   :members:"] if not _is_error(value) else []), ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: depthscope.{name}", ""]
    return [f".. autodata:: depthscope.{name}", ""]


def plain_bars(lines: list[str]) -> None:
    """Write the bars of a docstring's formulas, such as ``|P|``, so that they are no substitutions of reStructuredText.

    Parameters
    ----------
    lines : list of str
        Changed in place; equations and code keep theirs.
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
