"""What do the tokens of a forward attend to? Attention weights, seen where they are computed, as three numbers per query.

Weights are a softmax over keys whose result multiplies the values, or the inside of one of torch's fused operations: there
they are computed once more from the queries and keys. Whether a softmax is one of attention is seen from what is done with it,
never by a name: a softmax over streams, experts or depths has no axis of queries.

Shapes: S sampled sequences, H heads, Q queries, K keys, d features of a head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from depthscope.probes.model.hooks import without_frames
from depthscope.probes.reading.graph import names
from depthscope.probes.reading.known_operations import operation_of

# A mask that is added is −∞, the smallest number of its type, or such as −10⁹; no logit of a network is near these.
MASKED = -1e8
# Elements of the weights that are held at once while fused attention is computed again: 64 MB.
CHUNK = 2**24
# Numbers of the queries and keys of a call that is measured with others at the end of the forward: 512 KB, which is held.
SMALL = 2**17

SOFTMAX = names("_softmax _safe_softmax")
PRODUCTS = names("bmm baddbmm mm")
# Through these the weights stay what they are, up to their type, shape, and what dropout takes away.
PASSING = names(
    "view _unsafe_view reshape expand clone _to_copy native_dropout slice alias mul div where masked_fill nan_to_num "
    "unsqueeze squeeze detach"
)
FUSED = frozenset(
    f"_scaled_dot_product_{name}"
    for name in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable",
    )
)  # fmt: skip
# Whole layers in one operation, which torch uses where no gradient is wanted.
CLOSED = names("_native_multi_head_attention _transformer_encoder_layer_fwd")


@dataclass(frozen=True)
class AttentionRows:
    """What one call of attention did, for each query.

    ``value``: number of its value in the recorded graph.
    ``rows``: (3, S, H, Q): entropy of the weights in nats, number of keys that the query sees, weight on the first of these;
    or what these are computed from at the end of the forward, by `rows_of_calls`.
    """

    value: int
    rows: torch.Tensor | FusedCall


class FusedCall(NamedTuple):
    """Queries (S, H, Q, d), scaled, and keys (S, H, K, d) of the sampled sequences, copied: a model may write over its own."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its rows."""
        return (3, *self.query.shape[:3])

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls have in common that are measured together."""
        return self.query.shape, self.key.shape, self.query.device, self.is_causal


class AttentionWatch:
    """The attention weights of the sampled sequences of one forward; a listener of operations.

    ``found``: in the order of the forward.
    ``reasons``: why attention was seen and not measured, and how often.
    ``rows``: sampled sequences of the batch.
    ``number``: the number of the value that a tensor has in the recorded graph.
    ``heads_follow``: whether the running module joins sequences and heads into one axis, the heads of a sequence next to each
    other.
    ``gathered``: gets what the queries gather, the weighted sums of the values, as it is made.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        batch_size: int,
        *,
        number: Callable[[torch.Tensor], int],
        heads_follow: Callable[[], bool],
        gathered: Callable[[torch.Tensor], None] = lambda result: None,
    ):
        self.found: list[AttentionRows] = []
        self.reasons: dict[str, int] = {}
        self._chosen, self._batch_size = rows, batch_size
        self._number, self._heads_follow, self._gathered = number, heads_follow, gathered
        # Softmax results that are not known to be attention yet, and what was made of them, by the identity of the tensor.
        self._waiting: dict[int, tuple[weakref.ref[torch.Tensor], _Softmax]] = {}
        self._failed = False

    def __call__(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Look at an operation that has run; an error of ours must not reach the user's forward.

        ``func, args, kwargs, result``: the operation, what it took and what it gave.
        """
        if self._failed:
            return
        try:
            self._see(func, args, kwargs, result)
        except Exception as error:
            self._failed = True
            self._waiting.clear()
            self._refuse(f"attention could not be read: {type(error).__name__}: {without_frames(error)}")

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = operation_of(func).name
        if name in SOFTMAX:
            self._note_softmax(args, result)
        elif name in FUSED:
            self._note_fused_call(func, args, kwargs, result[0])
        elif name in CLOSED:
            self._refuse("an operation that is a whole layer shows no weights: capture with gradients=True")
        elif self._waiting and args and isinstance(args[0], torch.Tensor):
            waiting = self._known(args[0])
            if waiting is None:
                return
            if name in PRODUCTS:
                self._note_product(args[0], waiting, result)
            elif name in PASSING:
                self._follow(result[0] if isinstance(result, (tuple, list)) else result, waiting)

    # --- weights that are a tensor

    def _note_softmax(self, args: Any, weights: torch.Tensor) -> None:
        logits, dim = args[0], args[1]
        last = dim in (-1, logits.ndim - 1)
        # Three axes at least: queries and keys, and sequences or heads before them.
        if last and logits.ndim >= 3 and logits.shape[-2] > 1 and logits.shape[-1] > 1:
            # One at a time: the softmax of a router or a head is never multiplied, and would be kept to the end.
            self._waiting.clear()
            self._follow(weights, _Softmax(logits, weights))

    def _follow(self, tensor: torch.Tensor, waiting: _Softmax) -> None:
        self._waiting[id(tensor)] = weakref.ref(tensor), waiting

    def _known(self, tensor: torch.Tensor) -> _Softmax | None:
        entry = self._waiting.get(id(tensor))
        # The identity of a tensor that is gone is given to another one.
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _note_product(self, factor: torch.Tensor, waiting: _Softmax, result: torch.Tensor) -> None:
        """A product with the weights as its first factor: they are attention where each row of it is a query."""
        shape, own = factor.shape, waiting.weights.shape
        # Weights over streams, experts or depths are one row for each token: (B T, 1, n).
        if shape[-1] != own[-1] or shape[-2] != own[-2]:
            return
        self._waiting.clear()
        self._gathered(result)
        heads = self._by_sequence(waiting.weights)
        if heads is None:
            return
        seen = (waiting.logits > MASKED).reshape(heads.shape)
        self._add(waiting.weights, row_numbers(heads[self._chosen], seen[self._chosen]))

    def _by_sequence(self, weights: torch.Tensor) -> torch.Tensor | None:
        """Weights as (B, H, Q, K); None where their axes do not tell sequences from heads."""
        batch, shape = self._batch_size, tuple(weights.shape)
        if len(shape) == 4 and shape[0] == batch:
            return weights
        joined = self._heads_follow() and shape[0] % batch == 0
        if len(shape) == 3 and (shape[0] == batch or batch == 1 or joined):
            return weights.reshape(batch, -1, *shape[1:])
        self._refuse(f"weights of shape {shape} do not tell the {batch} sequences from heads or windows")
        return None

    # --- weights inside of a fused operation

    def _note_fused_call(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        query, key = given["query"], given["key"]
        if query.shape[-2] < 2:
            return
        self._gathered(result)
        if query.ndim != 4 or query.shape[0] != self._batch_size:
            shape = tuple(query.shape)
            self._refuse(f"queries of shape {shape} do not have the {self._batch_size} sequences first")
            return
        if not len(self._chosen):  # only where it lies
            self._add(result, query.new_zeros((3, 0, *query.shape[1:3]), dtype=torch.float32))
            return
        q, k = query[self._chosen].float(), key[self._chosen].float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # several heads may share their keys
        scale = given.get("scale")
        q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        mask = given.get("attn_mask", given.get("attn_bias"))
        if mask is not None:
            mask = mask.expand(query.shape[0], *mask.shape[-3:]) if mask.ndim == 4 else mask
            mask = mask[self._chosen] if mask.ndim == 4 else mask
        call = FusedCall(q, k, mask, bool(given.get("is_causal")))
        fits = (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])  # else the error is to be raised here
        waits = fits and mask is None and q.numel() + k.numel() <= SMALL
        self._add(result, call if waits else _rows_of(call))

    # --- both

    def _add(self, made: torch.Tensor, rows: torch.Tensor | FusedCall) -> None:
        self.found.append(AttentionRows(self._number(made), rows))

    def _refuse(self, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


def rows_of_calls(rows: Sequence[torch.Tensor | FusedCall]) -> list[torch.Tensor]:
    """What calls of attention did; small ones of the same kind at once, since each operation costs more than its numbers."""
    found: dict[int, torch.Tensor] = {n: of for n, of in enumerate(rows) if isinstance(of, torch.Tensor)}
    of_kind: dict[tuple[Any, ...], list[tuple[int, FusedCall]]] = {}
    for number, of in enumerate(rows):
        if isinstance(of, FusedCall):
            of_kind.setdefault(of.kind, []).append((number, of))
    for calls in of_kind.values():
        query, key = (torch.cat([getattr(of, name) for _, of in calls]) for name in ("query", "key"))
        together = _rows_of(FusedCall(query, key, None, calls[0][1].is_causal))
        found |= zip((number for number, _ in calls), together.chunk(len(calls), dim=1), strict=True)
    return [found[number] for number in range(len(rows))]


def _rows_of(call: FusedCall) -> torch.Tensor:
    """The same of one call, some queries at a time."""
    q, k, mask, _ = call
    parts = []
    size = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for begin in range(0, q.shape[2], size):
        logits = q[:, :, begin : begin + size] @ k.mT
        if call.is_causal:
            position = torch.arange(begin, begin + logits.shape[2], device=logits.device)
            later = torch.arange(k.shape[2], device=logits.device) > position[:, None]
            logits = logits.masked_fill(later, -math.inf)
        if mask is not None:
            part = mask[..., begin : begin + size, :] if mask.shape[-2] > 1 else mask
            part = part[..., : k.shape[2]]  # padded to a multiple of 8 for the kernel
            logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part
        parts.append(row_numbers(logits.softmax(-1), logits > MASKED))
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class _Softmax:
    """A softmax whose result may turn out to be attention."""

    logits: torch.Tensor
    weights: torch.Tensor


def row_numbers(weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Entropy, number of keys and weight of the first key of each query.

    ``weights, seen``: (S, H, Q, K): attention weights, and whether a query may see a key.
    Returns: (3, S, H, Q) float32; the entropy in nats, NaN where a query sees nothing or a weight is not finite.
    """
    weights = weights.float()
    keys = seen.sum(-1)
    # −∞ from 0 log 0 is 0: `xlogy` has that limit.
    entropy = -torch.xlogy(weights, weights).sum(-1)
    first = weights.gather(-1, seen.int().argmax(-1, keepdim=True)).squeeze(-1)
    nothing = (keys == 0) | ~entropy.isfinite()
    return torch.stack(
        [entropy.masked_fill(nothing, math.nan), keys.float(), first.masked_fill(nothing, math.nan)]
    )
