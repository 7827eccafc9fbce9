"""Where does what one input has and another has not go through? States of one forward, put into the other.

Shapes: B sequence, T token, N stream, D feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias, Unpack

import torch
import xarray as xr
from torch import nn

from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.probes.interventions.changes import numbers_of
from depthscope.probes.interventions.model_under_test import Edit, ModelUnderTest
from depthscope.probes.interventions.patch_measure import Answers, Cell, Measure, Outcome, patch_result
from depthscope.probes.interventions.predictions import Pick
from depthscope.probes.model.errors import InterventionError
from depthscope.probes.model.tensors import tensors_in
from depthscope.probes.session.model_call import batches
from depthscope.probes.session.options import ModelOptions, Options, takes_options

Which: TypeAlias = int | Iterable[int] | str | None
ALL = -1
"""Of a token or stream: all of them at once."""


@takes_options(ModelOptions)
def patch(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    *,
    depths: int | Iterable[int] | None = None,
    tokens: Which = None,
    stream: Which = None,
    answer: Answers = None,
    against: Answers = None,
    logits: Pick | None = None,
    chain: str | None = None,
    token_text: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Unpack[ModelOptions],
) -> xr.Dataset:
    r"""Put states of a clean forward into a corrupted one, place by place, and measure what comes back.

    One cell is one forward of the corrupted input in which one state, at a depth, a token and a stream, is that of the clean
    input. With the measure m of an output, the effect of a cell is

    .. math:: \frac{m(\text{patched}) - m(\text{corrupted})}{m(\text{clean}) - m(\text{corrupted})}

    0 where nothing comes back, 1 where all does. Everything after the changed place runs on by itself. Nothing of the model is
    touched: its weights, buffers, hooks, modes, gradients and all random states are as before, whatever happens.

    Parameters
    ----------
    model : Module
        The model, run as it is, without gradients.
    clean, corrupted : mapping, tensor, tuple, or as many of these
        Two inputs of the same shape, with the same tokens padded; the second differs from the first where it matters.
    depths : int or iterable of int, optional
        Only these.
    tokens : int, iterable of int or ``"all"``, optional
        Positions that are patched one at a time; each by default. ``"all"``: all at once, one cell.
    stream : int, iterable of int or ``"all"``, optional
        Streams that are patched one at a time, and all at once; each by default. ``"all"``: all at once alone.
    answer, against : int or array of int, optional
        Token ids, one for all sequences or one for each. With both the measure is logit(answer) − logit(against), with the
        first alone −log p(answer), at the last real token.
    logits : callable, optional
        ``logits(output)``: the tensor to compare, where the output has several.
    chain : str, optional
        Which of several chains is patched.
    token_text : sequence of sequences of str, optional
        Text of the tokens.
    progress : callable, optional
        Called with (what, number done, number in all) at each place.
    **options
        Each option of `Options`.

    Returns
    -------
    Dataset
        ``effect`` and ``change`` (m(patched) − m(corrupted)) by depth, token and stream, each with ``_error`` (standard
        error over sequences), ``_low`` and ``_high`` (95 %, Student's t); ``patched``, ``clean`` and ``corrupted`` are the
        measures of each sequence. Without `answer` the measure is the loss of the next clean token where the output
        is proven to predict it, else KL(clean ‖ patched), else the relative change of the output. Token and stream −1 are
        all at once. The attribute ``no_effect`` tells why the effect is undefined (NaN) where the two inputs differ by no more
        than chance, ``left_out`` which places could not be patched, ``other_paths`` whether something leads around a state.

    Raises
    ------
    InterventionError
        Where the inputs do not fit each other, the reading of the model is unproven, or no place can be patched.
    InputError
        For arguments that are not known.

    Examples
    --------
    >>> import depthscope as ds
    >>> found = ds.interventions.patch(model, clean, corrupted, answer=3, against=7)  # doctest: +SKIP
    >>> found.effect.sel(stream=-1).plot()  # doctest: +SKIP
    """
    pairs = _paired(clean, corrupted)
    wanted = _Wanted(_numbers(depths), _numbers(tokens), _numbers(stream))
    outcome = Outcome()
    for clean_batch, corrupted_batch in pairs:
        pair = _Pair(model, clean_batch, corrupted_batch, Options(**options), chain)
        measure = Measure(
            pair.clean, answer=answer, against=against, pick=logits, first=outcome.num_sequences
        )
        _run_pair(pair, measure, wanted, outcome, progress or (lambda what, done, total: None))
    measure.require_all_answers_used(outcome.num_sequences)
    return patch_result(outcome, type(model).__name__, token_text)


@dataclass(frozen=True)
class _Wanted:
    depths: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    streams: tuple[int, ...] | None


def _numbers(given: Which) -> tuple[int, ...] | None:
    if isinstance(given, str):
        if given != "all":
            raise InputError(
                f"got {given!r}, expected numbers, or 'all' for all at once; {did_you_mean(given, ['all'])}"
            )
        return ()
    return numbers_of(given)


def _paired(clean: Any, corrupted: Any) -> Iterator[tuple[Any, Any]]:
    missing = object()
    count = 0
    for one, other in zip_longest(batches(clean), batches(corrupted), fillvalue=missing):
        if one is missing or other is missing:
            fewer = "clean" if one is missing else "corrupted"
            raise InputError(f"{fewer} has {count} batches and the other input more; expected as many")
        shapes = [[tuple(tensor.shape) for tensor in tensors_in(batch)] for batch in (one, other)]
        if shapes[0] != shapes[1]:
            raise InterventionError(
                f"clean has tensors of the shapes {shapes[0]} and corrupted {shapes[1]}; expected the same, token by token: "
                "choose words with as many tokens, or pad both to the same length"
            )
        count += 1
        yield one, other
    if not count:
        raise InputError("no batch was given; expected a mapping, a tensor, a tuple, or several of these")


# --- two forwards


class _Pair:
    """A clean and a corrupted input of one model."""

    def __init__(self, model: nn.Module, clean: Any, corrupted: Any, options: Options, chain: str | None):
        self.corrupted = ModelUnderTest(model, corrupted, options, chain=chain)
        if self.corrupted.proof != "proven":
            raise InterventionError(
                f"the states of {self.corrupted.chain.name or 'this model'} are {self.corrupted.proof}; what is patched there "
                "would not be known to be all that the later blocks read. Patch with hooks of your own, or use ablate, which "
                "says the same in its result"
            )
        self.clean = ModelUnderTest(model, clean, options, chain=chain)
        shapes = [
            {depth: tuple(s.shape) for depth, s in each.base.states.items()}
            for each in (self.clean, self.corrupted)
        ]
        if shapes[0] != shapes[1]:
            raise InterventionError(
                f"the states have the shapes {_differing(*shapes)} (sequence, token, stream, feature) with the two inputs; "
                "expected the same at every depth"
            )
        shape = shapes[0][0][:2]
        masks = [
            torch.ones(shape, dtype=torch.bool) if each.mask is None else each.mask.cpu()
            for each in (self.clean, self.corrupted)
        ]
        if not torch.equal(*masks):
            real = [[int(n) for n in mask.sum(1)] for mask in masks]
            raise InterventionError(
                f"the sequences have {real[0]} real tokens in clean and {real[1]} in corrupted, or others are padded; "
                "expected the same tokens to be real in both"
            )
        self.real = masks[0]

    def depths(self, asked: tuple[int, ...] | None) -> list[int]:
        """The depths whose states are patched."""
        last = len(self.corrupted.chain.points) - 1
        if outside := [depth for depth in asked or () if not 0 <= depth <= last]:
            raise InterventionError(
                f"depth {outside[0]} is none of the model's; it has depths 0 (embedding) … {last}"
            )
        return [depth for depth in range(last + 1) if asked is None or depth in asked]


def _differing(one: Mapping[int, Any], other: Mapping[int, Any]) -> str:
    depth = next(d for d in sorted({*one, *other}) if one.get(d) != other.get(d))
    return f"{one.get(depth)} and {other.get(depth)} at depth {depth}"


def _replaced(value: torch.Tensor, chosen: torch.Tensor) -> Edit:
    """Another state at some tokens and streams, (T, N)."""
    return lambda state, seen: torch.where(
        chosen.to(state.device)[None, :, :, None], value.to(state.device, state.dtype), state
    )


# --- one cell after another


def _run_pair(
    pair: _Pair,
    measure: Measure,
    wanted: _Wanted,
    outcome: Outcome,
    progress: Callable[[str, int, int], None],
) -> None:
    clean, corrupted = (measure.of(each.base) for each in (pair.clean, pair.corrupted))
    values: dict[Cell, torch.Tensor] = {}
    depths = pair.depths(wanted.depths)
    for number, depth in enumerate(depths):
        progress(f"the state at depth {depth}", number, len(depths))
        outcome.layers[depth] = pair.corrupted.chain.points[depth].layer
        try:
            # One by one: what was measured before an error stays.
            values.update(_patched_at(depth, wanted, pair, measure, corrupted))
        except InterventionError as error:
            outcome.left_out[f"depth {depth}"] = str(error)
    if not values:
        raise InterventionError(next(iter(outcome.left_out.values()), "no depth was asked for"))
    outcome.add(clean, corrupted, values, measure, pair.corrupted)


def _patched_at(
    depth: int, wanted: _Wanted, pair: _Pair, measure: Measure, corrupted: torch.Tensor
) -> Iterator[tuple[Cell, torch.Tensor]]:
    """The measure of each sequence, by token and stream of the state at a depth; NaN where the patched token is padding."""
    clean, before = pair.clean.base.states.get(depth), pair.corrupted.base.states.get(depth)
    if clean is None or before is None:
        raise InterventionError("no forward shows the state")
    differs = ((clean != before) & ~(clean.isnan() & before.isnan())).any(-1).cpu()  # (B, T, N)
    _, num_tokens, num_streams = differs.shape
    first = pair.real.shape[1]
    if wanted.tokens != () and num_tokens not in (first, 1):
        raise InterventionError(
            f"the state has {num_tokens} tokens here and {first} at depth 0, so that a token has no number that holds at "
            'every depth; take tokens="all"'
        )
    is_checked = False  # whether a forward showed that a change arrives
    for token, at in _ones("token", wanted.tokens, num_tokens, each_too=False):
        for stream, of in _ones("stream", wanted.streams, num_streams, each_too=num_streams > 1):
            chosen, values = at[:, None] & of, corrupted.clone()
            # Where what is put in is what was there, the forward would be the corrupted one once more.
            if bool((differs & chosen).any()):
                edits = {depth: _replaced(clean, chosen)}
                values = measure.of(pair.corrupted.forward(edits, checked=not is_checked))
                is_checked = True
            # Patched at all tokens, a state of a later stage has no padding that is known.
            is_real = pair.real.any(1) if bool(at.all()) else (pair.real & at).any(1)
            same = len(values) == len(is_real)
            yield (depth, token, stream), values.masked_fill(~is_real, torch.nan) if same else values


def _ones(
    what: str, wanted: tuple[int, ...] | None, count: int, *, each_too: bool
) -> list[tuple[int, torch.Tensor]]:
    """The tokens or streams of one cell after another; all at once where nothing else is wanted, and with streams always."""
    numbers = range(count) if wanted is None else wanted
    if outside := [number for number in numbers if not 0 <= number < count]:
        raise InputError(f"no {what} {outside[0]}; the input has {what}s 0 … {count - 1}")
    every = [(ALL, torch.ones(count, dtype=torch.bool))]
    if what == "stream" and not each_too:
        return every
    ones = [(number, torch.arange(count) == number) for number in numbers]
    return every + ones if what == "stream" else ones or every
