"""What is every design today? A table in `today.txt`; ``python -m tests.models.designs --write`` makes it anew.

A line is a design's outcome, its outcome after the advice of a refusal was taken, its outcome with its author's `answers`
(``-`` where there is none), and its name.
"""

from __future__ import annotations

from pathlib import Path

from tests.models.designs.catalogue import DESIGNS
from tests.models.designs.design import Design
from tests.models.designs.outcome import Outcome, hint, outcome

TABLE = Path(__file__).with_name("today.txt")
# What must never be: an answer that looks right and is none, or an error that says nothing to the user.
NEVER = ("wrong", "misnamed", "crashed")


def found(design: Design) -> tuple[Outcome | None, ...]:
    """A design's outcome, the one after the advice of a refusal, and the one with its author's answers to all questions."""
    first = outcome(design)
    advice = hint(first.why) if first.word == "refused" else {}
    answers = design.answers()
    last = outcome(design, labels=not design.branches_named, **answers) if answers else None
    return (
        first,
        outcome(design, **advice) if advice else None,
        last,
    )


def line(design: Design, *outcomes: Outcome | None) -> str:
    """The design's line of the table."""
    return "".join(f"{of.word if of else '-':22}| " for of in outcomes) + design.name


def table() -> dict[str, str]:
    """The table's lines by the names of designs."""
    return {row.split("| ")[-1]: row for row in TABLE.read_text(encoding="utf-8").splitlines()}


def write() -> None:
    """Write the table anew."""
    rows = [line(design, *found(design)) for design in DESIGNS]
    TABLE.write_text("\n".join(rows) + "\n", encoding="utf-8")
