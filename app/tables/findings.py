"""How are findings shown? As text for a terminal, and as a table for a paper."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.cards import Card, card_of, place_of
from depthscope.app.text.numbers import number
from depthscope.diagnostics import Finding, Severity

NOTHING = "Nothing found: no metric crossed its threshold."


def cards_of(reading: Reading, *, sent: bool = False) -> list[Card]:
    """The findings of a run as cards; where they are sent around, commands name the file alone."""
    path = Path(reading.path).name if sent else reading.path
    return cards_for(reading.findings, path, reading.results)


def cards_for(findings: Iterable[Finding], path: str, results: Mapping[str, xr.Dataset]) -> list[Card]:
    """Findings as cards, with the experiment that would settle each, and its result once it was run."""
    from depthscope.diagnostics.experiments import experiment_for

    target = f"CHECKPOINT --run {shlex.quote(path) if path else 'RUN'}"
    return [
        card_of(
            finding,
            # What only notes something asks for nothing.
            experiment=(finding.severity > Severity.INFO and experiment_for(finding, target)) or "",
            result=_result(finding, results),
        )
        for finding in findings
    ]


def _result(finding: Finding, results: Mapping[str, xr.Dataset]) -> str:
    """What the experiments and the lens that were run on a run say about a finding."""
    from depthscope.diagnostics.experiments import prediction_words, result_for

    parts = [result_for(finding, results["ablate"])] if "ablate" in results else []
    if "lens" in results and finding.verdict == "same_representation":
        parts.append(prediction_words(results["lens"]))
    return "; ".join(filter(None, parts))


def count_words(findings: Sequence[Finding]) -> str:
    """How many findings of each severity, such as ``1 fail, 2 warn``."""
    # In the order of the findings, worst first.
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.severity.name.lower()] = counts.get(finding.severity.name.lower(), 0) + 1
    return ", ".join(f"{count} {severity}" for severity, count in counts.items()) or "nothing found"


def findings_table(readings: Sequence[Reading]) -> Table:
    """Every finding of every run with its number, threshold and source, a printed line each."""
    found = _worst_first(readings)
    data = pd.DataFrame(
        [{"run": run} | _named_number(finding) for run, finding in found],
        # Without findings pandas has no columns, and the CSV would be an empty file.
        columns=None if found else ["run", "verdict", "severity", "sentence"],
    )
    printed = pd.DataFrame(
        [_row(run, finding) for run, finding in found],
        columns=["run", "verdict", "severity", "where", "value", "threshold", "source"],
    )
    metrics = tuple(dict.fromkeys(finding.metric for _, finding in found))
    caption = (
        "Findings, failures first, then warnings, then notes; of one severity run by run. The number, the threshold that it "
        "crossed and where the threshold comes from."
    )
    return Table("findings", "Findings", caption, data, printed, metrics=metrics, cited=("source",))


def _worst_first(readings: Sequence[Reading]) -> list[tuple[str, Finding]]:
    found = [(reading.name, finding) for reading in readings for finding in reading.findings]
    # `sorted` is stable: within a severity, run by run as each was judged.
    return sorted(found, key=lambda each: -each[1].severity)


def _named_number(finding: Finding) -> dict[str, Any]:
    """A finding with its number and the name of it: the metric may be another one that it is computed from."""
    plain = finding.as_dict()
    named = {name: plain.pop(name) for name in ("quantity", "value", "threshold")}
    first = {name: plain.pop(name) for name in ("verdict", "severity", "sentence")}
    return first | named | plain


def _row(run: str, finding: Finding) -> dict[str, str]:
    return {
        "run": run,
        "verdict": spoken(finding.verdict),
        "severity": finding.severity.name.lower(),
        "where": place_of(finding),
        **dict(zip(("value", "threshold"), _distinct(finding.value, finding.threshold), strict=True)),
        "source": finding.source,
    }


def _distinct(value: float, threshold: float) -> tuple[str, str]:
    """A number and its threshold, with three digits or as many as show a difference, as between cosines near 1."""
    printed = ("", "")
    for digits in range(3, 14):
        printed = number(float(value), digits=digits), number(float(threshold), digits=digits)
        if printed[0] != printed[1] or value == threshold:
            break
    return printed
