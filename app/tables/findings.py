"""How are findings shown? As text for a terminal, and as a table for a paper."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import xarray as xr

from depthscope.app.readings.readings import Reading
from depthscope.app.tables.tables import Table, spoken
from depthscope.app.text.cards import Card, card_of, place_of
from depthscope.app.text.numbers import number
from depthscope.diagnostics import Finding, Severity
from depthscope.diagnostics.experiments import experiment_for, prediction_words, result_for

NOTHING = "Nothing found: no metric crossed its threshold."


def cards_of(reading: Reading, *, sent: bool = False) -> list[Card]:
    """The findings of a run as cards; where they are sent around, commands name the file alone."""
    path = Path(reading.path).name if sent else reading.path
    return cards_for(reading.findings, path, reading.results)


def cards_for(findings: Iterable[Finding], path: str, results: Mapping[str, xr.Dataset]) -> list[Card]:
    """Findings as cards, with the experiment that would settle each, and what it and the lens gave once they were run."""
    target = f"CHECKPOINT --run {shlex.quote(path) if path else 'RUN'}"
    cards = []
    for finding in findings:
        parts = [result_for(finding, results["ablate"])] if "ablate" in results else []
        if "lens" in results and finding.verdict == "same_representation":
            parts.append(prediction_words(results["lens"]))
        # What only notes something asks for nothing.
        experiment = (finding.severity > Severity.INFO and experiment_for(finding, target)) or ""
        cards.append(card_of(finding, experiment=experiment, result="; ".join(filter(None, parts))))
    return cards


def count_words(findings: Sequence[Finding]) -> str:
    """How many findings of each severity, such as ``1 fail, 2 warn``."""
    counts = Counter(finding.severity.name.lower() for finding in findings)  # worst first, as they are
    return ", ".join(f"{count} {severity}" for severity, count in counts.items()) or "nothing found"


def findings_table(readings: Sequence[Reading]) -> Table:
    """Every finding of every run with its number, threshold and source, a printed line each."""
    found = [(reading.name, finding) for reading in readings for finding in reading.findings]
    # `sort` is stable: within a severity, run by run as each was judged.
    found.sort(key=lambda each: -each[1].severity)
    data = pd.DataFrame(
        [{"run": run, **finding.as_dict()} for run, finding in found],
        # Without findings pandas has no columns, and the CSV would be an empty file.
        columns=None if found else ["run", "verdict", "severity", "sentence"],
    )
    rows = [
        (run, spoken(of.verdict), of.severity.name.lower(), place_of(of), *_distinct(of), of.source)
        for run, of in found
    ]
    columns = ["run", "verdict", "severity", "where", "value", "threshold", "source"]
    printed = pd.DataFrame(rows, columns=columns)
    metrics = tuple(dict.fromkeys(finding.metric for _, finding in found))
    caption = (
        "Findings, failures first, then warnings, then notes; of one severity run by run. The number, the threshold that it "
        "crossed and where the threshold comes from."
    )
    return Table("findings", "Findings", caption, data, printed, metrics=metrics, cited=("source",))


def _distinct(finding: Finding) -> tuple[str, str]:
    """A number and its threshold, with three digits or as many as show a difference, as between cosines near 1."""
    printed = ("", "")
    for digits in range(3, 14):
        printed = number(finding.value, digits=digits), number(finding.threshold, digits=digits)
        if printed[0] != printed[1] or finding.value == finding.threshold:
            break
    return printed
