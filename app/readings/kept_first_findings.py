"""At which step of a training did each finding begin, as it was found before? Saved with the analysis of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.first_findings import Begun, FirstFindings, KnownFindings
from depthscope.app.readings.kept_readings import finding_document, finding_of, keep_document, kept_document
from depthscope.app.readings.readings import Reading
from depthscope.app.readings.training_history import history_of
from depthscope.diagnostics import schema


def keep_first_findings(path: Path, version: FileVersion, readings: Sequence[Reading]) -> None:
    """Judge the steps of a training that has ended, and keep where its findings began; nothing for a run without steps."""
    if not schema.is_live_store(path):
        readings = [reading for reading in readings if reading.num_steps > 1]
    for reading in readings:
        history = history_of(reading)
        found = FirstFindings(history)
        found.look(float("inf"))
        begun = [{**vars(each), "finding": finding_document(each.finding)} for each in found.begun()]
        document = {"num_judged": found.num_judged, "begun": begun}
        keep_document(path, version, _ending(reading.chain), document)


def kept_first_findings(path: Path, version: FileVersion, chain: str) -> KnownFindings | None:
    """Where the findings of a run began.

    Returns: None where that was not saved of these very files, or cannot be read.
    """
    return kept_document(path, version, _ending(chain), _read)


def _read(document: Any) -> KnownFindings:
    begun = tuple(Begun(**{**each, "finding": finding_of(each["finding"])}) for each in document["begun"])
    return KnownFindings(int(document["num_judged"]), begun)


def _ending(chain: str) -> str:
    return f".begun.{hashlib.sha256(chain.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}.json"
