"""Who says it? A definition names its source, a limit its own; an entry of the bibliography is used."""

from __future__ import annotations

import re
from pathlib import Path

import depthscope.diagnostics
from depthscope import CATALOGUE
from depthscope.app.text.bibliography import bibliography, entries
from depthscope.diagnostics.metrics.declaration import OURS
from depthscope.diagnostics.verdicts import VERDICTS
from depthscope.diagnostics.verdicts.declaration import DEFAULT

KEYS = set(entries(bibliography()))
# Limits that a publication states, by the name of their metric or verdict: none does for any of ours.
STATED_LIMITS: dict[str, str] = {}
# What the cited publication does not define, whatever else it measures.
OUR_DEFINITIONS = {
    "first_weight_distance",
    *("num_tokens", "identity_distance"),
    *("relative_gradient", "branch_share", "signal_share", "relative_deflated_gain"),
    "closest_stream_cosine",
    *("sequence_share",),
}


def is_a_source(source: str, name: str) -> bool:
    return source in (OURS, DEFAULT) or STATED_LIMITS.get(name) == source


def test_a_limit_is_not_attributed_to_a_publication_that_states_none():
    for name in VERDICTS:
        assert is_a_source(VERDICTS[name].limits.source, name)


def test_a_healthy_range_has_a_source_of_its_own():
    for name in [name for name, metric in CATALOGUE.items() if metric.healthy]:
        assert is_a_source(CATALOGUE[name].healthy.source, name)


def test_a_definition_is_ours_or_its_publication_is_in_the_bibliography():
    for name in CATALOGUE:
        cite = CATALOGUE[name].cite
        assert cite.startswith(OURS) == (name in OUR_DEFINITIONS)
        assert cite == OURS or cite.removeprefix(f"{OURS}, after ") in KEYS


def test_every_entry_is_the_source_of_something():
    cited = {metric.cite.removeprefix(f"{OURS}, after ") for metric in CATALOGUE.values()} | {
        metric.null_cite for metric in CATALOGUE.values()
    }
    # Kernels name their sources in words, by arXiv number or by author and year.
    folder = Path(depthscope.diagnostics.__file__).parent
    words = " ".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    for key, entry in entries(bibliography()).items():
        eprint = re.search(r"eprint\s*=\s*\{([\d.]+)\}", entry)
        surname, year = (
            re.search(r"author\s*=\s*\{([^,]+),", entry)[1],
            key.strip("abcdefghijklmnopqrstuvwxyz"),
        )
        named = (eprint and eprint[1] in words) or re.search(
            rf"{re.escape(surname)}\b[^.]{{0,40}}\b{year}", words
        )
        assert key in cited or named, f"{key} is the source of nothing: cite it or delete it"
