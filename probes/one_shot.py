"""One shot: run a model on a batch, keep what its residual streams show, leave the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope.probes.model.arguments import Mask
from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.preserved_state import preserved_state
from depthscope.probes.run.build_run import Row, build_run
from depthscope.probes.session.forward import Forward, Measured
from depthscope.probes.session.session import RewrittenError, Session, Settings
from depthscope.probes.statistics.streaming import Streaming
from depthscope.probes.statistics.token_sums import Sums, merged
from depthscope.probes.structure.sites import select

Loss = Callable[[Any, Any], torch.Tensor]


def capture(
    model: nn.Module,
    batch: Any,
    *,
    gradients: bool = False,
    loss: Loss | None = None,
    layers: str | Iterable[str] | None = None,
    layout: str | None = None,
    streams: int | None = None,
    sites: str | Iterable[str] | None = None,
    mask: Mask = None,
    max_sequences: int = 8,
    seed: int = 0,
    token_text: Any = None,
    attrs: Mapping[str, Any] | None = None,
    streaming: bool | Mapping[str, int] = False,
) -> xr.DataTree:
    """Capture the residual states of a model, and their gradients, on one batch or on many.

    The model is run as it stands (its mode, its precision); its weights, gradients, buffers, random state and hooks are the
    same afterwards.

    Parameters
    ----------
    model : Module
        The model.
    batch : mapping, tensor, tuple or iterable of these
        A mapping is passed as keywords, a tuple as positional arguments, a tensor as the only one. A list, a generator or a
        DataLoader is a sequence of batches.
    gradients : bool
        Also keep ∂loss/∂state at every depth.
    loss : callable, optional
        ``loss(output, batch) -> scalar``. Without it the output must carry ``.loss``, as transformers' models do when the
        batch has labels.
    layers : str or iterable of str, optional
        Module paths of the blocks, a ModuleList's path, or a pattern such as ``"model.layers.{i}"``; found when not given.
    layout : str, optional
        Axes of the state, such as ``"B T D"`` or ``"B T N D"``; found when not given.
    streams : int, optional
        Number of streams, where the layout merges them with another axis, as ``"B T (N D)"`` does.
    sites : str or iterable of str, optional
        What to keep, by the names that people know, such as ``"mid"``, ``"final"``, ``"h_res"`` or
        ``"blocks.3.hook_resid_post"``: see `probes.structure.sites`. By default every state, and every weight of stream
        connections; the insides of plain blocks (``mid``, ``branch_out``) only when asked for.
    mask : Tensor or callable, optional
        (B, T), true on real tokens, or a function from the model's arguments to it. Without it the arguments
        ``attention_mask`` and ``src_key_padding_mask`` are honoured.
    max_sequences : int
        Whole sequences to keep raw, drawn uniformly from all that were seen; the statistics count every token.
    seed : int
        Seed of that draw.
    token_text : sequence of sequences of str, optional
        Text of the tokens, by the sequence's index over all batches.
    attrs : mapping, optional
        Attributes to add to the run, such as ``{"commit": …}``.
    streaming : bool or mapping
        Also keep, over every token of every batch, the spectra of the moments of the mean over streams and of each stream,
        and the similarity of all depths in the mean (metrics ``streamed_…``). It holds L·D² float64 numbers for the
        moments of the mean and of each of several streams, L·(512 + 128)·D for the sketch, at L depths of D features,
        and float32 states of at most 2·D tokens and one forward, which wait to be added; that no number of batches adds
        to. Streams one by one are left out where theirs take more than 32 MiB a depth (N·D² > 4 million); more than 256
        MiB for the mean (D > 5792) is refused. When the run is built four symmetric D×D matrices a depth and view are
        decomposed. Runs of parts of the data can be added: `probes.merge_runs`. True is for every token;
        ``{"every": 4}`` streams one sequence in four, drawn by its number, for a quarter of the cost: the metrics are then
        of these tokens, whose number is ``streamed_count``. ``{"first_sequence": 1000}`` numbers the sequences from there
        on, so that several processes, each on its part of the data, number theirs apart.

    Returns
    -------
    DataTree
        A run: ``/trace`` and ``/statistics`` (one step).

    Raises
    ------
    CaptureError
        Where a place did not fire or no loss can be had.
    SiteError
        Where a site is not known, or the model does not have it.
    ChainError, LayoutError, ReconstructionError
        Where the model cannot be read; the message names the override.
    """
    chosen = settings(gradients, layers, layout, streams, mask, max_sequences, seed, sites, streaming)
    session = Session(model, chosen)
    step, losses = [Sums()], []
    sequences = 0
    with preserved_state(model), _differentiable(model, gradients), eager():
        for item in batches(batch):
            measured, value = _run(session, item, loss)
            sequences += measured.batch_size
            losses.append(value)
            step = merged(step, measured.sums)
    if not sequences:
        raise CaptureError(
            "no batch came: expected a mapping, a tensor, a tuple, or an iterable with at least one of these"
        )
    known = [value for value in losses if value is not None]
    row = Row(0, [sums.compact() for sums in step], sequences, sum(known) / len(known) if known else None)
    return build_run(session, [row], step, attrs=attrs, token_text=token_text)


def settings(
    gradients: bool,
    layers: str | Iterable[str] | None,
    layout: str | None,
    streams: int | None,
    mask: Mask,
    max_sequences: int,
    seed: int,
    sites: str | Iterable[str] | None = None,
    streaming: bool | Mapping[str, int] = False,
) -> Settings:
    """The settings of a session from what a user passes.

    Parameters
    ----------
    gradients, layers, layout, streams, mask, max_sequences, seed, sites, streaming
        As in `capture`.

    Returns
    -------
    Settings
    """
    named = None if layers is None else ((layers,) if isinstance(layers, str) else tuple(layers))
    if named is not None and not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"layers is {layers!r}; expected module paths such as 'model.layers.{{i}}' or ['h.0', 'h.1']"
        )
    chosen = select(sites if sites is None or isinstance(sites, str) else list(sites))
    streamed = _streamed(streaming)
    return Settings(gradients, named, layout, streams, max_sequences, seed, mask, chosen, streaming=streamed)


def _streamed(streaming: bool | Mapping[str, int]) -> Callable[[int], Streaming] | None:
    """What makes the streaming of a forward, from the index of its first sequence."""
    if not isinstance(streaming, Mapping):
        return Streaming if streaming else None
    told = {"every": 1, "first_sequence": 0} | dict(streaming)
    every, first = told.pop("every"), told.pop("first_sequence")
    if told or not all(isinstance(value, int) for value in (every, first)) or every < 1 or first < 0:
        raise ValueError(
            f"streaming is {dict(streaming)}; expected True, or some of every (1 or more) and first_sequence (0 or more)"
        )
    return lambda index: Streaming(first + index, every)


def _run(session: Session, batch: Any, loss: Loss | None) -> tuple[Measured, float | None]:
    gradients = session.settings.gradients
    batch = _listening(batch) if gradients else batch
    session.attach()
    try:
        output = forwarded(session, batch)
        raise_first(session)
        value = _loss_value(output, batch, loss, required=gradients)
        if gradients and value is not None:
            _backward(value, session.forwards[-1])
            raise_first(session)
        (measured,) = session.fold()
        return measured, None if value is None else float(value.detach())
    finally:
        session.detach()


def forwarded(session: Session, batch: Any) -> Any:
    """Run the model under a session, once more where the first forward rewrote a state in place.

    Parameters
    ----------
    session : Session
        With its hooks on.
    batch : object
        One batch.

    Returns
    -------
    object
        The model's output.
    """
    with torch.set_grad_enabled(session.settings.gradients):
        output = call(session.model, batch)
        if any(isinstance(error, RewrittenError) for error in session.errors):
            session.errors.clear()
            output = call(
                session.model, batch
            )  # now the places are known, and states are copied as they pass
        return output


def raise_first(session: Session) -> None:
    """Raise the first error that a hook met.

    Parameters
    ----------
    session : Session
        Whose errors are asked for; the list is emptied.
    """
    errors, session.errors[:] = list(session.errors), []
    if errors:
        raise errors[0]


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping as keywords, a tuple or list as positional arguments.

    Parameters
    ----------
    model : Module
        The model.
    batch : object
        The batch.

    Returns
    -------
    object
        The model's output.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def batches(batch: Any) -> Iterator[Any]:
    """The batches in what a user passes.

    Parameters
    ----------
    batch : object
        One batch or an iterable of them.

    Yields
    ------
    object
        Each batch.
    """
    if isinstance(batch, (Mapping, torch.Tensor, tuple)):
        yield batch
    elif isinstance(batch, Iterable):
        yield from batch
    else:
        raise CaptureError(
            f"a batch of type {type(batch).__name__} came; expected a mapping, a tensor, a tuple, or an iterable of these"
        )


def _listening(batch: Any) -> Any:
    """The batch with gradient-carrying aliases of its floating leaves, so that the first state has a gradient too."""
    if isinstance(batch, torch.Tensor):
        return batch.detach().requires_grad_() if batch.is_floating_point() and batch.is_leaf else batch
    if isinstance(batch, Mapping):
        masks = {name for name in batch if "mask" in str(name)}
        return {name: value if name in masks else _listening(value) for name, value in batch.items()}
    return type(batch)(_listening(value) for value in batch) if type(batch) in (tuple, list) else batch


def _loss_value(output: Any, batch: Any, loss: Loss | None, *, required: bool) -> torch.Tensor | None:
    if loss is not None:
        value = loss(output, batch)
    else:
        value = getattr(output, "loss", None)
        if value is None and isinstance(output, Mapping):
            value = output.get("loss")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value
    if required or loss is not None:
        came = (
            "no loss"
            if value is None
            else f"a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        )
        raise CaptureError(
            f"gradients need a scalar loss, but there is {came}: add labels to the batch, or pass "
            "loss=lambda output, batch: …"
        )
    return None


def _backward(value: torch.Tensor, forward: Forward) -> None:
    """Run the backward up to the first states only, so that no parameter's gradient is written and no user hook runs."""
    if not value.requires_grad or not forward.sources:
        raise CaptureError("the loss does not depend on any residual state that carries a gradient")
    torch.autograd.grad(value, forward.sources, allow_unused=True)


@contextmanager
def _differentiable(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Let a wholly frozen model carry gradients for the time of the capture."""
    frozen = [p for p in model.parameters() if p.is_floating_point()]
    if not gradients or any(p.requires_grad for p in frozen):
        yield
        return
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def eager() -> Any:
    """A context in which compiled models run as written, since compiled code skips hooks.

    Returns
    -------
    context manager
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("force_eager") if set_stance is not None else nullcontext()
