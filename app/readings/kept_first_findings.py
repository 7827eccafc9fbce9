"""At which step of a training did each finding begin, as it was found before? Kept with the analysis of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from depthscope.app.readings.file_version import FileVersion
from depthscope.app.readings.first_findings import Begun, FirstFindings, KnownFindings
from depthscope.app.readings.followed_history import history_of
from depthscope.app.readings.kept_readings import UNUSABLE, finding_document, finding_of, folders_of, stem_of
from depthscope.app.readings.readings import Reading
from depthscope.diagnostics import schema
from depthscope.diagnostics.atomic_writes import replaced_file


def keep_first_findings(path: Path, version: FileVersion, readings: Sequence[Reading]) -> None:
    """Judge the steps of a training that has ended, and keep where its findings began; nothing for a run without steps."""
    if not schema.is_live_store(path):
        readings = [reading for reading in readings if reading.num_steps > 1]
    for reading in readings:
        history = history_of(reading)
        found = FirstFindings(history)
        found.look(float("inf"))
        begun = [
            {
                "finding": finding_document(each.finding),
                "step": each.step,
                "before": each.before,
                "lasts": each.lasts,
            }
            for each in found.begun()
        ]
        text = json.dumps({"num_judged": found.num_judged, "begun": begun}, default=str)
        for place in _places(path, version, reading.chain):
            with suppress(OSError), replaced_file(place) as fresh:
                fresh.write_text(text, encoding="utf-8")
                break


def kept_first_findings(path: Path, version: FileVersion, chain: str) -> KnownFindings | None:
    """Where the findings of a run began.

    Returns: None where that is not kept of these very files, or cannot be read.
    """
    for place in _places(path, version, chain):
        with suppress(*UNUSABLE):
            document = json.loads(place.read_text(encoding="utf-8"))
            begun = []
            for each in document["begun"]:
                finding = finding_of(each["finding"])
                assert finding is not None
                begun.append(Begun(finding, each["step"], each["before"], each["lasts"]))
            return KnownFindings(int(document["num_judged"]), tuple(begun))
    return None


def _places(path: Path, version: FileVersion, chain: str) -> list[Path]:
    of = hashlib.sha256(chain.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return [folder / f"{stem_of(path, version)}.begun.{of}.json" for folder in folders_of(path)]
