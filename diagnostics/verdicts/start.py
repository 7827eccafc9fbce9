"""Is a network still as it was drawn, or nearly so? What is normal at the start is a note there, and no finding.

Limits without a source are heuristics of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from depthscope.diagnostics.verdicts.declaration import number

# Norms begin at 1; within 0.15 of it a network has made some hundred steps at most. This project, as in the capture.
YOUNG = 0.15


def young(attrs: Mapping[str, Any]) -> str:
    """What explains that parts of a network are still as they began; empty where it has left its start.

    ``attrs``: of the analysis: what the capture saw of the weights.
    """
    moved = attrs.get("norms_moved")
    if attrs.get("untouched"):
        return "It is so by construction at the start: the weights are as they were drawn. Judge it again after training."
    if not isinstance(moved, (int, float)) or moved > YOUNG:
        return ""
    return (
        "It is so by construction at the start of training, and the network is young: its norms are within "
        f"{number(moved)} of the 1 that they begin at. Judge it again after more steps."
    )
