"""`depthscope check`: the findings of runs in plain words, and an exit code for continuous integration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from depthscope.app.cli.arguments import add_json, add_runs
from depthscope.app.cli.command import Command
from depthscope.app.cli.several_runs import exit_code, read_several
from depthscope.app.cli.values import Names
from depthscope.app.text.terminal import columns, emit, encodable, printable, say

if TYPE_CHECKING:
    from depthscope.app.readings.readings import Reading
    from depthscope.diagnostics import Finding, Severity


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument(
        "--fail-on",
        type=Names("severity or verdict", _severities_and_verdicts),
        default=["fail"],
        metavar="warn|fail|NAMES",
        help="exit 1 at this severity or above, or on these verdicts, comma separated (default fail)",
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from depthscope.app.readings.readings import live_sentence
    from depthscope.app.readings.standings import DOES_NOT_APPLY, not_judged, standings
    from depthscope.app.tables.findings import cards_of

    lowest, verdicts = _limits(args.fail_on)
    readings, left_out = read_several(args, "analysing and judging")
    failed = [
        reading.name
        for reading in readings
        if any(_exceeds(finding, lowest, verdicts) for finding in reading.findings)
    ]
    if args.json:
        runs = [
            {
                "run": reading.name,
                **({"live_store": reading.attrs["live_store"]} if live_sentence(reading.attrs) else {}),
                "proof": reading.attrs.get("proof"),
                "constraint": reading.attrs.get("constraint"),
                "memory": reading.attrs.get("memory"),
                "findings": [card.as_dict() for card in cards_of(reading)],
                "passed": sorted({finding.verdict for finding in reading.passed}),
                "not_judged": not_judged(standings(reading)),
                "does_not_apply": not_judged(standings(reading), DOES_NOT_APPLY),
            }
            for reading in readings
        ]
        # The limits are part of the document: a log shows why a check passed.
        emit({"failed": failed, "fail_on": args.fail_on, "runs": runs, "left_out": left_out})
    else:
        _print_findings(readings)
        say(f"check --fail-on {','.join(args.fail_on)}: {_outcome(failed, left_out)}")
    return exit_code(left_out, found=bool(failed))


def _severities_and_verdicts() -> list[str]:
    from depthscope.diagnostics import Severity
    from depthscope.diagnostics.verdicts import VERDICTS

    # A note (INFO) is never a reason to fail: it describes the model and asks for nothing.
    return [*(severity.name.lower() for severity in (Severity.WARN, Severity.FAIL)), *VERDICTS]


def _limits(names: Sequence[str]) -> tuple[Severity | None, set[str]]:
    """The lowest severity that fails a check (None where none is named), and the verdicts that fail it."""
    from depthscope.diagnostics import Severity

    severities = {severity.name.lower(): severity for severity in Severity}
    lowest = min((severities[name] for name in names if name in severities), default=None)
    return lowest, {name for name in names if name not in severities}


def _exceeds(finding: Finding, lowest: Severity | None, verdicts: set[str]) -> bool:
    """Whether a finding fails the check; a verdict that is named fails from WARN on."""
    from depthscope.diagnostics import Severity

    # Naming a verdict makes its warnings count; its notes still describe and ask for nothing.
    if finding.verdict in verdicts and finding.severity >= Severity.WARN:
        return True
    return lowest is not None and finding.severity >= lowest


def _print_findings(readings: Sequence[Reading]) -> None:
    from depthscope.app.readings.readings import live_sentence, memory_sentence
    from depthscope.app.tables.findings import NOTHING, cards_of, count_words
    from depthscope.app.text.cards import cards_text

    for reading in readings:
        facts = [reading.attrs[key] for key in ("model", "family") if reading.attrs.get(key)]
        about = ", ".join(map(printable, facts))
        say(f"{printable(reading.name)}{f' ({about})' if about else ''}: {count_words(reading.findings)}")
        live = live_sentence(reading.attrs)
        if live:
            say(f"  live store {printable(live)}")
        memory = memory_sentence(reading.attrs)
        for key, words in (("constraint", "H_res"), ("proof", "reading")):
            if reading.attrs.get(key):
                say(f"  {words} {printable(reading.attrs[key])}")
        if memory:
            say(f"  memory {printable(memory)}")
        say(f"  verdicts {_judged_words(reading)}")
        say()
        say(cards_text(cards_of(reading), width=columns(), shown=encodable) or NOTHING)
        say()


def _outcome(failed: Sequence[str], left_out: Sequence[Mapping[str, Any]]) -> str:
    """The result of the check in words: what was not judged has not passed."""
    if failed or not left_out:
        words = f"failed: {', '.join(map(printable, failed))}" if failed else "passed"
    else:
        words = "not passed"
    names = ", ".join(printable(run["run"]) for run in left_out)
    return f"{words}; not judged: {names}" if names else words


def _judged_words(reading: Reading) -> str:
    """How many verdicts were judged, and why most of the others were not: what was not judged has not passed."""
    from depthscope.app.readings.standings import counts_words, not_judged, standings

    found = standings(reading)
    reasons = not_judged(found)
    words = counts_words(found.values())
    return f"{words} (not judged: {printable(next(iter(reasons)))})" if reasons else words


COMMAND = Command(
    "check",
    "check runs against limits and explain each finding; exit 1 where one fails",
    _add_arguments,
    _run,
)
