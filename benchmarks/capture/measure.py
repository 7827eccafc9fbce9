"""What is measured in one process? Whether the tools return the same states, their times, their peak memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.capture.cases import Case, Sizes, build
from benchmarks.capture.tools import TOOLS, Captured, Tool
from benchmarks.shared.memory import forget_peak, status, trimmed
from benchmarks.shared.process import CannotTakeError, reason
from benchmarks.shared.rounds import ratio

MODES = {"forward": False, "forward + backward": True}
STEPS = (1, 2)  # whose memory is measured
WARM_UPS = 2  # rounds that do not count: allocators and lazy imports
MINIATURE = Sizes(layers=2, width=32, batch=1, tokens=8)
PATIENCE = (
    30.0  # seconds for the rounds of one tool; one that takes at most three times plain is never cut short
)


def times(case_name: str, sizes: Sizes, *, names: list[str], rounds: int) -> dict[str, Any]:
    """Times of every tool, with and without a backward, or the reason why it has none.

    ``case_name``: which model.
    ``sizes``: of it.
    ``names``: tools, ``"plain"`` first.
    ``rounds``: steps of each tool that count.
    Returns: ``modes`` to rows, one per tool, and the case's ``parameters``, ``sites`` and ``sizes``.
    """
    case = build(case_name, sizes)
    return {
        "modes": {mode: interleaved(case, names, backward, rounds) for mode, backward in MODES.items()},
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "sites": len(case.sites),
        "sizes": vars(case.sizes),
    }


def interleaved(case: Case, names: list[str], backward: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """Rows of every tool, its steps taken in turn with those of the others."""
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Tool] = {}
    for name in names:
        try:
            ready[name] = TOOLS[name](case, backward)
            rows[name] = agreement(case, ready[name], backward)
        except Exception as error:
            # Peers fail in many ways; each becomes the reason in the tool's row.
            ready.pop(name, None)
            rows[name] = {"reason": reason(error)}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    batch = case.batch()
    # In turn, not one tool after the other: a machine that becomes slower then slows all of them.
    for _ in range(WARM_UPS + rounds):
        for name, tool in ready.items():
            # A limit in multiples of plain too: on large models everything is slow, and nothing is to be cut.
            if sum(seconds[name]) <= max(PATIENCE, 3 * sum(seconds["plain"])):
                seconds[name].append(timed(case, tool, batch))
    for name, values in seconds.items():
        rows[name] |= ratio(values[WARM_UPS:] or values[-1:], seconds["plain"][WARM_UPS:])
    return rows


def timed(case: Case, tool: Tool, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of the processor for one step, which other processes disturb less than the clock on the wall."""
    with torch.no_grad():
        # Raises the version counter of the weights, as an optimizer does, and changes nothing.
        next(case.model.parameters()).view(-1)[0].add_(0.0)
    with tool.around():
        started = time.process_time()
        result = tool.step(batch)
        seconds = time.process_time() - started
    del result  # only now: freeing it is not part of the step
    case.model.zero_grad(set_to_none=True)
    return seconds


def agreement(case: Case, tool: Tool, backward: bool) -> dict[str, Any]:
    """Largest difference from the hooks' states and gradients; 0 is bitwise equality."""
    batch = case.batch()
    with tool.around():
        result = tool.step(batch)
        found = None if tool.read is None else tool.read(result)
    case.model.zero_grad(set_to_none=True)
    if found is None:
        return {}
    # Plain hooks are the reference: they see the tensors that the model itself passes on.
    truth: Captured = TOOLS["hooks, clones"](case, backward).step(batch)
    case.model.zero_grad(set_to_none=True)
    row = {"states": len(found.states), "difference": difference(case, found.states, truth.states)}
    if backward:
        row["gradients"] = len(found.gradients)
        row["gradient_difference"] = difference(case, found.gradients, truth.gradients)
    return row


def difference(case: Case, found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Largest absolute difference, state by state from the first; a tool may return fewer states than the hooks."""
    worst = 0.0
    for one, other in zip(found, truth, strict=False):
        expected = case.canonical(other)
        # A run gives (B, T, N, D) already, hooks the model's own layout.
        state = one.detach() if one.ndim == 4 else case.canonical(one.detach())
        if state.shape != expected.shape:
            raise CannotTakeError(f"gave a state of shape {tuple(state.shape)}, not {tuple(expected.shape)}")
        worst = max(worst, float((state - expected).abs().max()))
    return worst


# --- memory ---


def peaks(case_name: str, sizes: Sizes, *, name: str, backward: bool) -> dict[str, Any]:
    """Highest resident memory above the loaded model in the first step and in the second one, in MiB.

    What the first step gives stays in memory, as it must where something is computed over all steps.

    ``name``: the tool.
    ``backward``: whether a step has a backward.
    Returns: MiB by number of the step; or ``reason``.
    """
    case = build(case_name, sizes)
    found, results = {}, []
    try:
        warm_up(name, case_name, backward)
        tool = TOOLS[name](case, backward)
        floor = trimmed()
        with tool.around():
            for number in STEPS[
                : 1 if name == "probes.capture" else 2
            ]:  # a capture finds its chains each time
                results.append(tool.step(case.batch(number)))
                case.model.zero_grad(set_to_none=True)
                found[str(number)] = status("VmHWM") - floor
                forget_peak()  # discovery of chains, in the first step, would hide the peak of the second
    except Exception as error:
        return {"reason": reason(error)}
    return found


def warm_up(name: str, case_name: str, backward: bool) -> None:
    """Import what a tool imports at its first use: its memory is not that of captured states."""
    case = build(case_name, MINIATURE)
    tool = TOOLS[name](case, backward)
    with tool.around():
        tool.step(case.batch())
