"""How are the results of benchmarks.capture written? As a part of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from benchmarks.shared import tables as layout
from benchmarks.shared.tables import Table

TITLES = {"residual": "Residual (GPT-2)", "mhc": "mHC, n = 4", "tiny": "48 tiny blocks"}
PACKAGES = ("torch", "transformers", "hyper-connections", "depthscope")


def markdown(results: dict[str, Any], *, small: bool = False) -> str:
    """The first part of docs/benchmarks.md, or the part of small sizes."""
    parts = [(SMALL if small else HEAD).format(**results, peers=layout.pinned(results["versions"]))]
    parts += map(layout.as_markdown, tables(results))
    return "\n".join([*parts, layout.named(results["versions"]), ""])


def tables(results: dict[str, Any]) -> list[Table]:
    """Every table: times first, then memory."""
    found = [times(TITLES[case], entry) for case, entry in results["times"].items()]
    for case, modes in results["memory"].items():
        found += [
            memory(f"{TITLES[case]}, {mode}: peak MiB above the loaded model", rows)
            for mode, rows in modes.items()
        ]
    return found


def times(title: str, entry: dict[str, Any]) -> Table:
    modes = entry["modes"]
    # A tool may take one mode only, such as a forward without a backward.
    names = list(dict.fromkeys(name for rows in modes.values() for name in rows))
    header = ["", *(f"{mode}, × plain" for mode in modes), "same states"]
    rows = []
    for name in names:
        cells = [modes[mode].get(name, {}) for mode in modes]
        rows.append([name, *(cost(cell) for cell in cells), same(cells)])
        if title == TITLES["tiny"]:  # in other cases hooks are lost in the difference of two long times
            rows[-1].append(site(cells[0], entry["sites"]))
    if title == TITLES["tiny"]:
        header.append("µs a state, forward")
    sizes, plain = entry["sizes"], [modes[mode]["plain"]["seconds"] for mode in modes]
    head = (
        f"{title}: {sizes['layers']} × {sizes['width']}, {entry['parameters'] / 1e6:.1f} M parameters, "
        f"{sizes['batch']} × {sizes['tokens']} tokens, {entry['sites']} states, plain "
        + " and ".join(f"{1e3 * seconds:.0f} ms" for seconds in plain)
    )
    return head, header, rows


def cost(cell: dict[str, Any]) -> str:
    if "ratio" not in cell:
        return cell.get("reason", "–")
    low, high = cell["quartiles"]
    return f"{cell['ratio']:.2f} ({low:.2f}–{high:.2f})"


def same(cells: list[dict[str, Any]]) -> str:
    """Whether the states, and the gradients, were the hooks' bit for bit; else the largest difference."""
    names = {"state": "difference", "gradient": "gradient_difference"}
    words = []
    for kind, key in names.items():
        found = [cell[key] for cell in cells if key in cell]
        counts = [cell[f"{kind}s"] for cell in cells if f"{kind}s" in cell]
        # Tools that return no states have no cell.
        # The difference of no states is zero, which would read as equal.
        if found and min(counts):
            worst = max(found)
            words.append(f"{min(counts)} {kind}s: " + ("equal" if worst == 0 else f"off by {worst:.0e}"))
    return ", ".join(words)


def site(cell: dict[str, Any], sites: int) -> str:
    return f"{1e6 * cell['extra_seconds'] / sites:.0f}" if "ratio" in cell else ""


def memory(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    cells = [
        [name, row.get("reason") or f"{row['1']:.0f}", f"{row['2']:.0f}" if "2" in row else ""]
        for name, row in rows.items()
    ]
    return title, ["", "first step", "second step"], cells


HEAD = """# What capturing costs

Written by `{command}` on {date}, at commit {commit}; {machine}. Not edited by hand.

**How.** Each tool captures the residual state at every block (of the mHC model: at every connection), and with a backward the
gradient there too. First its states are compared with those of plain hooks; "equal" is bit for bit. Then one step of each tool
is timed in turn, {rounds} rounds after two that do not count, in time of the processor. A ratio is the median over that of the
plain step in the same process, with the quartiles in brackets. Plain, the hooks and this package share a process; each peer
has one of its own, with plain, since some change torch when they are imported. *Plain again* is a second plain step: its
distance from 1.00 is noise.

**What is in a row.** Putting hooks on and taking them off, the step, and what the tool does with the tensors.

* *A measured step* ends with `recorder.step()`. The weights change before each, as in training, so that raw sequences are kept
  anew: 8, here the whole batch, or 1.
* *probes.capture* is the whole call: it finds the chain anew, runs the model, proves the connections and builds the run.
* transformer-lens runs the model through its own modules with its own attention; the ratio includes that.

**Memory** is the kernel's high-water mark of resident memory, reset when the model was loaded and freed memory was given back,
in one process per tool, and again after the first step, in which this package finds the chain. What the first step gives is
kept; a capture finds the chain each time, and has no second step.

**Patience.** A tool that takes more than half a minute, and more than three times plain, is stopped: its times come from fewer
rounds.

**Not tried:** GPUs, several threads, compiled models, other models than these.

Peers: `pip install {peers}`.
"""

SMALL = """## The peers on small sizes

Written by `{command}` on {date}, at commit {commit}; {machine}. Not edited by hand.

As above, but for the sizes: one step of each tool in turn, {rounds} rounds, in time of the processor, relative to the plain
step of the same process. The goals of a one-shot capture are
4 × a plain forward and 1.2 × the cache of transformer-lens.
"""
