"""Does what is suspected of a network do harm? The few experiments that the suspicions of a run name, saved in the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Unpack

import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.memory import give_memory_back
from depthscope.diagnostics.verdicts import VERDICTS, Finding, Severity, judged_metrics, suspected
from depthscope.diagnostics.verdicts.age import KNOWS, REPAIR, TASK, Task, age_of
from depthscope.diagnostics.verdicts.rule import CONSEQUENCES, SUSPECTED
from depthscope.probes.interventions.changes import plan
from depthscope.probes.interventions.effects import ablate
from depthscope.probes.interventions.predictions import output_values, sees_later_tokens
from depthscope.probes.model.layout import is_packed
from depthscope.probes.model.loss_graph import Loss
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.one_shot import measure
from depthscope.probes.repairs import FEWEST, Patient, first_size, repaired, row_of
from depthscope.probes.run.attributes import memory_facts
from depthscope.probes.run.build_run import prove
from depthscope.probes.run.connection_remarks import all_remarks
from depthscope.probes.session.coefficient_origins import find_origins
from depthscope.probes.session.forward import own_call
from depthscope.probes.session.kept_bytes import FOREIGN_NORMS, kept_bytes
from depthscope.probes.session.model_call import batches, call_model, copied, graph_of_frozen, with_gradients
from depthscope.probes.session.options import ModelOptions, Options, Scope, takes_options

MOST_FORWARDS = 60
# Part of what predictions claim to know that is wrong, from which on a repair is tried.
SUSPECT = 0.1
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
    """Try what a run leaves open, and keep the results in the run, where `judge` finds them.

    Of a network that is trained and in which something is suspected, repairs are tried: other scales of its parts and of its
    softmaxes, another axis of these, its gains, positions, rotary angles and groups of queries read otherwise, its mixing
    matrices transposed, normalised or left out. What the best of them regains of the loss is the severity, and it names the
    cause. Layers that hold one representation are left out: where that changes nothing, they are of no use. `capture` measures
    and tries nothing; the command ``probe`` does both. The model is not changed.

    Parameters
    ----------
    run : DataTree
        A run of this model.
    model : Module
        The model, as it was measured.
    batch : mapping, tensor, tuple or iterable of these
        As in `capture`: the batch that was measured, or its parts; a forward takes the memory of one part.
    loss : callable, optional
        ``loss(output, batch) -> scalar``, as in `capture`.
    forwards : int
        At most so many forwards to find a repair, none of them with a backward. Where nothing is suspected, one shows whether
        something is odd: a softmax along another axis, a module far from the size of its kind in other blocks. For the
        interval of what is regained, two more of each of 16 sequences.
    **options
        Each option of `Options`.

    Returns
    -------
    DataTree
        The run; what is added is in its attributes and those of its metrics. ``consequences`` has one mapping for each
        suspicion that was tried, or why it could not be; ``repair`` the one that lowers the loss most; ``remarks`` also from
        what the coefficients of connections are computed, whether these learn, which modules get zeros, and whether outputs
        see later tokens (two or three forwards); ``memory``, of a run with gradients, what a forward keeps for its backward,
        as measured.

    Raises
    ------
    InputError
        For a negative number of forwards.
    """
    if forwards < 0:
        raise InputError(f"got forwards={forwards}; expected 0 or more")
    parts = list(batches(batch))
    if not parts:
        raise InputError(
            "no batch was given; expected the one that was measured, or an iterable of its parts"
        )
    added = _examined(run, model, parts[0], options)
    suspicions = _suspicions(run) if forwards else []
    results = [
        _without_steps(chain, finding, model, parts, loss, options)
        for chain, finding in suspicions
        if VERDICTS[finding.verdict].tried
        and (finding.severity > Severity.INFO or finding.settled == SUSPECTED)
    ]
    added |= {CONSEQUENCES: results} if results else {}
    if ahead := _looks_ahead(run, model, parts[0], options):
        added["remarks"] = [*added.get("remarks", run.attrs.get("remarks", ())), *ahead]
    if forwards and (
        best := _repaired(run, Patient(model, parts, loss, forwards, options), is_suspected=bool(suspicions))
    ):
        added[REPAIR] = best
    found: xr.DataTree = run.copy(deep=False)
    for node in (found, *(found["metrics"].subtree if "metrics" in found.children else ())):
        node.attrs = {**node.attrs, **added}
    return found


def _examined(run: xr.DataTree, model: nn.Module, batch: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a run that further forwards of a batch complete: remarks, and the bytes kept for a backward."""
    has_streams, has_gradients = run.attrs.get("n_streams", 1) > 1, _has_gradients(run)
    if not has_streams and not has_gradients:
        return {}
    scope = Scope(only_own=True, sums=False, origins=find_origins if has_streams else None)
    try:
        give_memory_back()  # of what was measured and analysed before
        with graph_of_frozen(model, wanted=has_streams, each=True):
            session = measure(model, batch, Options(**options), scope=scope).session
        give_memory_back()
        with graph_of_frozen(model, wanted=has_gradients):
            kept = kept_bytes(session, with_gradients(batch)) if has_gradients else {}
        give_memory_back()
        sequences, evidence = prove(session)
    except Exception:  # a model may do anything when it runs again, and what was measured is not lost for it
        return {}
    remarks = all_remarks(session, evidence, [of.index for of in sequences], kept.pop(FOREIGN_NORMS, []))
    trace = next(node.to_dataset() for node in run["trace"].subtree if node.data_vars)
    memory = memory_facts(trace, session.observer.dtype, kept)
    return {**({"remarks": remarks} if remarks else {}), **({"memory": memory} if memory else {})}


