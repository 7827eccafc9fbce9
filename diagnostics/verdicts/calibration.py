"""On how many healthy networks is a limit calibrated? What ``python -m tests.verdicts.calibrate`` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

DEFAULT = "depthscope's default"
"""The source of a limit that no publication states."""

# The declared source of limits that lie beyond what 99 % of these networks have; `source_of` says how many there were.
CALIBRATED = "calibrated on healthy networks"
FEWEST = 50  # networks: of fewer, 99 % says nothing


@cache
def calibration() -> Mapping[str, Any]:
    """The calibration set's numbers, by verdict under ``"verdicts"``."""
    text = (
        files("depthscope.diagnostics").joinpath("verdicts", "calibration.json").read_text(encoding="utf-8")
    )
    read: Mapping[str, Any] = json.loads(text)
    return read


def source_of(verdict: str, *, mildest: float, above: bool) -> str:
    """Who says the limits of a verdict that cites the calibration.

    Returns: Such as ``"calibrated on 212 healthy networks of 53 kinds"``; ``"depthscope's default"`` where the limit is not
    beyond what 99 % of them have, or there were too few.
    """
    measured = calibration()["verdicts"].get(verdict)
    if measured is None or measured["networks"] < FEWEST:
        return DEFAULT
    quantile = measured["shares"]["0.99"]
    if not (mildest > quantile if above else mildest < quantile):
        return DEFAULT
    return f"calibrated on {measured['networks']} healthy networks of {measured['of_kinds']} kinds"
