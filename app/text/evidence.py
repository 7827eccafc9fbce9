"""What is said of a run's evidence everywhere? Whether its reading is proven, and what its mixing matrices satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from depthscope.app.text.visible import LONGEST_TEXT, visible
from depthscope.diagnostics.schema import UNPROVEN

Attributes = Mapping[Any, Any]
MOST_NAMED = 6
"""Runs of which a caption has a sentence each. A heuristic of ours: more are longer than the figure."""


def proof_sentence(attrs: Mapping[str, Attributes]) -> str:
    """Which of some runs are unproven, and why; empty where none is.

    ``attrs``: run name → attributes of the run or of its analysis.

    Examples
    --------
    >>> proof_sentence({"a": {"proof": "unproven: a branch was not seen"}})
    'Unproven: a branch was not seen.'
    >>> proof_sentence({"a": {"proof": "proven"}, "b": {"proof": "unproven: a branch was not seen"}})
    'Run b is unproven: a branch was not seen.'
    """
    unproven = {
        run: visible(proof.removeprefix(UNPROVEN), longest=LONGEST_TEXT)
        for run, of in attrs.items()
        if (proof := str(of.get("proof", ""))).startswith(UNPROVEN)
    }
    return _sentences(attrs, unproven, alone="Unproven", among="Run {} is unproven")


def constraint_sentence(attrs: Mapping[str, Attributes]) -> str:
    """What the mixing matrices of some runs were measured to satisfy; empty where no run has it.

    ``attrs``: run name → attributes of the run or of its analysis.

    Examples
    --------
    >>> constraint_sentence({"a": {"constraint": "doubly stochastic within 1e-7"}})
    'H_res: doubly stochastic within 1e-7.'
    """
    known = {
        run: visible(of["constraint"], longest=LONGEST_TEXT)
        for run, of in attrs.items()
        if of.get("constraint")
    }
    return _sentences(attrs, known, alone="H_res", among="H_res of run {}")


def _sentences(attrs: Mapping[str, Attributes], known: Mapping[str, str], *, alone: str, among: str) -> str:
    """Summarise each run in one sentence; name it only if there are several, and one of many only."""
    if len(known) > MOST_NAMED:
        run, words = next(iter(known.items()))
        others = f"{len(known)} of the {len(attrs)} runs, such as {run}"
        return f"{alone}, {others}: {words}."
    subjects = {run: alone if len(attrs) == 1 else among.replace("{}", run) for run in known}
    return " ".join(f"{subjects[run]}: {words}." for run, words in known.items())
