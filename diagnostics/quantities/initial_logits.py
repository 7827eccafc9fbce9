"""What would the mixing be without training? Matrices of the initial static logits, as they were and after weight decay.

Decoupled weight decay multiplies logits without a gradient by ∏ (1 − η λ): they shrink towards zero, whose matrix is
uniform, and the streams contract although nothing was learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.kernels import mixing as kernel
from depthscope.diagnostics.kernels._arrays import as_count, as_float64
from depthscope.diagnostics.quantities.registry import quantity
from depthscope.diagnostics.schema import TRACE, chain_dataset, chains, validate
from depthscope.diagnostics.schema.groups import group_path

LOGITS = "initial_logits"


def decay_factor(
    learning_rate: float | Sequence[float], *, weight_decay: float, steps: int | None = None
) -> float:
    r"""What decoupled weight decay leaves of a weight that gets no gradient.

    .. math:: \prod_t (1 - \eta_t \lambda)

    Parameters
    ----------
    learning_rate : float or sequence of float
        η: one for every step, or the schedule.
    weight_decay : float
        λ, as AdamW takes it.
    steps : int, optional
        Number of steps of one rate; None for a schedule.

    Returns
    -------
    float
        In (0, 1].

    Raises
    ------
    InputError
        For steps with a schedule, no steps with one rate or a number of them that is no integer, an empty schedule, or a
        step that leaves nothing or adds to the weight.

    Examples
    --------
    >>> round(decay_factor(0.5, weight_decay=0.2, steps=2), 12), decay_factor([0.5, 0.0], weight_decay=0.2)
    (0.81, 0.9)
    """
    scheduled = np.ndim(learning_rate) > 0
    if scheduled != (steps is None):
        raise InputError(
            f"steps is {steps} with {'a schedule' if scheduled else 'one learning rate'}; expected the number of "
            "steps with one rate, and None with a schedule"
        )
    times = 1 if steps is None else as_count(steps, name="steps", least=0)
    if np.ndim(learning_rate) > 1 or np.size(learning_rate) == 0 or np.ndim(weight_decay) > 0:
        raise InputError(
            f"learning_rate has shape {np.shape(learning_rate)} and weight_decay {np.shape(weight_decay)}; expected one "
            "rate or a schedule of a step or more, and one weight decay"
        )
    rate = as_float64(learning_rate, name="learning_rate", ndim=0)[1]
    decay = as_float64(weight_decay, name="weight_decay", ndim=0)[1]
    lost = np.asarray(rate) * np.asarray(decay)
    if not (np.all(lost >= 0.0) and np.all(lost < 1.0)):
        raise InputError(
            f"a step takes a share of {np.max(lost):g} to {np.min(lost):g} of the weight; expected 0 to below 1: "
            "learning rate times weight decay"
        )
    # log1p, not a product of 1 − ηλ, which would round a small ηλ in every one of many steps.
    return math.exp(float(np.sum(np.log1p(-lost))) * times)


def with_replay(
    run: xr.DataTree,
    initial: xr.DataArray | np.ndarray,
    *,
    decay: float,
    sinkhorn_steps: int | None = None,
    last: str | None = None,
    floor: float | None = None,
) -> xr.DataTree:
    """Store the initial static logits of an mHC in its run, so that what training moved can be measured.

    Parameters
    ----------
    run : DataTree
        A run with ``h_res``.
    initial : DataArray or ndarray
        Logits (connection, stream_out, stream_in), rows are destinations; `probes.initial_logits` reads them from a
        checkpoint, with the coordinates by which they are matched. An array is in the run's order.
    decay : float
        What weight decay left of them, see `decay_factor`; 1 where they are not decayed.
    sinkhorn_steps, last, floor : int, str, float, optional
        How the model makes a matrix of them: rounds (20), which sums are exact (``"row"`` or ``"column"``, of the
        canonical orientation), and what is added to their softmax before the rounds (0). By default the
        attributes of ``initial``.

    Returns
    -------
    DataTree
        A copy of the run with ``initial_logits`` in its trace.

    Raises
    ------
    InputError
        Where the run has no ``h_res``, a connection of it is not among the logits or has some that are not finite,
        or ``sinkhorn_steps`` is no integer of 1 or more.
    """
    if sinkhorn_steps is not None:
        sinkhorn_steps = as_count(sinkhorn_steps, name="sinkhorn_steps")
    given = initial if isinstance(initial, xr.DataArray) else _labelled_logits(np.asarray(initial))
    # Defaults of the mHC paper first, then what the checkpoint gives, then what the caller names.
    attrs: dict[str, Any] = {"sinkhorn_steps": 20, "last": "row", "floor": 0.0}
    attrs.update(given.attrs)
    named = {"decay": decay, "sinkhorn_steps": sinkhorn_steps, "last": last, "floor": floor}
    attrs.update({name: value for name, value in named.items() if value is not None})
    traces = {chain: chain_dataset(run, "trace", chain) for chain in chains(run)}
    mixing = {chain: trace for chain, trace in traces.items() if trace is not None and "h_res" in trace}
    if not mixing:
        raise InputError("the run has no h_res to compare with; capture a model whose streams are mixed")
    replayed = run.copy()  # shallow: the arrays are shared, the caller's run gets no new variable
    for chain, trace in mixing.items():
        logits = xr.Variable(TRACE[LOGITS].dims, _matched_logits(given, trace), attrs)
        replayed[group_path("trace", chain)].dataset = trace.assign({LOGITS: logits})
    validate(replayed)  # the attributes too: a decay above 1, or no round of Sinkhorn, is refused here
    return replayed


def _labelled_logits(logits: np.ndarray) -> xr.DataArray:
    if logits.ndim != 3:
        raise InputError(
            f"initial has shape {logits.shape}; expected logits (connection, stream_out, stream_in)"
        )
    return xr.DataArray(logits, dims=TRACE[LOGITS].dims)


def _matched_logits(given: xr.DataArray, trace: xr.Dataset) -> np.ndarray:
    """The logits of a chain's connections, in its order."""
    values = given.transpose(*TRACE[LOGITS].dims).values
    # Without names on both sides, as for a bare array, the order of the run is taken.
    if "connection_module" in given.coords and "connection_module" in trace.coords:
        names, blocks = _modules(given), _blocks(given)
        wanted = zip(_modules(trace), _blocks(trace), strict=True)
        values = values[[_index_of(module, block, names, blocks) for module, block in wanted]]
    shape = tuple(trace["h_res"].sizes[dim] for dim in TRACE[LOGITS].dims)
    if values.shape != shape:
        raise InputError(
            f"the initial logits have shape {values.shape}, the run's connections {shape}; expected one square of "
            "logits for each connection, in the run's order"
        )
    # It refuses what is not finite, which would spread through every round of Sinkhorn.
    return np.asarray(as_float64(values, name="initial, in the run's order,")[1])


