"""What does a user ask of a recorder? `record` checks it, and puts the recorder together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema.joining import PART, part_name, parts_of
from depthscope.probes.model.layout import require_whole_sequences
from depthscope.probes.model.modules import require_module
from depthscope.probes.run.attributes import stage_attribute
from depthscope.probes.session.compiled_model import inner_model
from depthscope.probes.session.options import CaptureOptions, Options, Scope, takes_options
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.weight_updates import LossScale, WeightUpdates
from depthscope.probes.training.live_recording import LiveRecording
from depthscope.probes.training.measured_steps import MeasuredSteps
from depthscope.probes.training.recorder import Recorder
from depthscope.probes.training.sinks import Sink

if TYPE_CHECKING:
    from depthscope.probes.training.live.findings import OnFinding
    from depthscope.probes.training.live.live import Live


TOKENS = 128  # sampled of a step for live metrics
REDUCTIONS = ("mean", "sum", "global_mean")


class RecordingCallback:
    """What the callbacks of frameworks have in common; the options are those of `record`."""

    def __init__(self, **options: Any) -> None:
        self._options = {"gradients": True, "metrics": "live", **options}
        self.recorder: Recorder | None = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Finish the store."""
        if self.recorder is not None:
            self.recorder.close()

    def on_exception(self, *given: Any) -> None:
        """Finish the store with the steps that were measured; the step that raised, with the last of the arguments, is not."""
        if self.recorder is not None:
            self.recorder.__exit__(type(given[-1]), given[-1], given[-1].__traceback__)


