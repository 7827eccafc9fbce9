"""What is every design today? A table in `today.txt`; ``python -m tests.models.designs --write`` makes it anew.

A line is a design's outcome, its outcome after the advice of a refusal was taken, its outcome with `override` (``-`` where
there is none), and its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

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
    answers = override(design)
    return (
        first,
        outcome(design, **advice) if advice else None,
        outcome(design, **answers) if answers else None,
    )


def override(design: Design) -> dict[str, Any]:
    """What the author of a design would answer: where its blocks are, and how its states are laid out."""
    model = design.build()
    lists = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    }
    rows = {name: m for name, m in lists.items() if len(m) > 1 and not name.rpartition(".")[2].isdigit()}
    if not rows:
        return {}
    largest = max(rows, key=lambda name: sum(p.numel() for p in rows[name].parameters()))
    streams = {"streams": design.streams} if design.streams > 1 else {}
    return {"layers": f"{largest}.{{i}}", "layout": design.layout, **streams}


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