def _modules(data: xr.DataArray | xr.Dataset) -> list[str]:
    return list(map(str, data["connection_module"].values))


def _blocks(data: xr.DataArray | xr.Dataset) -> list[tuple[int, str] | None]:
    """Block number and branch of every connection, where they are known."""
    if not {"connection_layer", "branch"} <= set(data.coords):
        return [None] * data.sizes["connection"]
    return list(zip(data["connection_layer"].values.tolist(), map(str, data["branch"].values), strict=True))


def _index_of(
    module: str, block: tuple[int, str] | None, names: list[str], blocks: list[tuple[int, str] | None]
) -> int:
    """Index of the logits of a module; a checkpoint's files may name it in another way than the model does."""
    same_path = [i for i, name in enumerate(names) if name == module]
    # One of the two has a prefix, such as "model." or "module." of a wrapper.
    same_end = [
        i
        for i, name in enumerate(names)
        if f".{name}".endswith(f".{module}") or f".{module}".endswith(f".{name}")
    ]
    same_block = [i for i, other in enumerate(blocks) if block is not None and other == block]
    # The surest first. Two logits that fit equally well are no match: a guess would compare other matrices.
    for matches in (same_path, same_end, same_block):
        if len(matches) == 1:
            return matches[0]
    raise InputError(
        f"connection {module!r} of the run is not among the initial logits ({', '.join(names[:4])}, …); take the "
        "checkpoint of the same model, or give an array in the run's order"
    )


def _matrices(logits: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """The matrices that a model makes of logits (..., n, n)."""
    last, floor = how["last"], how["floor"]
    if floor:
        # Such models normalise once by a softmax, on the side that Sinkhorn does not end on, and add the floor to it.
        first = -2 if last == "row" else -1
        shifted = np.exp(logits - logits.max(axis=first, keepdims=True))
        logits = np.log(shifted / shifted.sum(axis=first, keepdims=True) + floor)
    return kernel.sinkhorn(logits, steps=int(how["sinkhorn_steps"]), last=last)


@quantity
def initial_matrices(initial_logits: xr.DataArray) -> np.ndarray:
    """Mixing matrices of the initial static logits, (C, n, n)."""
    return _matrices(initial_logits.values, initial_logits.attrs)


@quantity
def replayed_matrices(initial_logits: xr.DataArray) -> np.ndarray:
    """Mixing matrices of the initial static logits after weight decay alone, (C, n, n)."""
    return _matrices(initial_logits.attrs["decay"] * initial_logits.values, initial_logits.attrs)
