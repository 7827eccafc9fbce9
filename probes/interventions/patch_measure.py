"""What is measured of an output, to see how much of the clean one came back? One number a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import CELLS, PATCHES, declared, estimate, estimated, share_of
from depthscope.probes.interventions.effects import texts_of
from depthscope.probes.interventions.model_under_test import ModelUnderTest, Passed
from depthscope.probes.interventions.predictions import Pick, divergence, relative_change
from depthscope.probes.model.errors import InterventionError

Answers: TypeAlias = Any
"""A token id, or one for each sequence."""

MEASURES = {
    "logit_difference": ("logit(answer) − logit(against)", "1"),
    "answer_loss": ("−log p(answer)", "nats"),
    "next_token_loss": ("−log p(next clean token)", "nats"),
    "kl": ("KL(clean ‖ patched)", "nats"),
    "output_change": ("‖patched − clean output‖ / ‖clean output‖", "1"),
}
"""Name → what it is, and its unit."""


class Measure:
    """The measure of outputs of one batch.

    ``clean``: the model on the clean batch.
    ``answer, against``: token ids.
    ``pick``: the tensor to compare.
    ``first``: number of the first sequence of the batch among all.
    """

    def __init__(
        self, clean: ModelUnderTest, *, answer: Answers, against: Answers, pick: Pick | None, first: int
    ) -> None:
        if against is not None and answer is None:
            raise InputError("got against= without answer=; expected the right token too")
        self._clean, self._pick = clean, pick
        self._values = clean.values(clean.base.output, pick)
        rows, _, size = self._values.shape
        self._answer, self._against = (
            _ids(name, given, first, rows, size) for name, given in (("answer", answer), ("against", against))
        )
        self._given = {"answer": answer, "against": against}
        self.why = ""  # there is no loss
        self.name = self._choose()

    def _choose(self) -> str:
        if self._answer is not None:
            return "answer_loss" if self._against is None else "logit_difference"
        self._targets = self._clean.targets(self._values, self._pick)
        self.why = self._targets.why
        if self._targets.ids is not None:
            return "next_token_loss"
        return "kl" if self._targets.distribution else "output_change"

    def of(self, passed: Passed) -> torch.Tensor:
        """The measure of one forward, (B,) in float64."""
        values = self._clean.values(passed.output, self._pick)
        if values.shape != self._values.shape:
            raise InterventionError(
                f"the output has shape {tuple(values.shape)}, that of the clean input {tuple(self._values.shape)}; expected "
                "the same"
            )
        if self._answer is not None:
            return self._of_answers(values).double().cpu()
        if self.name == "next_token_loss":
            found = self._targets.next_token_loss(values)
        else:
            found = (divergence if self.name == "kl" else relative_change)(self._values, values)
            if self._targets.mask is not None:
                found = found.masked_fill(~self._targets.mask.to(found.device), torch.nan)
        return found.double().nanmean(1).cpu()

    def _of_answers(self, values: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = values.shape
        mask = self._clean.mask
        last = torch.full((rows,), tokens - 1)
        if mask is not None and mask.shape == values.shape[:2]:
            last = torch.where(mask.cpu(), torch.arange(tokens), -1).amax(1)
        of_last = values[torch.arange(rows), last.to(values.device)]

        def at(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.gather(1, ids.to(scores.device)[:, None]).squeeze(1)

        assert self._answer is not None
        if self._against is None:
            return -at(self._answer, torch.log_softmax(of_last, -1))
        return at(self._answer, of_last) - at(self._against, of_last)

    def require_all_answers_used(self, num_sequences: int) -> None:
        """Refuse more answers than sequences."""
        for name, given in self._given.items():
            count = 1 if given is None else torch.as_tensor(given).numel()
            if count > max(num_sequences, 1):
                raise InputError(
                    f"{name}= has {count} token ids for {num_sequences} sequences; expected one, or one for each"
                )


def _ids(name: str, given: Answers, first: int, rows: int, size: int) -> torch.Tensor | None:
    """The answers of some sequences among all."""
    if given is None:
        return None
    ids = torch.as_tensor(given)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim > 1:
        raise InputError(f"{name}= is {given!r}; expected a token id, or one for each sequence")
    ids = ids.expand(rows) if ids.ndim == 0 else ids[first : first + rows]
    if len(ids) != rows:
        raise InputError(
            f"{name}= has too few token ids: sequences {first} … {first + rows - 1} need one each"
        )
    if not bool(((ids >= 0) & (ids < size)).all()):
        raise InputError(
            f"{name}= has ids {int(ids.min())} … {int(ids.max())}; the output has entries 0 … {size - 1}"
        )
    return ids.long().cpu()


Cell: TypeAlias = tuple[int, int, int]
"""Depth, token, stream."""


@dataclass
class Outcome:
    """What the batches showed so far."""

    clean: list[torch.Tensor] = field(default_factory=list)
    corrupted: list[torch.Tensor] = field(default_factory=list)
    patched: list[Mapping[Cell, torch.Tensor]] = field(default_factory=list)
    layers: dict[int, int] = field(default_factory=dict)
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
                "other_paths": model.other_paths(),
                "no_loss": measure.why,
            }
        self.num_sequences += model.base.states[0].shape[0]
        self.clean.append(clean)
        self.corrupted.append(corrupted)
        self.patched.append(patched)


def patch_result(outcome: Outcome, name: str, token_text: Any) -> xr.Dataset:
    """The Dataset that `patch` returns."""
    cells = {cell for of in outcome.patched for cell in of}
    depths, tokens, streams = (sorted({cell[axis] for cell in cells}) for axis in range(3))
    clean, corrupted = (torch.cat(of).numpy() for of in (outcome.clean, outcome.corrupted))
    patched = np.full((len(depths), len(tokens), len(streams), len(clean)), np.nan)
    begin = 0
    for of, base in zip(outcome.patched, outcome.clean, strict=True):
        for (depth, token, stream), values in of.items():
            at = depths.index(depth), tokens.index(token), streams.index(stream)
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
        **{dim: np.array(of) for dim, of in (("depth", depths), ("token", tokens), ("stream", streams))},
        "layer": ("depth", np.array([outcome.layers[depth] for depth in depths])),
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
        found[key].attrs["units"] = MEASURES[outcome.attrs["measure"]][1]
    return found
