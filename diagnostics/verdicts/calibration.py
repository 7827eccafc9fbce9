"""On how many healthy networks is a limit calibrated? What ``python -m tests.verdicts.calibrate`` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

# The source of limits beyond the worst of 99 % of these networks; a verdict says how many there were.
CALIBRATED = "calibrated on healthy networks"
FEWEST = 50  # networks: of fewer, the worst of 99 % says nothing


@cache
def calibration() -> Mapping[str, Any]:
    """The calibration set's numbers, by verdict under ``"verdicts"``.

    Returns
    -------
    mapping
        As ``calibration.json`` has them.
    """
    text = (
        files("depthscope.diagnostics").joinpath("verdicts", "calibration.json").read_text(encoding="utf-8")
    )
    read: Mapping[str, Any] = json.loads(text)
    return read


def source_of(verdict: str, source: str) -> str:
    """The source of a verdict's limits, as it is told.

    Parameters
    ----------
    verdict : str
        Its name.
    source : str
        As declared.

    Returns
    -------
    str
        Such as ``"calibrated on 212 healthy networks of 53 kinds"``; any source but `CALIBRATED` as it is.
    """
    measured = calibration()["verdicts"].get(verdict)
    if source != CALIBRATED or measured is None:
        return source
    return f"calibrated on {measured['networks']} healthy networks of {measured['of_kinds']} kinds"
