"""How do the results read? Counts, kinds of refusals and a row a model, in `docs/compatibility.md`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.models.matrix.campaign import Result
from tests.models.matrix.verdict import CRASHED, NOT_BUILDABLE, PART, REFUSED, RIGHT, UNPROVEN, WRONG

PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"
START, END = "<!-- matrix: start -->", "<!-- matrix: end -->"
COMMAND = "python -m tests.models.matrix"
ORDER = (RIGHT, PART, UNPROVEN, REFUSED, WRONG, CRASHED, NOT_BUILDABLE)
HEAD = ("model", "class", "verdict", "family", "states", "layout", "why")
LONGEST = 240


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(result: Result) -> tuple[str, ...]:
    """One model's line."""
    facts = result.facts
    layout = facts.get("layout", "")
    layouts = layout if isinstance(layout, list) else [layout]
    chains = facts.get("chains") or {}
    states = ", ".join(f"{name} {count}".strip() for name, count in chains.items())
    streams = facts.get("streams", 1)
    family = f"{facts.get('family', '')}{f', {streams} streams' if streams > 1 else ''}"
    return (
        result.name,
        facts.get("class", ""),
        result.outcome,
        family,
        states,
        ", ".join(f"`{each}`" for each in dict.fromkeys(layouts) if each),
        cell(result.reason),
    )


def cell(text: str) -> str:
    """Text that a table's cell can hold."""
    short = text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} …"
    return short.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


def kind(reason: str) -> str:
    """What reasons of one kind have in common: everything but names and numbers."""
    short = re.split(r"[;:] (?=name |say |pass |add )|, so ", reason)[0]
    return re.sub(r"\([\d, ]+\)|'[^']*'|\d[\d.,]*%?", "…", short)[:150]


def counts(results: Sequence[Result]) -> str:
    """Verdicts by package."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        found[result.package][result.outcome] += 1
        found["**all**"][result.outcome] += 1
    rows = [(package, *(str(counted[outcome]) for outcome in ORDER)) for package, counted in found.items()]
    return markdown(("from", *ORDER), sorted(rows, key=lambda cells: cells[0] == "**all**"))


def kinds(results: Sequence[Result], outcome: str) -> str:
    """Reasons of one verdict, the most frequent first, with some of the models."""
    found: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result.outcome == outcome:
            found[kind(result.reason)].append(result.name)
    rows = [
        (str(len(names)), cell(reason), ", ".join(names[:6]) + (", …" if len(names) > 6 else ""))
        for reason, names in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    return markdown(("number", "reason", "models"), rows) if rows else "None."


def section(results: Sequence[Result]) -> str:
    """The part of the page that the campaign writes."""
    tried = [result for result in results if result.outcome != NOT_BUILDABLE]
    packages = dict.fromkeys(result.package for result in tried)
    tables = "\n\n".join(
        f"### {package}\n\n{markdown(HEAD, [row(result) for result in tried if result.package == package])}"
        for package in packages
    )
    missing = [f"`{result.name}`" for result in results if result.outcome == NOT_BUILDABLE]
    return f"""
## Every class that can be built tiny

`{COMMAND}` builds each of them with random weights, captures it forward and backward without any override, and
compares it with plain hooks of torch: every state and gradient bit for bit, every label, the order of the axes (by two more
forwards, with another number of sequences and of tokens), every tower, and the family with the source.

- **right**: all of that is equal.
- **part**: all of that is equal for the chains that the run has, and it names the towers that it leaves out and why.
- **unproven**: the run itself says that its reading is not proven, and why.
- **refused**: a sentence instead of a run; most name the override with which it is read.
- **wrong**: a run that says something else than what is there. **crashed**: an exception that is no sentence of ours.

{counts(results)}

Part:

{kinds(results, PART)}

Unproven:

{kinds(results, UNPROVEN)}

Refused:

{kinds(results, REFUSED)}

{tables}

### Not built

{len(missing)} need an input, a library or a part that is not made here, or are configurations without a model:
{", ".join(missing)}.
"""


def section_of(page: str) -> str:
    """The part between the markers, with them; both alone where the page has none."""
    found = re.search(f"{re.escape(START)}.*{re.escape(END)}", page, re.DOTALL)
    return found[0] if found else f"{START}\n{END}"


def with_section(page: str, text: str) -> str:
    """The page with this part between its markers."""
    return page.replace(section_of(page), f"{START}\n{text.strip()}\n{END}")


def rows_of(page: str) -> dict[tuple[str, str], str]:
    """(package, model) → its line in the page."""
    found, package = {}, ""
    for line in section_of(page).splitlines():
        if line.startswith("### "):
            package = line[4:]
        elif line.startswith("| ") and package:
            found[package, line.split(" | ")[0][2:]] = line
    return found


def old_rows(results: Sequence[Result], page: str) -> list[str]:
    """Lines of the page that are not what came now."""
    known = rows_of(page)
    return [
        f"{result.package}: {result.name}: now {result.outcome} ({result.reason[:200]})"
        for result in results
        if result.outcome != NOT_BUILDABLE
        and known.get((result.package, row(result)[0])) != f"| {' | '.join(row(result))} |"
    ]
