"""Is what the package says of a network right, part and said, unproven, refused, or wrong?"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import xarray as xr

import depthscope as ds
from tests.models.held_out import note
from tests.models.held_out.register import Net, called


def score(net: Net) -> tuple[str, str]:
    """The word for a network, and why."""
    model, page = net.build(), ""
    with note.listening() as truth, torch.no_grad():
        called(model, net.batch)
    try:
        page = str(ds.describe(model, net.batch))
        run = ds.capture(model, net.batch, gradients=False)
    except Exception as error:  # the package's own ValueErrors are refusals, anything else is a crash
        ours = isinstance(error, ValueError) and type(error).__module__.startswith("depthscope")
        where = "" if page else " in describe"
        return "refused" if ours else "wrong", f"{type(error).__name__}{where}: {error}"
    traces = [node.to_dataset() for node in run.subtree if "residual" in node.data_vars]
    missing, false = compared(traces, truth)
    proof, family = str(run.attrs.get("proof", "")), str(run.attrs.get("family", ""))
    if not proof.startswith("proven") or family in ("unknown", "unproven"):
        return "unproven", f"{proof}; {'; '.join(false + missing) or 'all found'}"
    said = [str(part) for part in run.attrs.get("not_covered", ())]
    said += [line.strip() for line in page.splitlines() if re.search("not covered|left out|leaves out", line)]
    if false or (missing and not said):
        return "wrong", "; ".join([f"called {family}", *false, *missing])
    return ("part and said", f"{'; '.join(missing)}; {said}") if missing else ("right", family)


def compared(traces: list[xr.Dataset], truth: note.Truth) -> tuple[list[str], list[str]]:
    """What is missing, and what is false."""
    missing, false = [], []
    for name, states in truth.chains.items():
        last, reached = None, {}
        for number, state in enumerate(states):
            here = next((p for way in state.ways if (p := place(traces, way, reached))), None)
            if here is None:
                missing.append(f"{name} state {number} of 0 to {len(states) - 1}".strip())
            elif state.mixes:
                told = h_res(traces[here[0]], last[1], here[1]) if last and last[0] == here[0] else []
                if not any(same(value, of) for value in told for of in state.mixes):
                    words = f"{'another' if told else 'no'} h_res to state {number}"
                    (false if told else missing).append(words)
            last = here
    every = [values for trace in traces for values in trace["residual"].values]
    false += [f"calls decoy {n} a state" for n, x in enumerate(truth.decoys) for v in every if same(v, x)]
    return missing, false


def place(traces: list[xr.Dataset], way: tuple[torch.Tensor, ...], reached: dict[int, int]) -> Any:
    """The memory and depth of a reading's first tensor, each tensor deeper than the last found in its memory."""
    found: list[tuple[int, int]] = []
    for part in way:
        rest = ((g, d) for g, t in enumerate(traces) for d in range(reached.get(g, -1) + 1, t.sizes["depth"]))
        fits = (p for p in rest if p not in found and same(traces[p[0]]["residual"].values[p[1]], part))
        if (at := next(fits, None)) is None:
            return None
        found.append(at)
    reached.update(found)
    return found[0]


def h_res(trace: xr.Dataset, begin: int, end: int) -> list[np.ndarray]:
    """The matrices of four streams that a run has between two depths."""
    if "h_res" not in trace:
        return []
    depths = zip(trace["depth_in"].values, trace["depth_out"].values, strict=True)
    return [trace["h_res"].values[k] for k, (i, o) in enumerate(depths) if begin <= i and o <= end]


def same(values: np.ndarray, true: torch.Tensor) -> bool:
    """Whether two arrays are the same but for rounding; a static matrix is one of all tokens."""
    true = true.expand(*values.shape[:2], *true.shape) if true.ndim == 2 else true
    return values.shape == true.shape and bool(np.abs(values - true.numpy()).max() <= 1e-5 * true.abs().max())
