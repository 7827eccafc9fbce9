"""What does docs/verdicts.md say? Found, missed and false alarms, by mechanism and by kind of healthy network."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.verdicts.drawing import Case
from tests.verdicts.faults import FAULTS
from tests.verdicts.healthy import KINDS
from tests.verdicts.scoring import (
    ALARM,
    CRASHED,
    ELSEWHERE,
    FOUND,
    MILD,
    MISSED,
    QUIET,
    REFUSED,
    Outcome,
)

PAGE = Path(__file__).parents[2] / "docs" / "verdicts.md"
Outcomes = Sequence[tuple[Case, Outcome]]
FAULTY, HEALTHY = (FOUND, MILD, ELSEWHERE, MISSED, REFUSED, CRASHED), (QUIET, ALARM, REFUSED, CRASHED)


def tables(outcomes: Outcomes) -> str:
    """Counts of all, then by mechanism, then by kind."""
    faulty = [outcome for case, outcome in outcomes if case.faulty]
    healthy = [outcome for case, outcome in outcomes if not case.faulty]
    severities = {fault.title: fault.severity.name for fault in FAULTS}
    rows = [
        (title, severities[title], *counts) for title, counts in _counted(faulty, list(severities), FAULTY)
    ]
    kinds = _counted(healthy, [kind.title for kind in KINDS], HEALTHY)
    return "\n\n".join((
        summary(faulty, healthy),
        table(("planted fault", "at least", *FAULTY), rows),
        table(("healthy network", *HEALTHY), [(title, *counts) for title, counts in kinds]),
    ))  # fmt: skip


def summary(faulty: Sequence[Outcome], healthy: Sequence[Outcome]) -> str:
    counts, calm = Counter(each.outcome for each in faulty), Counter(each.outcome for each in healthy)
    told = ", ".join(f"{counts[name]} {name}" for name in FAULTY if counts[name] or name == FOUND)
    quiet = ", ".join(f"{calm[name]} {name}" for name in HEALTHY if calm[name] or name == ALARM)
    return f"{len(faulty)} faulty networks: {told}. {len(healthy)} healthy ones: {quiet}."


def share_wrong(text: str) -> float:
    """The share of networks that were judged wrong when the page was written, and never quite none."""
    faulty, found, healthy, quiet = (
        int(re.search(pattern, text)[1])
        for pattern in (r"(\d+) faulty networks", r"(\d+) found", r"(\d+) healthy ones", r"(\d+) quiet")
    )
    # Laplace's rule of succession: what was not seen in 240 networks may still come.
    return (faulty + healthy - found - quiet + 1) / (faulty + healthy + 2)


def _counted(
    outcomes: Sequence[Outcome], titles: list[str], names: Sequence[str]
) -> list[tuple[str, tuple[str, ...]]]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for outcome in outcomes:
        counts[outcome.title][outcome.outcome] += 1
    return [
        (title, tuple(str(counts[title][name] or "") for name in names))
        for title in titles
        if title in counts
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(outcomes: Outcomes, draw: int) -> None:
    """Write the scores of the zoo."""
    wrong = [
        outcome.line.replace("|", "¦")[:300]
        for _, outcome in outcomes
        if outcome.outcome not in (FOUND, QUIET)
    ]
    listed = "\n".join(f"* {line}" for line in wrong) or "None."
    write_section("Planted faults", f"""
Written by `python -m tests.verdicts --draw {draw} --cases {len(outcomes)} --write`; another draw is another zoo. Every
network is small and built from one seed: family, width, depth, streams, weights, task, training and batch. A planted fault is
one change of a healthy network. It is *found* where a verdict that names the mechanism reports it at its place (within one
depth, the right stream or module) and with at least the severity of the second column; *too mild* and *elsewhere* count as
missed. A warning or failure about a healthy network is a *false alarm*; notes are none. *Refused* is a network that the
capture does not read, with a reason. `python -m tests.verdicts WORDS --case SEED` repeats one network.

{tables(outcomes)}

### What went wrong

{listed}
""")  # fmt: skip


def write_section(title: str, body: str) -> None:
    """Write one section of the page in the place of the one of that title, or as the last; the others stay."""
    sections = re.split(r"(?m)^(?=## )", PAGE.read_text(encoding="utf-8"))
    section = f"## {title}\n{body}"
    places = [n for n, each in enumerate(sections) if each.startswith(f"## {title}\n")]
    sections[places[0] if places else len(sections) :] = [
        section,
        *sections[places[0] + 1 if places else len(sections) :],
    ]
    PAGE.write_text("\n\n".join(each.rstrip() for each in sections) + "\n", encoding="utf-8")
