"""Does what is suspected of a network do harm? The few experiments that the suspicions of a run name, saved in the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics import analyze
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import HARMFUL, SETTLED_BY
from depthscope.diagnostics.metrics.catalogue import CATALOGUE
from depthscope.diagnostics.verdicts import VERDICTS, Finding, suspected
from depthscope.diagnostics.verdicts.age import RESCALED, TASK, age_of, number_or_none
from depthscope.diagnostics.verdicts.causes import depths_of, worst_depth
from depthscope.diagnostics.verdicts.consequences import CONSEQUENCES
from depthscope.diagnostics.verdicts.off_minimum import SLOPES, to_lose
from depthscope.probes.interventions.effects import ablate
from depthscope.probes.interventions.plans import Plan, plan
from depthscope.probes.interventions.predictions import output_values, sees_later_tokens
from depthscope.probes.model.layout import is_packed
from depthscope.probes.model.loss_graph import Loss
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.model.while_needed import eager
from depthscope.probes.rescaling import FEWEST, STEPS, first_size, promises, rescaled
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.model_call import call_model, copied
from depthscope.probes.session.options import ModelOptions, takes_options

MOST_FORWARDS = 10
# Forwards before the first experiment: to read the model, to find where its states are made, to see that it repeats itself,
# whether its output predicts the next token, and whether anything leads around a changed state.
FIRST_FORWARDS = 5
OF_CAUSALITY = (
    3  # forwards of one sequence that show whether the outputs depend on later tokens, and on earlier ones
)
# Of the sample, to see what is suspected: four sequences and the first tokens of each show it.
SEQUENCES, TOKENS = 4, 128


@takes_options(ModelOptions)
def settle(
    run: xr.DataTree,
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    forwards: int = MOST_FORWARDS,
    **options: Unpack[ModelOptions],
) -> xr.DataTree:
    """Try what the suspicions of a run name, and keep the results in the run, where `judge` finds them.

    What a verdict suspects is loud where an experiment shows its consequence: what the loss (or the output, without labels)
    loses when steps are left out, or when states are replaced by what a collapse would leave of them. `capture` does this by
    itself; a run of `record` is settled with the model and a batch afterwards. The model is not changed.

    Parameters
    ----------
    run : DataTree
        A run of this model.
    model : Module
        The model, as it was measured.
    batch : mapping, tensor or tuple
        One batch.
    loss : callable, optional
        ``loss(output, batch) -> scalar``, as in `capture`.
    forwards : int
        At most so many forwards; where nothing is suspected none is made but two of one sequence, where the loss is that of
        the next token: whether outputs depend on later ones. Where the loss would fall with other scales of what the modules
        give, as many more with their backward at most.
    **options
        Each option of `Options`.

    Returns
    -------
    DataTree
        The run; its attribute ``consequences`` has one mapping for each suspicion that was tried, or why it could not be.

    Raises
    ------
    InputError
        For a negative number of forwards.
    """
    if forwards < 0:
        raise InputError(f"got forwards={forwards}; expected 0 or more")
    places = _places(run) if forwards > FIRST_FORWARDS else []
    results: list[dict[str, Any]] = []
    for chain in dict.fromkeys(chain for chain, _, _ in places):
        of_chain = [(finding, analysis) for name, finding, analysis in places if name == chain]
        results += _settled(chain, of_chain, model, batch, loss, forwards - FIRST_FORWARDS, options)
    ahead = _looks_ahead(run, model, batch, options) if forwards >= OF_CAUSALITY else []
    scales = _rescaled(run, model, batch, loss, forwards, options)
    if not results and not ahead and not scales:
        return run
    found: xr.DataTree = run.copy(deep=False)
    found.attrs = {**run.attrs, **({CONSEQUENCES: results} if results else {})}
    found.attrs |= {RESCALED: scales} if scales else {}
    if ahead:
        found.attrs["remarks"] = [*run.attrs.get("remarks", ()), *ahead]
    return found


def _looks_ahead(
    run: xr.DataTree, model: nn.Module, batch: Any, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A remark where the outputs of a network that is trained on the next token depend on later ones, or are given it.

    Forwards of one sequence tell: with another last token no earlier output may move. They are made of every such network,
    since no gradient shows a leak before the first state, nor any where the last token has a target. Where the targets are
    the inputs themselves, a network whose outputs see nothing later was meant to predict, and is given the answer.
    """
    task = run.attrs.get(TASK)
    ahead, repeats = (
        isinstance(task, Mapping) and task.get(name) for name in ("predicts_next", "repeats_input")
    )
    if not (ahead or repeats):
        return []
    batch_axis = _batch_axis(options)
    part = batch if batch_axis else _row(batch, _longest(batch), first_size(batch))
    try:
        again = partial(_output_again, model, batch_axis=batch_axis)
        sees = sees_later_tokens(part, again, must_see_earlier=not ahead)
    except Exception:  # a model may do anything when it runs again, and what was measured is not lost for it
        return []
    if sees is None or sees == (not ahead):
        return []
    sentence = "The loss is that of the next token, and the outputs depend on later tokens: with another last one they move"
    if not ahead:
        sentence = "The loss asks every output for the very token that it is given: the targets are not shifted by one"
    return [{"kind": "looks_ahead", "sentence": sentence, "value": 1.0, "connections": [], "sure": True}]


