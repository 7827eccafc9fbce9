"""How are the results of benchmarks.analysis written? As a part of docs/benchmarks.md."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.shared import tables as layout
from benchmarks.shared.tables import Table

PACKAGES = ("torch", "numpy", "scipy", "transformers", "hyper-connections", "depthscope")


def markdown(results: dict[str, Any]) -> str:
    """This benchmark's part of docs/benchmarks.md."""
    parts = [HEAD.format(**results, peers=layout.pinned(results["versions"]))]
    for comparison in results["comparisons"].values():
        note = comparison["note"]
        answers, times = tables_of(comparison)
        parts.append(f"### {comparison['title']}\n")
        parts += [f"{note}\n"] if note else []
        parts += [layout.as_markdown(table) for table in (answers, times) if table[2]]
    return "\n".join([*parts, layout.named(results["versions"]), ""])


def tables_of(comparison: dict[str, Any]) -> tuple[Table, Table]:
    """Answers, then times with memory; either may be without rows."""
    rows = comparison["rows"]
    # Tools have different variants; the columns are all of them, in the order in which they were declared.
    variants = list(dict.fromkeys(key for row in rows.values() for key in row.get("errors", {})))
    sizes = list(dict.fromkeys(key for row in rows.values() for key in row.get("times", {})))
    answers = [
        [name, *(error(row["errors"].get(variant)) for variant in variants)]
        for name, row in rows.items()
        if row.get("errors")
    ]
    taken = [[name, *(cost(of(row, size)) for size in sizes)] for name, row in rows.items()]
    title = f"Time as a ratio to *{comparison['baseline']}*, and peak memory"
    return ("Error", ["", *variants], answers), (title, ["", *sizes], taken)


def of(row: dict[str, Any], size: str) -> dict[str, Any]:
    return row.get("times", {}).get(size, {"reason": row.get("reason", "–")})


def error(cell: float | str | None) -> str:
    if cell is None or isinstance(cell, str):
        return cell or "–"
    # One digit: the size of an error matters, its digits differ from machine to machine.
    return "NaN" if math.isnan(cell) else f"{cell:.0e}" if cell else "0"


def cost(cell: dict[str, Any]) -> str:
    """Ratio with quartiles, or that there was one round, then the time and the memory."""
    if "ratio" not in cell:
        return cell.get("reason", "–")
    low, high = cell["quartiles"]
    spread = f"{short(low)}–{short(high)}" if cell["rounds"] > 1 else "one round"
    return f"{short(cell['ratio'])} ({spread}), {duration(cell['seconds'])}, {cell['peak']:.0f} MiB"


def short(value: float) -> str:
    """Three digits or so."""
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 20 else f"{value:.2f}"


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


HEAD = """## What analysing costs, and how right it is

Written by `{command}` on {date}, at commit {commit}; {machine}. Not edited by hand.

**How.** First the answer of every tool is compared with a float64 reference that shares no code with it. Then all are timed in
turn, up to {rounds} rounds. A ratio is the median over that of the tool that the table names, in the same rounds, with the
quartiles in brackets, then the median time. Times are of the processor (one thread), which a busy machine disturbs less than
the clock on the wall. Tools of this package, of numpy and of torch share a process; each peer has one of its own, with what it
is compared with. A tool that takes more than some seconds is run once.

**Memory** is the kernel's high-water mark of resident memory above that of the data and the loaded tools, in the first run.

**Not tried:** GPUs, several threads, other sizes than these; where a cell says so, a size that would take minutes.

Peers: `pip install {peers}`.
"""