def _has_gradients(run: xr.DataTree) -> bool:
    return "trace" in run.children and any("gradient" in node for node in run["trace"].subtree)


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
    part = batch if batch_axis else row_of(batch, _longest(batch), first_size(batch))
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


def _repaired(run: xr.DataTree, patient: Patient, *, is_suspected: bool) -> dict[str, Any]:
    """The best repair of a network that has something to lose.

    Something is suspected too where the loss is near that of a constant answer, or not what the predictions expect.
    """
    attrs = {str(name): value for name, value in run.attrs.items()}
    task = Task.of(attrs)
    reach = task.to_lose
    if reach is None or _batch_axis(patient.options) or sum(map(first_size, patient.parts)) < FEWEST:
        return {}
    is_suspected |= task.is_unsure or task.wrong_part > SUSPECT or (task.share_of_constant or 0.0) > KNOWS
    traces = (
        [node.attrs for node in run["trace"].subtree if node.data_vars] if "trace" in run.children else []
    )
    if traces and all("untouched" in of for of in traces):
        attrs["untouched"] = 1
    # As it was drawn no network is at a minimum.
    counted = run["statistics"].coords.get("step") if "statistics" in run.children else None
    last = {} if counted is None or not counted.size else {"step": counted.values.flat[-1]}
    if age_of(xr.Dataset(coords=last, attrs=attrs)).trained is False:
        return {}
    try:
        return repaired(patient, reach, streams=attrs.get("n_streams", 1) > 1, is_suspected=is_suspected)
    except Exception:  # a model may do anything when it runs again, and what was measured is not lost for it
        return {}


def _longest(batch: Any) -> int:
    """The sequence with the most real tokens: of padding nothing depends on the last one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return int(mask.sum(-1).argmax()) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else 0


def _output_again(model: nn.Module, batch: Any, batch_axis: int) -> torch.Tensor:
    """The main output of the unchanged model, which a recorder that is on does not count."""
    with preserved_state(model), torch.no_grad(), own_call(object()):
        return output_values(call_model(model, copied(batch)), batch_axis=batch_axis)


def _suspicions(run: xr.DataTree) -> list[tuple[str, Finding]]:
    """What is suspected of each chain."""
    stored = {chain: schema.chain_dataset(run, "metrics", chain) for chain in schema.chains(run)}
    known = {chain: of for chain, of in stored.items() if of is not None and of.attrs.get(schema.COMPLETE)}
    if len(known) < len(stored):
        if "trace" not in run.children:
            return []
        part = run.copy(deep=False)
        for node in part["trace"].subtree:
            sizes = {"sample": slice(SEQUENCES), "token": slice(TOKENS)}
            node.dataset = node.to_dataset(inherit=False).isel(sizes, missing_dims="ignore")
        known = schema.by_chain(analyze(part, metrics=judged_metrics()))
    return [(chain, finding) for chain, each in known.items() for finding in suspected(each)]


def _without_steps(
    chain: str,
    finding: Finding,
    model: nn.Module,
    parts: list[Any],
    loss: Loss | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the network loses without the steps that a finding says do nothing."""
    first, last = finding.first + 1, finding.last  # a state of a range that is one has no step before it
    place = {
        "verdict": finding.verdict,
        "chain": chain,
        "first": finding.first,
        "last": last,
        "depths": [first, last],
    }
    try:
        steps = plan("bypass", depths=list(range(first, last + 1)))
        result = ablate(model, parts, steps, loss=_by_sequence(loss), chain=chain or None, **options)
    except Exception as error:  # as above
        return {**place, "why": str(error)}
    row = result.isel(experiment=0)
    known = {
        "loss": float(result["base_loss"].mean("token").mean("sample")),
        "loss_change": float(row["loss_change"]),
        "half_width": float(row["loss_change_high"] - row["loss_change_low"]) / 2,
        "output_change": float(row["output_change"]),
    }
    return place | {name: value for name, value in known.items() if math.isfinite(value)}


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
                [
                    loss(row_of(output, n, count), row_of(batch, n, count)).detach().float()
                    for n in range(count)
                ]
            )
        except Exception:  # the user's function may do anything with a part of a batch
            return value
        same = torch.isclose(each.mean(), value, rtol=1e-3, atol=1e-6)
        return each if bool(same) and each.ndim == 1 else value

    return of_each
