"""How are the results of benchmarks.gpu written? As tables for a terminal, and as the page docs/gpu.md."""

from __future__ import annotations

from typing import Any

from benchmarks.shared import tables as layout
from benchmarks.shared.tables import Table

HEAD = """# On a GPU

Written by `{command}` on {date}: {device}; {machine}. Not edited by hand.

Equality: ‖device − CPU‖ / ‖CPU‖ of raw states, gradients and matrices; for compiled models of the sums over every token that
the compiled code hands out. Cost: medians of wall time, each with the device waited for, relative to plain steps that were
taken in turn with them. Synchronisations are those that torch notes (`torch.cuda.set_sync_debug_mode`), before the end of a
measured step and at it.
"""


def markdown(results: dict[str, Any]) -> str:
    """The page docs/gpu.md."""
    parts = [HEAD.format(**results), *map(layout.as_markdown, tables(results)), left_out(results)]
    return "\n".join([*parts, layout.named(results["versions"]), ""])


def text(results: dict[str, Any]) -> str:
    """Tables for a terminal."""
    head = f"{results['date']}, {results['device']}, {results['machine']}"
    return "\n\n".join([head, layout.as_text(tables(results)), left_out(results)])


def left_out(results: dict[str, Any]) -> str:
    """What was not measured."""
    named = ", ".join(results["left_out"])
    return f"Left out, since the time was over: {named}.\n" if named else ""


def tables(results: dict[str, Any]) -> list[Table]:
    """Every table: equality, then the cost of each model."""
    rows = [
        [
            row["case"],
            row["how"],
            ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()),
            f"{row['limit']:g}",
            "yes" if row["is_equal"] else "NO",
        ]
        for row in results["equality"]
    ]
    found: list[Table] = [
        ("Equality with the CPU", ["model", "how", "relative errors", "limit", "within"], rows)
    ]
    for case in dict.fromkeys(row["case"] for row in results["cost"]):
        header = ["", "× plain", "quartiles", "s", "peak MiB", "synchronisations in the step", "at its end"]
        of = [
            [
                f"{row['mode']}, {row['way']}",
                f"{row['ratio']:.3f}",
                "{:.3f} … {:.3f}".format(*row["quartiles"]),
                f"{row['seconds']:.4f}",
                told(row["mib"]),
                *map(told, row["syncs"]),
            ]
            for row in results["cost"]
            if row["case"] == case
        ]
        found.append((f"Cost of a training step: {case}", header, of))
    return found


def told(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
