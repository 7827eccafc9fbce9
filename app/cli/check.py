"""`depthscope check`: the findings of runs in plain words, and an exit code for continuous integration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from depthscope.app.cli.main import FINE, FOUND
from depthscope.app.cli.options import Json, MaxBytes, Runs, names, option, read_several, say_cards
from depthscope.app.text.terminal import emit, printable, say
from depthscope.diagnostics.errors import InputError

if TYPE_CHECKING:
    from depthscope.app.readings.readings import Reading
    from depthscope.diagnostics import Finding, Severity


def check(
    runs: Runs,
    fail_on: Annotated[
        str,
        option("warn|fail|NAMES", "Exit 1 at this severity or above, or on these verdicts, comma separated."),
    ] = "fail",
    json: Json = False,
    max_bytes: MaxBytes = None,
) -> int:
    """Judge runs; exit 1 where one fails.

    Each finding is explained: what, where, how sure, and what to try.
    """
    lowest, verdicts = _limits(names(fail_on) or [])
    readings, left_out = read_several(runs, max_bytes, "analysing and judging")
    failed = [
        reading.name
        for reading in readings
        if any(_exceeds(finding, lowest, verdicts) for finding in reading.findings)
    ]
    if json:
        # The limits are part of the document: a log shows why a check passed.
        emit(
            {
                "failed": failed,
                "fail_on": names(fail_on),
                "runs": [_as_dict(reading) for reading in readings],
                "left_out": left_out,
            }
        )
    else:
        _print_findings(readings)
        say(f"check --fail-on {fail_on}: {_outcome(failed, left_out)}")
    return FOUND if failed or left_out else FINE


def _limits(chosen: Sequence[str]) -> tuple[Severity | None, set[str]]:
    """The lowest severity that fails a check (None where none is named), and the verdicts that fail it."""
    from depthscope.diagnostics import Severity
    from depthscope.diagnostics.errors import did_you_mean
    from depthscope.diagnostics.verdicts import VERDICTS

    # A note (INFO) is never a reason to fail: it describes the model and asks for nothing.
    severities = {severity.name.lower(): severity for severity in (Severity.WARN, Severity.FAIL)}
    for name in chosen:
        if name not in severities and name not in VERDICTS:
            advice = did_you_mean(
                name, (*severities, *VERDICTS), otherwise="expected warn, fail or a verdict"
            )
            raise InputError(f"--fail-on has {printable(name, longest=80)!r}; {advice}")
    lowest = min((severities[name] for name in chosen if name in severities), default=None)
    return lowest, {name for name in chosen if name not in severities}


def _exceeds(finding: Finding, lowest: Severity | None, verdicts: set[str]) -> bool:
    """Whether a finding fails the check; a verdict that is named fails from WARN on."""
    from depthscope.diagnostics import Severity

    if finding.verdict in verdicts and finding.severity >= Severity.WARN:
        return True
    return lowest is not None and finding.severity >= lowest


def _as_dict(reading: Reading) -> dict[str, Any]:
    from depthscope.app.tables.findings import cards_of
    from depthscope.diagnostics import schema

    return {
        "run": reading.name,
        **({schema.LIVE: reading.attrs[schema.LIVE]} if schema.LIVE in reading.attrs else {}),
        **{name: reading.attrs.get(name) for name in ("proof", "constraint", "memory")},
        "findings": [card.as_dict() for card in cards_of(reading)],
        "passed": sorted({finding.verdict for finding in reading.passed}),
        "not_computed": reading.not_computed,
    }


def _print_findings(readings: Sequence[Reading]) -> None:
    from depthscope.app.readings.readings import sentence_of
    from depthscope.app.tables.findings import count_words
    from depthscope.diagnostics import schema
    from depthscope.diagnostics.verdicts import VERDICTS

    for reading in readings:
        facts = [reading.attrs[key] for key in ("model", "family") if reading.attrs.get(key)]
        about = ", ".join(map(printable, facts))
        say(f"{printable(reading.name)}{f' ({about})' if about else ''}: {count_words(reading.findings)}")
        lines = {
            "live store": sentence_of(reading.attrs, schema.LIVE),
            "H_res": reading.attrs.get("constraint"),
            "reading": reading.attrs.get("proof"),
            "memory": sentence_of(reading.attrs, "memory"),
        }
        for title, line in lines.items():
            if line:
                say(f"  {title}: {printable(line)}")
        # What was not judged has not passed.
        judged = {finding.verdict for finding in (*reading.findings, *reading.passed)}
        reasons = sorted(reading.not_computed, key=lambda reason: -len(reading.not_computed[reason]))
        why = f"; not measured, such as: {printable(reasons[0])}" if reasons else ""
        say(f"  verdicts: {len(judged)} of {len(VERDICTS)} judged{why}")
        say_cards(reading)


def _outcome(failed: Sequence[str], left_out: Sequence[Mapping[str, Any]]) -> str:
    """The result of the check in words: what was not judged has not passed."""
    if failed or not left_out:
        words = f"failed: {', '.join(map(printable, failed))}" if failed else "passed"
    else:
        words = "not passed"
    left = ", ".join(printable(run["run"]) for run in left_out)
    return f"{words}; not judged: {left}" if left else words
