"""How are the results of benchmarks.live written? As a part of docs/benchmarks.md, with the goals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.shared import tables

# What a step or call may take, relative to the plain one; of deep networks, and of streams, where they differ.
GOALS = {"describe": 1.5, "capture": 1.5, "first measured step": 5.0, 'metrics="live"': 1.25}
DEEP = {"describe": 4.0, "capture": 4.0, "first measured step": 6.0, 'metrics="live"': 2.5}
STREAMS = {"describe": 5.0, "capture": 4.5}
GOALS_OF = {"deep": DEEP, "mhc": STREAMS, "deepseek": STREAMS}
PEAKS, FLAT = {"describe": 1.5, "capture with gradients": 1.3, "first measured step": 1.3}, 0.02
HEAD = """## What a training costs, and a model that is met for the first time

Written by `{command}` on {date}, at commit {commit}; {machine}. Not edited by hand.

**How.** Measured and plain steps are taken in turn, in one process with one thread; a ratio is the median of their processor
times over that of the plain step, with the quartiles in brackets. A first measured step reads the model; it and the next two
are of a recorder of its own. Descriptions and captures are relative to a forward without a graph of the same batch. *Peak* is
what torch allocates at most at one time, relative to that of the forward, or of the step where there is a backward. A goal
that is missed is in bold, with the goal. Where a forward takes next to no memory, its multiples say nothing."""


def markdown(results: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The part of the page."""
    parts = [HEAD.format(**results), ""]
    for name, rows in results["times"].items():
        if "reason" in rows:
            parts.append(f"{names[name]}: {rows['reason']}")
            continue
        cells = [[way, _ratio(name, way, row), ""] for way, row in rows.items() if way != "plain"]
        for what, row in results.get("once", {}).get(name, {}).items():
            cells.append([what, _ratio(name, what, row), _peak(what, row)])
        title = f"{names[name]}, plain step {1000 * rows['plain']['seconds']:.0f} ms"
        header = ["", "× plain", "peak, × plain"]
        parts.append(tables.as_markdown((title, header, cells)))
        if live := rows.get('metrics="live"'):
            pays = live["ratio"] - 1  # per cent of a step
            parts.append(f"With `every=100` a training pays {pays:.2f} %{', goal 0.5 %' * (pays > 0.5)}.\n")
        if name in results.get("growth", {}):
            parts.append(f"{growth_sentence(results['growth'][name])}\n")
    return "\n".join([*parts, tables.named(results["versions"])])


def growth_sentence(growth: Mapping[str, Any]) -> str:
    """How the memory grew over many measured steps."""
    (first, early), (last, late) = growth["mib"].items()
    change = late / early - 1
    return (
        f"From measured step {first} to {last} resident memory goes from {early:.0f} to {late:.0f} MiB ({change:+.1%}"
        f"{f', goal {FLAT:.0%}' * (change > FLAT)}); the live numbers of a row are {growth['bytes_of_a_row'] / 1024:.1f} KiB."
    )


def _ratio(case: str, what: str, row: Mapping[str, Any]) -> str:
    low, high = row["quartiles"]
    text, goal = f"{row['ratio']:.2f}", (GOALS | GOALS_OF.get(case, {})).get(what)
    if goal is not None:
        text = f"**{text}**, goal {goal:.2f}" if row["ratio"] > goal + 0.005 and low > goal else text
    return f"{text} ({low:.2f}–{high:.2f})"


def _peak(what: str, row: Mapping[str, Any]) -> str:
    peak, goal = row.get("peak", 0.0), PEAKS.get(what, math.inf)
    return (f"**{peak:.2f}**, goal {goal}" if peak > goal else f"{peak:.2f}") if peak else ""
