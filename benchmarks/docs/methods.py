"""By which formula is every number computed, and from which paper? The page of methods, from the declarations.

``python -m benchmarks.docs.methods`` writes docs/methods.md. With ``--check`` it writes nothing, and exits with 1 where the
page is old.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from depthscope.app.text.bibliography import Reference, cited, keys_of, reference
from depthscope.app.text.terminal import say
from depthscope.diagnostics import CATALOGUE, Metric
from depthscope.diagnostics.verdicts import VERDICTS, Verdict

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"

HEADER = """\
# Methods

Every metric and every verdict, written from their declarations by
`python -m benchmarks.docs.methods`: change the declaration, not this page. Logarithms are natural. `N` tokens, `d` features,
`n` streams, depth `l`, connection `c`; rows of a mixing matrix are destinations, and later connections are on the
left of a product. NaN is undefined; 0 is a value. Padding never counts.

*Basis* is what a number depends on: `invariant` numbers do not change with the basis of the features or the
streams, `feature` and `stream` ones do. *Null* is the value for data without structure of the same size.
"""

# A reST directive: the equation is on its line, and on indented lines after it.
_EQUATION = re.compile(r"^\.\. math::[ ]*(.*(?:\n[ ]+\S.*)*)", re.MULTILINE)


def methods_page() -> str:
    """The page as Markdown.

    Returns
    -------
    str
    """
    parts = [HEADER, "## Metrics\n"]
    # groupby joins neighbours only: the catalogue lists the metrics of a module together.
    for question, metrics in groupby(CATALOGUE.values(), key=lambda metric: metric.question_text):
        parts += [f"### {question}\n", *map(_metric, metrics)]
    parts += ["## Verdicts\n", _VERDICTS, *map(_verdict, VERDICTS.values())]
    parts += ["## Sources\n", _sources()]
    return "\n".join(parts)


_VERDICTS = """\
A verdict compares one number with its limits, in the sentence that `depthscope check` prints. A limit without a
paper is attributed to this project: it is ours, and it may be wrong for your network.
"""


def _metric(metric: Metric) -> str:
    first, equations, text = _docstring(metric.__doc__ or "")
    facts = {
        "Symbol": _inline(metric.symbol),
        "Unit": metric.units,
        "Healthy": _healthy(metric),
        "Null": _null(metric),
        "Basis": metric.basis,
        "Estimator": metric.estimator,
        "Needs": ", ".join(f"`{name}`" for name in metric.roots),
        "Source": _cited([metric.cite]),
    }
    return _section(metric.name, [first, *map(_block, equations), text], facts)


def _verdict(verdict: Verdict) -> str:
    facts = {
        "Judges": f"{verdict.judges}; {verdict.kind.value}",
        "Formula": verdict.formula,
        "Range": verdict.range,
        "Limits": verdict.limits.words,
        "From": f"`{verdict.metric}`",
        "Source": _cited([verdict.limits.source]),
        "Advice": verdict.advice,
    }
    return _section(verdict.name, [verdict.title], facts)


def _section(name: str, paragraphs: Iterable[str], facts: dict[str, str]) -> str:
    body = "\n\n".join(part for part in paragraphs if part)
    listed = "\n".join(f"- {label}: {fact}" for label, fact in facts.items() if fact)
    return f"#### `{name}`\n\n{body}\n\n{listed}\n"


def _docstring(text: str) -> tuple[str, list[str], str]:
    """First line, equations and the rest of a docstring."""
    first, _, rest = text.partition("\n")
    equations = [" ".join(found.split()) for found in _EQUATION.findall(rest)]
    paragraphs = [" ".join(part.split()) for part in _EQUATION.sub("", rest).split("\n\n")]
    return first, equations, "\n\n".join(part for part in paragraphs if part)


def _inline(formula: str) -> str:
    # GitHub's form of inline mathematics in which underscores need no escape.
    return f"$`{formula}`$"


def _block(formula: str) -> str:
    return f"```math\n{formula}\n```"


def _healthy(metric: Metric) -> str:
    healthy = metric.healthy
    if healthy is None:
        # A text in place of a null says why there is none.
        known = callable(metric.null) or isinstance(metric.null, float)
        return f"no range is right for every network{': compare it with its null' if known else ''}"
    ends = [
        f"{word} {end:.10g}"
        for word, end in (("at least", healthy.low), ("at most", healthy.high))
        if end is not None
    ]
    return f"{' and '.join(ends)} ({_cited([healthy.source])})"


def _null(metric: Metric) -> str:
    if not callable(metric.null):
        return f"{metric.null:.4g}" if isinstance(metric.null, float) else metric.null
    words = (metric.null.__doc__ or "that of iid noise of the same size").partition("\n")[0].rstrip(".")
    return f"{words}; in the analysis as `{metric.name}_null`"


def _cited(keys: Iterable[str]) -> str:
    """Authors, year and a link; ``this project`` and what is no key as it is."""
    return ", ".join(cited(key, form=_short) for key in keys)


def _short(found: Reference) -> str:
    return f"[{found.author_year}]({found.url})" if found.url else found.author_year


def _sources() -> str:
    named = ["this project"]
    for metric in CATALOGUE.values():
        named += [
            metric.cite,
            *filter(None, [metric.null_cite]),
            *([metric.healthy.source] if metric.healthy else []),
        ]
    named += [verdict.limits.source for verdict in VERDICTS.values()]
    # A source that several declarations cite is listed once.
    keys = keys_of(named)
    return "\n".join(f"- `{key}`: {_full(key)}" for key in keys) + "\n"


def _full(key: str) -> str:
    found = reference(key)
    arxiv = f" arXiv {found.eprint}." if found.eprint else ""
    return f"{_short(found)}, *{found.title}*.{arxiv}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it.

    ``arguments``: command line.
    Returns: 1 where ``--check`` finds an old page.
    """
    parser = argparse.ArgumentParser(description="write docs/methods.md from the declarations")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is old")
    page = methods_page()
    if parser.parse_args(arguments).check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page
        say(
            "docs/methods.md is current"
            if current
            else "docs/methods.md is old: run python -m benchmarks.docs.methods"
        )
        return int(not current)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    say(f"written: {PAGE.name}, {len(CATALOGUE)} metrics and {len(VERDICTS)} verdicts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