@takes_options(CaptureOptions)
def record(
    model: nn.Module,
    *,
    every: int = 1,
    start_step: int = 0,
    end_step: int | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    first_step: int | None = None,
    keep_traces: int = 1,
    token_text: Any = None,
    attrs: Mapping[str, Any] | None = None,
    weights: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    loss_reduction: str | None = None,
    metrics: str | Iterable[str] | None = None,
    live_tokens: int = TOKENS,
    optimizer: torch.optim.Optimizer | None = None,
    sinks: Iterable[Sink] = (),
    on_finding: OnFinding | None = None,
    stop_on: str | None = None,
    stage: tuple[int, int] | None = None,
    **options: Unpack[CaptureOptions],
) -> Recorder:
    """Measure a model while the user's own loop runs it.

    Nothing of the user's run changes: hooks return nothing, errors in them are reported by a `ProbeWarning` at the end of the
    step (and stored in ``recorder.errors``), and between measured steps no hook is on.

    A compiled model (``torch.compile``, ``Module.compile``, of all of it or of its blocks) runs compiled in measured steps
    too, with the same dropout masks, losses and weights as without a recorder: before the call the forward runs once more,
    uncompiled, on copies of the same arguments, and with gradients the backward as well. Random states, buffers and
    attributes of modules are restored, while what the forward or a hook of the user's does elsewhere (a print, a counter)
    happens twice.

    Of several processes (``torch.distributed``) each measures and writes alone, and nothing is exchanged: `store` is then a
    folder that all of them share, in which each has a part, ``part-00000`` and so on. `open_run` of the folder joins them:
    data-parallel and sharded (`fully_shard`) parts to the sums of all data, processes that saw the same data (tensor
    parallelism) once, stages of a pipeline along depth. Sequence and context parallelism are refused.

    A forward under ``no_grad`` or ``inference_mode``, such as a validation, counts to no step that measures gradients.

    Parameters
    ----------
    model : Module
        The model that the loop calls, compiled or not.
    every, start_step, end_step : int
        Which steps are measured.
    store : path-like, optional
        Where the run is written while the loop runs: a folder where the name has no ending. The numbers of every measured step
        are there when `step` returns, whatever happens to the process afterwards; the raw sequences and pooled sums are
        saved as often as it takes 1 % of the time. A name that ends in ``.zarr`` or ``.zarr.zip`` is written when
        the block ends, in the place of an earlier run; until then the steps are in a folder ``NAME.live`` next to it.
        `open_run` opens a growing, a killed and a finished folder, whose attribute ``live`` tells which of them.
    resume : bool
        Go on in the folder of an earlier attempt; where there is none, begin one. The rows of the earlier attempt from
        `first_step` on are superseded when the first new row comes, and the attribute ``resumed_at`` has that step.
    force : bool
        Begin anew where a folder has a run already, whose rows are lost; without `resume` or `force` it is refused.
    first_step : int, optional
        The number of the block's first step: of a resumed loop that of its checkpoint, by default the one after the last row
        of the store; 0 without `resume`.
    keep_traces : int
        How many of the saved states with raw sequences stay in a folder; each is a run of one step in ``states``.
    token_text, attrs
        As in `probes.capture`.
    weights : bool
        Measure, for every module that owns parameters, the squared norms of its weights at `step`, of their gradient, and of
        their change since the step before (or the start of the block): one step of the optimizer, whether ``optimizer.step()``
        comes before or after ``recorder.step()``; NaN where the optimizer did not run in between. The gradient is the one that
        the last backward left in ``.grad``, accumulated and not yet clipped; under data parallelism that of this process. A
        second copy of the trainable weights is in memory while a step is measured, and none between.
    scaler : GradScaler, optional
        The scaler that multiplies the loss; gradients are divided by its scale, which is stored with them. Whether
        ``scaler.unscale_(optimizer)`` is called does not matter. A step whose gradients overflow is reported, and they are
        NaN in its row. Without the scaler a scaled loss looks like any other: its gradients are stored as they come.
    loss_reduction : {"mean", "sum", "global_mean"}, optional
        How the loss is reduced over tokens; stored as an attribute that analyses of gradients need. Unknown where not given.
        Of several processes each has a loss of its own: the mean over its own tokens (assumed where not given), the sum, or
        ``"global_mean"``, its part of the mean over the tokens of all, times the number of processes, as transformers'
        Trainer makes it. Losses and gradients are those of one process with all the data: weighted by n_r/N, 1 or 1/R.
    metrics : str or iterable of str, optional
        Compute metrics at the end of each measured step, which become the ``/metrics`` of the run, by step: ``"live"``, the
        set that costs a few percent of a step; ``"all"`` default metrics; or names of the catalogue. Norms, cosines, gains,
        shares, massive activations and gradients are exact over every token, ranks, CKA, angles and what is left of products
        are of the sampled tokens; see the attribute ``estimator`` of each. ``"live"`` has the ranks in the mean over
        streams alone, the others those of each stream too. One complete sequence is then stored raw, unless ``max_sequences``
        asks for more.
    live_tokens : int
        Number of tokens of a step that are sampled for these, drawn uniformly from its first forward by ``seed``: the same
        positions at every step as long as batches have one shape and mask, which ``same_sampled_tokens`` of each row tells.
    optimizer : Optimizer, optional
        Its learning rate, that of the first group of parameters, is recorded as it is when it makes the step.
    sinks : iterable of callable
        Each is called as ``sink(step, {name: number})`` at the end of a measured step; see `probes.training.sinks`. One that
        raises is reported, and called no more.
    on_finding : callable, optional
        ``on_finding(step, finding)``: called for each finding of a measured step that is new or more severe than before. Those
        that are a warning or worse are also printed to the standard error, once.
    stop_on : {"warn", "fail"}, optional
        End the training at the end of the step in which such a finding is new, by `TrainingStopped` from ``recorder.step()``.
        Refused in several processes: one that stops would leave the others waiting for it.
    stage : (int, int), optional
        As in `probes.capture`: where the model is one stage of a pipeline.
    **options
        Each option of `Options`. Gradients are those that the loop's own backward gives; several forwards and backwards in a
        step add up. Streamed sums count every token since the weights last changed: of a complete evaluation, or in training
        of the last measured step.

    Returns
    -------
    Recorder
        Used as ``with probes.record(model) as recorder:``; its ``run`` is the result.

    Raises
    ------
    InputError
        For a loss reduction or a scaler of another kind.
    CaptureError
        Where each process has a part of every sequence.
    OSError
        Where the run could not be saved under `store`; FileExistsError where something is there that is no run, or a run
        without `resume` or `force`. What happens later (a full disk, a folder that goes) is a `ProbeWarning`, once.
    """
    require_module(model, later=True)
    require_whole_sequences(model)
    part = this_part()
    if part and stop_on is not None:
        raise InputError(
            "got stop_on with several processes, of which one that stops would leave the others waiting for it for ever; let "
            "them agree in your own loop, by on_finding and a collective of yours"
        )
    stages = 1 if stage is None else stage[1]
    shares = WeightShares(model, part[1] // stages) if weights and part is not None else None
    called, model = model, inner_model(model)
    given: dict[str, Any] = {"sinks": list(sinks), "on_finding": on_finding}
    given |= {"stop_on": stop_on, "optimizer": optimizer}
    attrs = schema.storable_attributes(attrs)
    names = _live_names(metrics, live_tokens, given)
    if names:
        options = {"max_sequences": 1, **options}
    if loss_reduction is not None and loss_reduction not in REDUCTIONS:
        raise InputError(
            f"loss_reduction is {loss_reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}"
        )
    scale = LossScale(scaler)
    # Refused now and not when the block ends: a path where no run can be saved, or where something else is.
    recording = None
    if store is not None:
        place = Path(store) if part is None else place_of_part(store, part)
        if part is not None and resume and first_step is None:
            common = last_common_step(Path(store))  # one process may have been stopped a step before another
            first_step = 0 if common is None else common + 1
        recording = LiveRecording(place, resume=resume, force=force, keep_states=keep_traces)
    if first_step is None:
        first_step = 0 if recording is None or recording.last_step is None else recording.last_step + 1
    reduced = {} if loss_reduction is None else {"loss_reduction": loss_reduction.removeprefix("global_")}
    all_attrs = reduced | ({} if stage is None else stage_attribute(stage)) | attrs
    if part is not None:
        all_attrs = {PART: {"number": part[0], "of": part[1], "loss": loss_reduction or ""}, **all_attrs}
    is_part = part is not None
    scope = Scope(live_tokens=live_tokens if names else 0, exact_sums=is_part, digests=is_part)
    session = Session(model, Options(**options), scale if scaler is not None else None, scope, called)
    session.step.keeps_rest &= part is None  # all parts of a run have the same statistics
    measured = MeasuredSteps(
        session,
        earlier_losses=[] if recording is None else recording.earlier_losses(first_step),
        attrs=all_attrs,
        token_text=token_text,
        weights=WeightUpdates(model, scale, shares) if weights else None,
        scale=scale,
        live=_live(session, names, "" if recording is None else recording.path.name, given),
    )
    return Recorder(measured, every, start_step, end_step, first_step, recording)


def _live_names(
    metrics: str | Iterable[str] | None, live_tokens: int, given: Mapping[str, Any]
) -> tuple[str, ...]:
    """The metrics of every measured step; empty where none are wanted."""
    if metrics is None:
        unused = [name for name, value in given.items() if value]
        if unused:
            raise InputError(
                f"got {', '.join(unused)} without metrics; add metrics='live', whose rows and findings they are about"
            )
        return ()
    if live_tokens < 4:  # below, no debiased CKA exists
        raise InputError(f"live_tokens is {live_tokens}; expected 4 or more")
    # Metrics and verdicts are imported where they are asked for, and by no other recording.
    from depthscope.probes.training.live.live import live_names

    return live_names(metrics)


def _live(session: Session, names: tuple[str, ...], name: str, given: Mapping[str, Any]) -> Live | None:
    if not names:
        return None
    from depthscope.probes.training.live.live import Live

    return Live(session, names, name=name, **given)


# --- several processes: each measures and writes alone, and nothing is exchanged, see `diagnostics.schema.joining` ---


def this_part() -> tuple[int, int] | None:
    """The number of this process, and of how many; None where it is alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    number, of = distributed.get_rank(), distributed.get_world_size()
    return (number, of) if of > 1 else None


def place_of_part(store: str | Path, part: tuple[int, int]) -> Path:
    """Where a process writes its part: in a folder of all of them."""
    if str(store).endswith(schema.SUFFIXES):
        raise InputError(
            f"store is {str(store)!r} and {part[1]} processes run, each of which writes a part of the run; expected the name "
            "of a folder, without an ending, that all of them share"
        )
    return Path(store) / part_name(part[0])


def last_common_step(folder: Path) -> int | None:
    """The last step that every part of a run has; None where there are none."""
    histories = [schema.LiveRows(path) for path in parts_of(folder) if schema.is_live_store(path)]
    known = [history.last_step for history in histories if history.last_step is not None]
    return min(known, default=None)


class WeightShares:
    """By which factor the numbers of a parameter, or of its local shard, count: the sum over processes is then the model's."""

    def __init__(self, model: nn.Module, num_processes: int):
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise InputError(
                "got weights=True with FullyShardedDataParallel, which keeps the weights of many modules in one flat vector; "
                "leave it out, or shard the model by fully_shard, whose weights are measured"
            )
        groups = [
            module.process_group
            for module in model.modules()
            if isinstance(module, nn.parallel.DistributedDataParallel)
        ]
        # Such as of one stage of a pipeline, whose other processes have other weights.
        self._copies = torch.distributed.get_world_size(groups[0]) if groups else num_processes

    def __call__(self, parameter: Any) -> float | None:
        """The factor; None for a partial sum, which no process has."""
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            return 1.0 / self._copies
        share = 1.0
        for axis, placement in enumerate(parameter.placements):
            if placement.is_partial():
                return None
            if placement.is_replicate():
                share /= mesh.size(axis)
        return share * mesh.size() / self._copies if mesh.size() < self._copies else share
