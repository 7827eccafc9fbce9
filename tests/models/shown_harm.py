"""Synthetic runs have no model to try anything on: an analysis of which every suspicion was shown to do harm."""

from __future__ import annotations

from typing import Any

from depthscope.diagnostics.experiments import HARMFUL, SETTLED_BY
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.consequences import CONSEQUENCES


def with_result(analysis: Any, *, loss_change: float = 0.0, **more: Any) -> Any:
    """The analysis with a result of this cost for every suspicion, wherever it is."""
    results = [
        {"verdict": name, "chain": "", "stream": None, "first": 0, "last": 10**6, "kind": SETTLED_BY[name],
         "claim": "harmful" if name in HARMFUL else "of no use", "depths": [1, 1], "loss": 2.0,
         "loss_change": loss_change, **more}
        for name, verdict in VERDICTS.items()
        if verdict.suspicion
    ]  # fmt: skip
    return analysis.assign_attrs({CONSEQUENCES: results})
