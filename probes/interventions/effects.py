"""What does a change of the forward do to the loss and to the predictions? Experiments, one by one, on the same sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import EFFECTS, declared, estimated
from depthscope.probes.interventions.changes import Change, Plan, changes, plan
from depthscope.probes.interventions.model_under_test import ModelUnderTest, Passed
from depthscope.probes.interventions.predictions import Loss, Pick, divergence, relative_change, user_loss
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.session.model_call import batches
from depthscope.probes.session.options import ModelOptions, Options, takes_options

SCALARS = ("block", "depth", "connection", "stream")


@takes_options(ModelOptions)
def ablate(
    model: nn.Module,
    batch: Any,
    experiments: str | Plan | Iterable[str | Plan],
    *,
    loss: Loss | None = None,
    logits: Pick | None = None,
    chain: str | None = None,
    token_text: Any = None,
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    """Change a forward at one place after another, and measure the effect on the loss and to the predictions.

    A state is changed where it is made, so that everything after it runs on from the changed one by itself. A block that is
    skipped hands on the state before it; where branches read sums over depth, what the block's branches give is zero in every
    sum. Nothing of the model is touched: its weights, buffers, hooks, modes and all random states are as before, whatever
    happens.

    Parameters
    ----------
    model : Module
        The model, run as it is, without gradients.
    batch : mapping, tensor, tuple or iterable of these
        As in `capture`; every experiment sees the same sequences.
    experiments : str or Plan, or several
        Names such as ``"skip"``, for every place of the model, or what `plan` returns.
    loss : callable, optional
        ``loss(output, batch)``: a number for each sequence or token. By default −log p(next token), where the batch has ids
        and the output is proven to predict them one ahead.
    logits : callable, optional
        ``logits(output)``: the tensor to compare, where the output has several.
    chain : str, optional
        Which of several chains is changed.
    token_text : sequence of sequences of str, optional
        Text of the tokens.
    **options
        Each option of `Options`.

    Returns
    -------
    Dataset
        ``loss_change`` and ``kl`` in nats and ``output_change`` as a share, by experiment, each with ``_error`` (standard
        error over sequences), ``_low`` and ``_high`` (95 %, Student's t); ``token_…`` by sequence and token.
        The attribute ``left_out`` has the experiments that could not be made, and other chains; ``no_loss`` why there is no
        loss; ``other_paths`` lists where something leads around a changed state.

    Raises
    ------
    InterventionError
        Where no experiment can be made.
    InputError
        For an unknown kind.

    Examples
    --------
    >>> import depthscope as ds
    >>> ds.interventions.plan("skip", blocks=[2, 3]).kind
    'skip'
    """
    given = [experiments] if isinstance(experiments, (str, Plan)) else list(experiments)
    plans = [each if isinstance(each, Plan) else plan(each) for each in given]
    if not plans:
        raise InputError("no experiment was named; expected one such as 'skip'")
    settings = _Settings(Options(**options), chain, loss, logits)
    rows: list[_BatchRows] = [_run_batch(model, item, plans, settings) for item in batches(batch)]
    if not rows:
        raise InterventionError(
            "no batch was given; expected a mapping, a tensor, a tuple, or several of these"
        )
    return _dataset(rows, type(model).__name__, token_text)


@dataclass(frozen=True)
class _Settings:
    options: Options
    chain: str | None
    loss: Loss | None
    logits: Pick | None


@dataclass
class _Effect:
    """What one change did: (B, T) each, T = 1 where there is one number a sequence."""

    change: Change
    loss: torch.Tensor
    kl: torch.Tensor
    output_change: torch.Tensor


@dataclass
class _BatchRows:
    base_loss: torch.Tensor
    effects: list[_Effect]
    left_out: dict[str, str]
    why: str
    num_streams: int
    proof: str
    around: str


def _run_batch(model: nn.Module, batch: Any, plans: Iterable[Plan], settings: _Settings) -> _BatchRows:
    under_test = ModelUnderTest(model, batch, settings.options, chain=settings.chain)
    measure = _Measure(under_test, settings)
    effects: list[_Effect] = []
    left_out: dict[str, str] = {}
    for each in plans:
        try:
            wanted = changes(each, under_test)
        except InterventionError as error:
            left_out[each.kind] = str(error)
            continue
        for change in wanted:
            try:
                passed = under_test.forward(change.edits)
            except InterventionError as error:
                left_out[change.name] = str(error)
                continue
            effects.append(measure.effect(change, passed))
    if not effects:
        raise InterventionError(next(iter(left_out.values()), "no experiment could be made"))
    others = [of.name for of in under_test.structure.chains if of.name != under_test.chain.name]
    left_out |= {
        name: f"another chain than {under_test.chain.name!r}; chain={name!r} changes it" for name in others
    }
    return _BatchRows(
        measure.base_loss,
        effects,
        left_out,
        measure.why,
        under_test.num_streams,
        under_test.proof,
        under_test.other_paths(),
    )


class _Measure:
    """Compares changed forwards with the unchanged one."""

    def __init__(self, model: ModelUnderTest, settings: _Settings) -> None:
        self._model, self._settings = model, settings
        self._base = model.values(model.base.output, settings.logits)
        self._targets = model.targets(self._base, settings.logits)
        self.why = "" if settings.loss is not None else self._targets.why
        self.base_loss = self._loss(model.base, self._base)

    def _loss(self, passed: Passed, values: torch.Tensor) -> torch.Tensor:
        if self._settings.loss is not None:
            shape = (values.shape[0], values.shape[1])
            return user_loss(self._settings.loss, passed.output, self._model.batch, shape).cpu()
        return self._targets.next_token_loss(values).cpu()

    def effect(self, change: Change, passed: Passed) -> _Effect:
        values = self._model.values(passed.output, self._settings.logits)
        if values.shape != self._base.shape:
            raise InterventionError(
                f"{change.name}: the output has shape {tuple(values.shape)} and had {tuple(self._base.shape)} unchanged"
            )
        missing = torch.full(values.shape[:2], torch.nan)
        kl = divergence(self._base, values).cpu() if self._targets.distribution else missing
        moved = relative_change(self._base, values).cpu()
        if self._targets.mask is not None:
            padding = ~self._targets.mask.cpu()
            kl, moved = kl.masked_fill(padding, torch.nan), moved.masked_fill(padding, torch.nan)
        loss = self._loss(passed, values)
        return _Effect(change, loss, kl, moved)


# --- the result


def _dataset(rows: list[_BatchRows], name: str, token_text: Any) -> xr.Dataset:
    # An experiment counts where every batch allows it: means over other sequences could not be compared.
    names = [effect.change.name for effect in rows[0].effects]
    shared = [each for each in names if all(each in {e.change.name for e in row.effects} for row in rows)]
    by_name = [{effect.change.name: effect for effect in row.effects} for row in rows]
    parts = {
        "base_loss": [[row.base_loss for row in rows]],
        "token_loss": [[found[each].loss for found in by_name] for each in shared],
        "token_kl": [[found[each].kl for found in by_name] for each in shared],
        "token_output_change": [[found[each].output_change for found in by_name] for each in shared],
    }
    batches_of = [each for of in parts.values() for each in of]
    samples = max(sum(map(len, of)) for of in batches_of)
    tokens = max(part.shape[1] for of in batches_of for part in of)
    token = {name: np.stack([_joined(each, (samples, tokens)) for each in of]) for name, of in parts.items()}
    base_loss = token.pop("base_loss")[0]
    variables: dict[str, Any] = {"base_loss": (("sample", "token"), base_loss)}
    variables |= {key: (("experiment", "sample", "token"), values) for key, values in token.items()}
    differences = {
        "loss_change": token["token_loss"] - base_loss,
        "kl": token["token_kl"],
        "output_change": token["token_output_change"],
    }
    for key, values in differences.items():
        variables |= estimated(key, ("experiment",), values)
    of_change = [by_name[0][each].change for each in shared]
    coords = {
        "experiment": np.array(shared, dtype=object),
        "kind": ("experiment", np.array([change.kind for change in of_change], dtype=object)),
        **{each: ("experiment", np.array([getattr(c, each) for c in of_change])) for each in SCALARS},
    }
    if token_text is not None:
        coords["token_text"] = (("sample", "token"), texts_of(token_text, (samples, tokens)))
    left_out = {key: why for row in rows for key, why in row.left_out.items()}
    attrs = {
        "model": name,
        "num_streams": rows[0].num_streams,
        "proof": rows[0].proof,
        "other_paths": rows[0].around,
        "no_loss": rows[0].why,
        "left_out": [f"{key}: {why}" for key, why in left_out.items()],
        "interval": "95 %, Student's t over sequences",
    }
    return declared(xr.Dataset(variables, coords, attrs), EFFECTS)


def _joined(parts: list[torch.Tensor], shape: tuple[int, int]) -> np.ndarray:
    """The sequences of several batches; NaN where there is no token."""
    found = np.full(shape, np.nan)
    first = 0
    for part in parts:
        found[first : first + len(part), : part.shape[1]] = part.double().numpy()
        first += len(part)
    return found


def texts_of(given: Any, shape: tuple[int, int]) -> np.ndarray:
    """Texts of the tokens of some sequences, empty where there is none."""
    texts = np.full(shape, "", dtype=object)
    for row, words in enumerate(given):
        for position, word in enumerate(list(words)[: shape[1]]):
            if row < shape[0]:
                texts[row, position] = str(word)
    return texts
