"""What does a name mean? Of a verdict its limits with their sources, of a metric its equation."""

from __future__ import annotations

import inspect
import re
import textwrap
from functools import cache

from depthscope.app.text.bibliography import Reference, cited, source_words
from depthscope.diagnostics import CATALOGUE, Metric
from depthscope.diagnostics.verdicts import VERDICTS, Verdict


def names() -> list[str]:
    """Everything that can be explained: verdicts first, then metrics."""
    return [*VERDICTS, *CATALOGUE]


@cache  # decoding the TeX of a source takes a while, and a page asks again each time it is drawn
def explanation(name: str, *, width: int = 100) -> str:
    """A description of a verdict or a metric, with its equation, its limits and its sources.

    Returns: Equations are TeX, as in the docstrings that they come from.
    """
    parts = [_of_verdict(VERDICTS[name])] if name in VERDICTS else []
    # A verdict may judge the null of a metric.
    metric = CATALOGUE.get((VERDICTS[name].metric if name in VERDICTS else name).removesuffix("_null"))
    if metric is not None:
        parts.append(_of_metric(metric))
    else:  # such as the loss, which the training gives
        parts.append(f"Source: {source_words(VERDICTS[name].limits.source)}")
    # Equations are indented, and stay on their line however long they are.
    lines = "\n\n".join(parts).splitlines()
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width) for line in lines)


def _of_verdict(verdict: Verdict) -> str:
    lines = [
        verdict.name,
        verdict.title,
        "",
        f"Judges the {verdict.judged} ({source_words(verdict.limits.source)}).",
    ]
    lines.append(f"Rests on {verdict.kind.value}.")
    if verdict.advice:
        lines.append(f"What to try: {verdict.advice}")
    if verdict.not_for:
        lines.append(f"Not judged for: {', '.join(verdict.not_for)}.")
    if verdict.follows_from:
        lines.append(f"Explained, where it applies, by: {', '.join(verdict.follows_from)}.")
    return "\n".join(lines)


def _of_metric(metric: Metric) -> str:
    facts = [
        f"Measured by: {metric.name}, {metric.question_text}",
        "",
        _plain(inspect.getdoc(metric.function) or metric.description),
        "",
        f"How it is computed: {metric.estimator}.",
        f"Units: {metric.units}. Basis: {metric.basis}.",
    ]
    if isinstance(metric.null, str):
        facts.append(f"Noise baseline: none; {metric.null}.")
    facts += [f"Source: {cited(key.strip(), form=_full)}" for key in metric.cite.split(",") if key.strip()]
    return "\n".join(facts)


def _plain(docstring: str) -> str:
    """A docstring without the marks of its markup: a paragraph is one line, an equation an indented one."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        words = " ".join(paragraph.split())
        equation = words.removeprefix(".. math:: ")
        paragraphs.append(f"    {equation}" if equation != words else words)
    text = "\n\n".join(paragraphs)
    return re.sub(r":math:`([^`]*)`", r"\1", text).replace("``", "`")


def _full(found: Reference) -> str:
    return " ".join(filter(None, (f"{found.author_year}, {found.title}.", found.url)))
