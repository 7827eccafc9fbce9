"""What came of the cells of a patch? Changes with their intervals, and the effect where its denominator is clear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.experiments import CELLS, PATCHES, declared, estimate, estimated, share_of
from depthscope.probes.interventions.effects import texts_of
from depthscope.probes.interventions.model_under_test import ModelUnderTest
from depthscope.probes.interventions.other_paths import other_paths
from depthscope.probes.interventions.patch_measure import MEASURES, Measure

Cell: TypeAlias = tuple[str, int, int, int]
"""Site, depth, token, stream."""


@dataclass
class Outcome:
    """What the batches showed so far."""

    clean: list[torch.Tensor] = field(default_factory=list)
    corrupted: list[torch.Tensor] = field(default_factory=list)
    patched: list[Mapping[Cell, torch.Tensor]] = field(default_factory=list)
    layers: dict[int, int] = field(default_factory=dict)
    connections: dict[int, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    num_sequences: int = 0

    def add(
        self,
        clean: torch.Tensor,
        corrupted: torch.Tensor,
        patched: Mapping[Cell, torch.Tensor],
        measure: Measure,
        model: ModelUnderTest,
    ) -> None:
        """Add the sequences of one batch."""
        if not self.attrs:
            self.attrs = {
                "measure": measure.name,
                "num_streams": model.num_streams,
                "proof": model.proof,
                "other_paths": other_paths(model),
                "no_loss": measure.why,
            }
        self.num_sequences += model.base.states[0].shape[0]
        self.clean.append(clean)
        self.corrupted.append(corrupted)
        self.patched.append(patched)


def patch_result(outcome: Outcome, name: str, token_text: Any) -> xr.Dataset:
    """The Dataset that `patch` returns."""
    cells = {cell for of in outcome.patched for cell in of}
    # Sites as they were asked for.
    sites = list(dict.fromkeys(cell[0] for of in outcome.patched for cell in of))
    depths, tokens, streams = (sorted({int(cell[axis]) for cell in cells}) for axis in (1, 2, 3))
    clean, corrupted = (torch.cat(of).numpy() for of in (outcome.clean, outcome.corrupted))
    patched = np.full((len(sites), len(depths), len(tokens), len(streams), len(clean)), np.nan)
    begin = 0
    for of, base in zip(outcome.patched, outcome.clean, strict=True):
        for (site, depth, token, stream), values in of.items():
            at = sites.index(site), depths.index(depth), tokens.index(token), streams.index(stream)
            patched[at][begin : begin + len(base)] = values.numpy()
        begin += len(base)
    effects, why = share_of(
        patched - corrupted, clean - corrupted, np.maximum(np.abs(clean), np.abs(corrupted))
    )
    variables: dict[str, Any] = {
        **{f"effect{ending}": (CELLS, values) for ending, values in effects.items()},
        **estimated("change", CELLS, (patched - corrupted)[..., None]),
        "patched": ((*CELLS, "sample"), patched),
        "clean": (("sample",), clean),
        "corrupted": (("sample",), corrupted),
    }
    coords: dict[str, Any] = {
        "site": np.array(sites, dtype=object),
        **{dim: np.array(of) for dim, of in (("depth", depths), ("token", tokens), ("stream", streams))},
        "layer": ("depth", np.array([outcome.layers[depth] for depth in depths])),
        "connection": ("depth", np.array([outcome.connections.get(depth, -1) for depth in depths])),
    }
    if token_text is not None and tokens[0] >= 0:
        words = texts_of(token_text, (len(clean), tokens[-1] + 1))
        coords["token_text"] = (("sample", "token"), words[:, tokens])
    attrs = {
        "model": name,
        **outcome.attrs,
        "measured": MEASURES[outcome.attrs["measure"]][0],
        "no_effect": why,
        "left_out": [f"{key}: {reason}" for key, reason in outcome.left_out.items()],
        "interval": "95 %, Student's t over sequences",
        "difference": estimate(clean - corrupted)._asdict(),
    }
    found = declared(xr.Dataset(variables, coords, attrs), PATCHES)
    for key in ("change", "change_error", "change_low", "change_high", "patched", "clean", "corrupted"):
        if unit := MEASURES[outcome.attrs["measure"]][1]:
            found[key].attrs["units"] = unit
    return found
