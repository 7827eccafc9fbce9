"""One call: run a model on a batch, return what its residual streams show, leave the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Unpack

import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.schema import storable_attributes
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.loss_graph import Loss, loss_value, mean_task, read_task
from depthscope.probes.model.modules import require_module
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.run.attributes import stage_attribute
from depthscope.probes.run.build_run import build_run
from depthscope.probes.run.statistics_dataset import StepStatistics
from depthscope.probes.session.forward import Forward, Measured, backward_to, own_call
from depthscope.probes.session.model_call import batches, graph_of_frozen, with_gradients
from depthscope.probes.session.options import CaptureOptions, Options, Scope, takes_options
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums, merge_sums

CAPTURED = Scope(only_own=True)


@takes_options(CaptureOptions)
def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    token_text: Any = None,
    attrs: Mapping[str, Any] | None = None,
    stage: tuple[int, int] | None = None,
    **options: Unpack[CaptureOptions],
) -> xr.DataTree:
    """Capture the residual states of a model, and their gradients, on one batch or on many.

    The model is run as it is (its mode, its precision); its weights, gradients, buffers, random state and hooks are the
    same afterwards.

    Parameters
    ----------
    model : Module
        The model.
    batch : mapping, tensor, tuple or iterable of these
        A mapping is passed as keywords, a tuple as positional arguments, a tensor as the only one. A list, a generator or a
        DataLoader is a sequence of batches.
    loss : callable, optional
        ``loss(output, batch) -> scalar``, for gradients. Without it the output must carry ``.loss``, as transformers' models
        do when the batch has labels.
    token_text : sequence of sequences of str, optional
        Text of the tokens, by the sequence's index over all batches.
    attrs : mapping, optional
        Attributes to add to the run, such as ``{"commit": …}``.
    stage : (int, int), optional
        Where the model is one stage of a pipeline: its number from 0 on, and how many there are. `open_run` of a folder
        with the runs of all stages, ``part-00000.zarr`` and so on, joins them.
    **options
        Each option of `Options`.

    Returns
    -------
    DataTree
        A run: ``/trace`` and ``/statistics`` (one step).

    Raises
    ------
    CaptureError
        Where a state was not seen or there is no loss.
    SiteError
        Where a site is not known, or the model does not have it.
    ChainError, LayoutError, ReconstructionError
        Where the model cannot be read; the message names the override.
    """
    of_stage = {} if stage is None else stage_attribute(stage)
    measured = measure(model, batch, Options(**options), loss=loss)
    row, task = measured.row, mean_task(measured.tasks, measured.row.loss)
    return build_run(
        measured.session,
        row,
        measured.pooled,
        attrs={**({"task": task} if task else {}), **of_stage, **storable_attributes(attrs)},
        token_text=token_text,
    )


class Measurement(NamedTuple):
    """What a session saw of one batch or of several.

    ``row, pooled``: the statistics of all batches.
    ``tasks``: what the loss of each batch is of.
    ``first``: the first batch.
    """

    session: Session
    row: StepStatistics
    pooled: list[TokenSums]
    tasks: list[dict[str, Any]]
    first: Any


def measure(
    model: nn.Module, batch: Any, options: Options, *, loss: Loss | None = None, scope: Scope = CAPTURED
) -> Measurement:
    """Run a model on each batch, once, and see what `capture` sees; the model is as before afterwards."""
    require_module(model)
    session = Session(model, options, scope=scope)
    # One sum over all batches: the weights are the same in all of them.
    pooled, sequences, first = [TokenSums()], 0, None
    losses: list[float] = []
    tasks: list[dict[str, Any]] = []
    with preserved_state(model), graph_of_frozen(model, wanted=options.gradients):
        for item in batches(batch):
            measured, value, task = _measure_batch(session, item, loss)
            first = item if first is None else first
            sequences += measured.batch_size
            # Without gradients a batch needs no loss, and some batches may carry one all the same.
            losses += [] if value is None else [float(value.detach())]
            tasks.append(task)
            pooled = merge_sums(pooled, measured.sums)
    if first is None:
        raise CaptureError(
            "no batch was given; expected a mapping, a tensor, a tuple, or an iterable with at least one of these"
        )
    mean = sum(losses) / len(losses) if losses else None
    row = StepStatistics(0, [sums.compact() for sums in pooled], sequences, mean)
    return Measurement(session, row, pooled, tasks, first)


def _measure_batch(
    session: Session, batch: Any, loss: Loss | None
) -> tuple[Measured, torch.Tensor | None, dict[str, Any]]:
    """Run one batch, and its backward where gradients are wanted."""
    gradients = session.options.gradients
    batch = with_gradients(batch) if gradients else batch
    with session.on():
        output = session.call(batch)
        session.raise_first_error()
        value = loss_value(output, batch, loss, required=gradients)
        del output  # logits are large, and a backward needs none
        if not session.step.forwards and gradients:
            session.fold()  # gives the reason why nothing was seen
        task = read_task(value, batch)  # before the backward, which frees the graph
        if gradients and value is not None:
            with own_call(session.owner):
                _run_backward(value, session.step.forwards[-1])
            session.raise_first_error()
        (measured,) = session.fold()  # one forward, hence one set of weights
        return measured, value, task


def _run_backward(value: torch.Tensor, forward: Forward) -> None:
    """Run the backward up to the first states: no parameter's ``.grad`` is written, no hook of the user's on it runs."""
    if not torch.is_grad_enabled():
        raise CaptureError(
            "gradients were asked for where PyTorch keeps no graph; call this outside of torch.no_grad() and inference_mode()"
        )
    if not value.requires_grad or not forward.expected_gradients:
        raise CaptureError(
            "the loss does not depend on any residual state that carries a gradient; look for detach() or no_grad() before it"
        )
    backward_to(forward, forward.backward_ends(), [value])
