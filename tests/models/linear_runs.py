"""Runs of small linear models: connections of every kind, computed by their recurrence alone, with frozen branch outputs.

Shapes: C connections, S sequences, T tokens, n streams, V views, D features, K = C + 1 sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics import schema
from tests.models.synthetic_run import doubly_stochastic

# Branch outputs (C, S, T, V, D) in, states (depth, S, T, n, D) and branch inputs (C, S, T, V, D) out.
Recurrence = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class LinearModel:
    """A model whose branches are frozen: its states and branch inputs are linear in the branches' outputs."""

    name: str
    family: str
    variables: dict[str, np.ndarray]
    outputs: np.ndarray
    recurrence: Recurrence
    coords: dict[str, Any] = field(default_factory=dict)
    embedding: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def run(self, *, proof: str | None = "proven", **attrs: Any) -> xr.DataTree:
        """The run that a capture of it would give."""
        states, inputs = self.recurrence(self.outputs)
        count = len(self.outputs)
        depth_in = self.coords.get("depth_in", np.arange(count))
        variables: dict[str, Any] = {
            "residual": (schema.STATE, states),
            "mask": (("sample", "token"), np.ones(states.shape[1:3], dtype=bool)),
        }
        if inputs.shape[3] == self.outputs.shape[3] == 1:
            variables["branch_in"] = (schema.TRACE["branch_in"].dims, inputs[:, :, :, 0])
            variables["branch_out"] = (schema.TRACE["branch_out"].dims, self.outputs[:, :, :, 0])
        variables |= {name: (schema.TRACE[name].dims, values) for name, values in self.variables.items()}
        coords = {
            "depth": np.arange(len(states)),
            "layer": ("depth", np.arange(-1, len(states) - 1)),
            "site": ("depth", np.array(["embed"] + ["post"] * (len(states) - 1), dtype=object)),
            "module": ("depth", np.array([f"blocks.{i}" for i in range(len(states))], dtype=object)),
            "stream": np.arange(states.shape[3]),
            "connection": np.arange(count),
            "connection_layer": ("connection", np.arange(count)),
            "branch": ("connection", np.array(["block"] * count, dtype=object)),
            "connection_module": (
                "connection",
                np.array([f"blocks.{i}" for i in range(count)], dtype=object),
            ),
            "depth_in": ("connection", np.asarray(depth_in)),
            "depth_out": ("connection", np.asarray(self.coords.get("depth_out", np.asarray(depth_in) + 1))),
        }
        for name in ("after_sum", "proof"):
            if name in self.coords:
                coords[name] = ("connection", np.asarray(self.coords[name]))
        stated = {} if proof is None else {"proof": proof}
        return schema.create_run(
            xr.Dataset(variables, coords),
            attrs={
                "model": self.name,
                "family": self.family,
                "n_streams": states.shape[3],
                **stated,
                **attrs,
            },
        )

    def by_differences(self) -> tuple[np.ndarray, np.ndarray]:
        """|M| by moving one output and looking at what each branch is given: the mean over tokens (C, C), and of every token.

        The root mean square of the change of all entries of an input, for a change of random signs.
        """
        rng = np.random.default_rng(11)
        count, before = len(self.outputs), self.recurrence(self.outputs)[1]
        kernel = np.zeros((*before.shape[1:3], count, count))
        for source in range(count):
            total = np.zeros((*before.shape[1:3], count))
            for view in range(self.outputs.shape[3]):
                # One view at a time, so that views are uncorrelated; the squares add.
                moved = self.outputs.copy()
                moved[source, :, :, view] += rng.choice([-1.0, 1.0], moved.shape[-1])
                change = self.recurrence(moved)[1] - before
                total += np.moveaxis((change**2).mean(axis=(3, 4)), 0, -1)
            kernel[..., source] = np.sqrt(total)
        return kernel.mean(axis=(0, 1)), kernel


SIZES = (2, 3, 6)  # sequences, tokens, features


def _outputs(rng: np.random.Generator, count: int, views: int = 1) -> np.ndarray:
    sequences, tokens, features = SIZES
    return rng.standard_normal((count, sequences, tokens, views, features))