def _batch_axis(options: Mapping[str, Any]) -> int:
    layout = str(options.get("layout") or "")
    return 1 if layout.replace(" ", "").startswith("TB") or (layout and is_packed(layout)) else 0


def _rescaled(
    run: xr.DataTree,
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    forwards: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the loss would be with other scales of what the modules give, of a network that has something to lose."""
    attrs = {str(name): value for name, value in run.attrs.items()}
    reach = to_lose(attrs)
    if reach is None or _batch_axis(options):
        return {}
    slopes, sequences = attrs.get(SLOPES), first_size(batch)
    traces = (
        [node.attrs for node in run["trace"].subtree if node.data_vars] if "trace" in run.children else []
    )
    if traces and all("untouched" in of for of in traces):
        attrs["untouched"] = 1
    # As it was drawn no network is at a minimum.
    counted = run["statistics"].coords.get("step") if "statistics" in run.children else None
    last = {} if counted is None or not counted.size else {"step": counted.values.flat[-1]}
    if age_of(xr.Dataset(coords=last, attrs=attrs)).trained is False or sequences < FEWEST:
        return {}
    known = {n: v for n, v in slopes.items() if number_or_none(v)} if isinstance(slopes, Mapping) else None
    if known is not None and not promises(known, reach):
        return {}
    try:
        steps = min(STEPS, forwards)
        return rescaled(model, batch, loss, reach=reach, sequences=sequences, steps=steps)
    except Exception:  # a model may do anything when it runs again, and what was measured is not lost for it
        return {}


def _longest(batch: Any) -> int:
    """The sequence with the most real tokens: of padding nothing depends on the last one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return int(mask.sum(-1).argmax()) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else 0


def _output_again(model: nn.Module, batch: Any, batch_axis: int) -> torch.Tensor:
    """The main output of the unchanged model, which a recorder that is on does not count."""
    with preserved_state(model), eager(), torch.no_grad(), own_call(object()):
        return output_values(call_model(model, copied(batch)), batch_axis=batch_axis)


@cache
def _judged_metrics() -> tuple[str, ...]:
    """The metrics that suspicions are read off."""
    taken = {
        name
        for verdict in VERDICTS.values()
        if verdict.suspicion
        for name in (*verdict.needs, *verdict.wants)
    }
    return tuple(
        name for name, metric in CATALOGUE.items() if metric.default and taken & {name, f"{name}_null"}
    )


def _places(run: xr.DataTree) -> list[tuple[str, Finding, xr.Dataset]]:
    """What is suspected, by chain, with the analysis that it is read off."""
    if "trace" not in run.children:
        return []
    part = run.copy(deep=False)
    for node in part["trace"].subtree:
        sizes = {"sample": slice(SEQUENCES), "token": slice(TOKENS)}
        node.dataset = node.to_dataset(inherit=False).isel(sizes, missing_dims="ignore")
    analysis = analyze(part, metrics=_judged_metrics())
    chains = (
        {"": analysis}
        if isinstance(analysis, xr.Dataset)
        else {name: node.to_dataset() for name, node in analysis.children.items()}
    )
    return [(chain, finding, each) for chain, each in chains.items() for finding in suspected(each)]


def _settled(
    chain: str,
    places: list[tuple[Finding, xr.Dataset]],
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    most: int,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The results of the experiments on one chain, those of the worst suspicions first."""
    wanted: dict[Plan, list[tuple[Finding, dict[str, Any]]]] = {}
    for finding, analysis in places:
        each, depths = _plan_of(finding, analysis)
        if each in wanted or len(wanted) < most:
            wanted.setdefault(each, []).append((finding, _place(finding, chain, depths)))
    try:
        result = ablate(model, batch, list(wanted), loss=_by_sequence(loss), chain=chain or None, **options)
    except (
        Exception
    ) as error:  # a model may do anything when it runs again, and what was measured is not lost for it
        return [{**place, "why": str(error)} for found in wanted.values() for _, place in found]
    rows = {
        (str(kind), int(depth)): number
        for number, (kind, depth) in enumerate(
            zip(result["kind"].values, result["depth"].values, strict=True)
        )
    }
    results = []
    for each in wanted:
        number = rows.get((each.kind, each.depths[-1] if each.depths else _first_depth(result, each.kind)))
        why = next(
            (words for words in result.attrs["left_out"] if words.startswith(each.kind)),
            "it could not be made",
        )
        for _, place in wanted[each]:
            results.append({**place, "why": why} if number is None else {**place, **_effect(result, number)})
    return results


def _first_depth(result: xr.Dataset, kind: str) -> int:
    return next(
        (int(d) for k, d in zip(result["kind"].values, result["depth"].values, strict=True) if k == kind), -1
    )


def _place(finding: Finding, chain: str, depths: tuple[int, int]) -> dict[str, Any]:
    return {
        "verdict": finding.verdict,
        "chain": chain,
        "stream": finding.stream,
        "first": finding.first,
        "last": finding.last,
        "kind": SETTLED_BY[finding.verdict],
        "claim": "harmful" if finding.verdict in HARMFUL else "of no use",
        "depths": list(depths),
    }


def _plan_of(finding: Finding, analysis: xr.Dataset) -> tuple[Plan, tuple[int, int]]:
    """The experiment that settles a suspicion, and the first and last depth that it changes."""
    kind = SETTLED_BY[finding.verdict]
    if kind == "identity":
        return plan(kind, together=True), (0, analysis.sizes.get("depth", 1) - 1)
    if kind in ("bypass", "without_attention"):
        first, last = _steps(finding, analysis)
        steps = list(range(first, last + 1))
        if kind == "without_attention":  # between the halves of blocks there is none
            steps = [depth for depth in steps if not math.isnan(finding.profile[depth])]
        return plan(kind, depths=steps), (first, last)
    at = finding.first if kind == "merge_streams" else worst_depth(finding, analysis)
    at = depths_of(finding, analysis)[0] if at is None else at
    return plan(kind, depths=at), (at, at)


def _steps(finding: Finding, analysis: xr.Dataset) -> tuple[int, int]:
    """The steps that do nothing, in a row: those about the worst one. A state of a range that is one has no step before it."""
    if finding.verdict == "same_representation":
        return finding.first + 1, finding.last
    profile = np.asarray(finding.profile)
    beyond = profile > finding.threshold if finding.above else profile < finding.threshold
    first = last = finding.worst
    # Positions without a number, as between the halves of blocks, are no step that does something.
    while first > finding.first and (beyond[first - 1] or math.isnan(profile[first - 1])):
        first -= 1
    while last < finding.last and (beyond[last + 1] or math.isnan(profile[last + 1])):
        last += 1
    if finding.axis == "connection":
        written = analysis["depth_out"].values if "depth_out" in analysis.coords else None
        return (first + 1, last + 1) if written is None else (int(written[first]), int(written[last]))
    return first, last


def _by_sequence(loss: Loss | None) -> Loss | None:
    """The user's loss of each sequence, where it can be asked of one alone, so that its mean has an interval."""
    if loss is None:
        return None

    def of_each(output: Any, batch: Any) -> torch.Tensor:
        value = loss(output, batch).detach().float()
        count = len(output) if isinstance(output, torch.Tensor) and output.ndim else 0
        if value.ndim or count < 2:
            return value
        try:
            each = torch.stack(
                [loss(_row(output, n, count), _row(batch, n, count)).detach().float() for n in range(count)]
            )
        except Exception:  # the user's function may do anything with a part of a batch
            return value
        same = torch.isclose(each.mean(), value, rtol=1e-3, atol=1e-6)
        return each if bool(same) and each.ndim == 1 else value

    return of_each


def _row(value: Any, number: int, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[number : number + 1] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: _row(item, number, count) for name, item in value.items()}
    return type(value)(_row(item, number, count) for item in value) if type(value) in (tuple, list) else value


def _effect(result: xr.Dataset, number: int) -> dict[str, Any]:
    """What one experiment showed, as plain numbers; what is not known is left out."""
    row = result.isel(experiment=number)
    low, high = float(row["loss_change_low"]), float(row["loss_change_high"])
    known = {
        "loss": float(result["base_loss"].mean("token").mean("sample")),
        "loss_change": float(row["loss_change"]),
        "half_width": (high - low) / 2,
        "output_change": float(row["output_change"]),
    }
    return {name: value for name, value in known.items() if math.isfinite(value)}