def plain(kind: str = "", count: int = 5, seed: int = 0) -> LinearModel:
    """X' = a X + b F: unscaled, ``"scaled"`` by a number a token, ``"gated"`` by one a feature, or in ``"parallel"`` pairs."""
    rng = np.random.default_rng(seed)
    outputs, variables, coords = _outputs(rng, count), {}, {}
    keep = write = np.ones((count, *SIZES[:2], 1))
    if kind == "scaled":
        keep, write = (rng.uniform(0.5, 1.5, keep.shape) for _ in range(2))
        variables = {"residual_scale": keep[..., 0], "branch_scale": write[..., 0]}
    if kind == "gated":
        keep, write = (rng.uniform(0.5, 1.5, (count, *SIZES)) for _ in range(2))
        variables = {"residual_gate": keep, "branch_gate": write}
    depth_in = [c // 2 for c in range(count)] if kind == "parallel" else list(range(count))
    if kind == "parallel":
        coords = {"depth_in": depth_in, "depth_out": [depth + 1 for depth in depth_in]}
    embedding = rng.standard_normal((*SIZES[:2], SIZES[2]))

    def recurrence(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states, inputs = [embedding], []
        for c in range(count):
            if depth_in[c] == len(states) - 1:  # the first branch of a state
                states.append(keep[c] * states[-1])
            inputs.append(states[depth_in[c]])
            states[-1] = states[-1] + write[c] * given[c, :, :, 0]
        return np.stack(states)[:, :, :, None], np.stack(inputs)[:, :, :, None]

    return LinearModel(f"plain {kind}".strip(), "residual", variables, outputs, recurrence, coords)


def streams(kind: str = "", count: int = 5, n: int = 3, seed: int = 0) -> LinearModel:
    """X' = H_res X + H_post F(H_pre X): ``"views"`` has two inputs and one output."""
    rng = np.random.default_rng(seed)
    views = 2 if kind == "views" else 1
    outputs = _outputs(rng, count)
    lead = (count, *SIZES[:2])
    mix = doubly_stochastic(rng, (*lead, n, n), 0.5) if n > 1 else np.ones((*lead, 1, 1))
    reads, writes = rng.uniform(0.2, 1.0, (*lead, views, n)), rng.uniform(0.2, 1.0, (*lead, n))
    if n == 1:
        reads, writes = np.ones_like(reads), np.ones_like(writes)
    variables = {"h_res": mix, "h_pre": reads[..., 0, :], "h_post": writes}
    if kind == "views":
        variables = {"h_res": mix, "read": reads, "write": writes[..., None]}
    embedding = rng.standard_normal((*SIZES[:2], 1, SIZES[2])) * np.ones((n, 1))  # copies

    def recurrence(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states, inputs = [embedding], []
        for c in range(count):
            inputs.append(np.einsum("stvn,stnd->stvd", reads[c], states[c]))
            states.append(
                np.einsum("stij,stjd->stid", mix[c], states[-1]) + writes[c][..., None] * given[c, :, :, :1]
            )
        return np.stack(states), np.stack(inputs)

    return LinearModel(f"streams {kind}".strip(), "hc", variables, outputs, recurrence, {}, embedding)


def over_depth(kind: str, count: int = 5, seed: int = 0, *, uniform: bool = False) -> LinearModel:
    """Weights on earlier outputs: ``"attention"`` over the sources a branch reads, ``"dense"`` averages of earlier states."""
    rng = np.random.default_rng(seed)
    outputs = _outputs(rng, count)
    lead = (count, *SIZES[:2], count + 1)
    weights = np.ones(lead) if uniform else rng.uniform(0.1, 1.0, lead)
    weights *= np.arange(count + 1) <= np.arange(count)[:, None, None, None]
    embedding = rng.standard_normal((*SIZES[:2], SIZES[2]))
    if kind == "attention":
        weights = weights / weights.sum(-1, keepdims=True)
    name = "depth_read" if kind == "attention" else "depth_carry"

    def recurrence(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, states, inputs = [embedding], [embedding], []
        for c in range(count):
            mean = sum(weights[c, ..., j, None] * source for j, source in enumerate(sources))
            inputs.append(mean if kind == "attention" else states[-1])
            sources.append(given[c, :, :, 0])
            states.append(mean + given[c, :, :, 0])
        return np.stack(states)[:, :, :, None], np.stack(inputs)[:, :, :, None]

    return LinearModel(f"depth {kind}", "depth_attention", {name: weights}, outputs, recurrence)


MODELS: dict[str, LinearModel] = {
    "plain": plain(),
    "scaled": plain("scaled"),
    "gated": plain("gated"),
    "parallel": plain("parallel", count=6),
    "streams": streams(),
    "one stream": streams(n=1),
    "views": streams("views"),
    "attention over depth": over_depth("attention"),
    "averages of depths": over_depth("dense"),
}
"""One model of every kind of connection, by what it is called."""
