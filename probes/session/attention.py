"""What do the tokens of the sampled sequences attend to? Entropy, visible keys and first weight of each query, by depth.

Weights are a softmax over keys whose result multiplies the values, or the inside of one of torch's fused operations: there
they are computed once more from the queries and keys. Whether a softmax is one of attention is seen from what is done with it,
never by a name. The first forward, whose operations are all recorded, shows to which states attention leads; later forwards
attend in the same order.

Shapes: S sampled sequences, H heads, Q queries, K keys.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.hooks import MethodWatch, without_frames
from depthscope.probes.model.layout import LayoutError
from depthscope.probes.model.tensors import OperationsShown
from depthscope.probes.reading.graph import Graph, TracedValue, names
from depthscope.probes.reading.operations import operation_of
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.session.forward import CurrentForward, Forward, Key
from depthscope.probes.session.options import Options, Scope
from depthscope.probes.structure.model_structure import Structure

OTHER_TOKENS = "its queries are not the tokens of the state"
CHANGED = "a later forward attended another number of times than the first"
WHOLE_LAYER = "an operation that is a whole layer shows no weights: capture with gradients=True"
# A mask that is added is −∞, the smallest number of its type, or such as −10⁹; no logit of a network is near these.
MASKED = -1e8
# Elements of the weights that are held at once while fused attention is computed again: 64 MB.
CHUNK = 2**24

SOFTMAX = names("_softmax _safe_softmax")
PRODUCTS = names("bmm baddbmm mm")
# Through these the weights stay what they are, up to their type, shape, and what dropout takes away.
PASSING = names(
    "view _unsafe_view reshape expand clone _to_copy native_dropout slice alias mul div where masked_fill nan_to_num "
    "unsqueeze squeeze detach"
)
KERNELS = "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"
FUSED = frozenset(f"_scaled_dot_product_{name}" for name in (*KERNELS, "fused_attention_overrideable"))
# Whole layers in one operation, which torch uses where no gradient is wanted.
CLOSED = names("_native_multi_head_attention _transformer_encoder_layer_fwd")


@dataclass
class AttentionPlaces:
    """Where a model attends, as its first forward showed.

    ``expected``: for each time that it attends, chain and depth of the state that this leads to, or None where it leads to
    none that is known.
    ``heads, modules, seen``: number of heads, the module, and in how many forwards it was seen, by chain and depth.
    ``reasons``: why attention was seen and is not measured, and how often.
    """

    expected: list[Key | None] = field(default_factory=list)
    heads: Counter[Key] = field(default_factory=Counter)
    modules: dict[Key, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    seen: Counter[Key] = field(default_factory=Counter)


class AttentionWatch:
    """The attention weights of the sampled sequences of one forward; a listener of operations.

    ``found``: in the order of the forward: the attention weights, or what a fused operation gave, by ``number``; and its
    `row_numbers`.
    ``rows``: sampled sequences of the batch; without any, only where attention lies is found.
    """

    def __init__(self, rows: torch.Tensor, batch_size: int, *, number: Callable[[torch.Tensor], int] = id):
        self.found: list[tuple[int, torch.Tensor]] = []
        self.reasons: Counter[str] = Counter()
        self._chosen, self._batch_size = rows, batch_size
        self._number = number
        # By the identity of the tensor: what was made of the last softmax, its logits and its weights.
        self._waiting: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor, torch.Tensor]] = {}
        self._failed = False

    def __call__(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Look at an operation that has run; an error of ours must not reach the user's forward."""
        if self._failed:
            return
        try:
            self._see(func, args, kwargs, result)
        except Exception as error:
            self._failed = True
            self._waiting.clear()
            self.reasons[f"attention could not be read: {type(error).__name__}: {without_frames(error)}"] += 1

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = operation_of(func).name
        if name in SOFTMAX:
            logits, dim = args[0], args[1]
            # Three axes at least: queries and keys, and sequences or heads before them.
            if dim in (-1, logits.ndim - 1) and logits.ndim >= 3 and min(logits.shape[-2:]) > 1:
                # One at a time: the softmax of a router or a head is never multiplied, and would be kept to the end.
                self._waiting = {id(result): (weakref.ref(result), logits, result)}
        elif name in FUSED:
            self._note_fused_call(func, args, kwargs, result[0])
        elif name in CLOSED:
            self.reasons[WHOLE_LAYER] += 1
        elif self._waiting and args and isinstance(args[0], torch.Tensor):
            known = self._waiting.get(id(args[0]))
            # The identity of a tensor that is gone is given to another one.
            if known is not None and known[0]() is args[0]:
                self._follow(name, args[0], *known[1:], result)

    def _follow(
        self, name: str, factor: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, result: Any
    ) -> None:
        """What is done with a softmax: a product with it as the first factor is attention where each row is a query."""
        if name in PASSING:
            follower = result[0] if isinstance(result, (tuple, list)) else result
            self._waiting[id(follower)] = weakref.ref(follower), logits, weights
        # Weights over streams, experts or depths are one row for each token: (B T, 1, n).
        elif name in PRODUCTS and factor.shape[-2:] == weights.shape[-2:]:
            self._waiting = {}
            self._note_weights(logits, weights)

    def _note_weights(self, logits: torch.Tensor, weights: torch.Tensor) -> None:
        batch, shape = self._batch_size, tuple(weights.shape)
        is_single = len(shape) == 3 and batch == 1
        if not is_single and (len(shape) not in (3, 4) or shape[0] != batch):
            self.reasons[
                f"weights of shape {shape} do not tell the {batch} sequences from heads or windows"
            ] += 1
            return
        w, s = (of.reshape(batch, -1, *shape[-2:])[self._chosen] for of in (weights, logits > MASKED))
        self.found.append((self._number(weights), row_numbers(w, s)))

    def _note_fused_call(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        query, key = given["query"], given["key"]
        if query.shape[-2] < 2:
            return
        if query.ndim != 4 or query.shape[0] != self._batch_size:
            shape = tuple(query.shape)
            self.reasons[f"queries of shape {shape} do not have the {self._batch_size} sequences first"] += 1
            return
        q, k = query[self._chosen].float(), key[self._chosen].float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # several heads may share their keys
        scale = given.get("scale")
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        mask = given.get("attn_mask", given.get("attn_bias"))
        if mask is not None and mask.ndim == 4:
            mask = mask.expand(query.shape[0], *mask.shape[-3:])[self._chosen]
        causal = bool(given.get("is_causal"))
        self.found.append((self._number(result), fused_row_numbers(q, k, mask, is_causal=causal)))


def watch_attention(forward: Forward, options: Options, scope: Scope) -> None:
    """Look at the operations of a first forward, where attention is wanted."""
    selection, recorder = options.selection, forward.recorder
    assert isinstance(recorder, GraphRecorder)
    # A loop looks at attention where the site is named: it costs more than the rest of a measured step.
    if selection.includes("attention") and (scope.only_own or selection.requests):
        # Without sums only at where it is.
        rows = forward.rows[: options.max_sequences if scope.sums else 0]
        watch = AttentionWatch(rows, forward.batch_size, number=lambda tensor: recorder.known(tensor).number)
        recorder.listeners.append(watch)


def placed_attention(forward: Forward, recorder: GraphRecorder, structure: Structure) -> AttentionPlaces:
    """Tell between which states the attention of a recorded forward lies, and give the forward its numbers."""
    graph, places = recorder.graph, AttentionPlaces()
    if not recorder.listeners:
        return places
    watch = recorder.listeners.pop()  # it has tensors of the forward
    assert isinstance(watch, AttentionWatch)
    places.reasons.update(watch.reasons)
    for value, rows in watch.found:
        places.expected.append(None)  # before the first state, or in what is no chain
        key = _first_state_after(graph.values[value], graph, structure)
        if key is None:
            continue
        shape = graph.values[structure.chains[key[0]].points[key[1]].number].shape
        state = torch.empty(shape, device="meta")
        try:
            tokens = structure.canonical(key[0], state, forward.batch_size, key[1]).shape[1]
        except LayoutError:  # where attention cannot be placed, the states are read all the same
            tokens = None
        if rows.shape[-1] != tokens:
            places.reasons[OTHER_TOKENS] += 1
            continue
        places.expected[-1] = key
        places.heads[key] += rows.shape[2]
        places.modules[key] = graph.path(graph.values[value])
        _add_rows(forward, key, rows)
    places.seen.update(places.heads.keys())
    return places


def _first_state_after(made: TracedValue, graph: Graph, structure: Structure) -> Key | None:
    """Chain and depth of the first state that was computed from a value, after another one."""
    for number, chain in enumerate(structure.chains):
        later = (depth for depth, point in enumerate(chain.points) if point.number > made.number)
        depth = next(later, 0)
        if depth > 0 and graph.depends(graph.values[chain.points[depth].number], made):
            return number, depth
    return None


def _add_rows(forward: Forward, key: Key, rows: torch.Tensor) -> None:
    known = forward.attention.get(key)
    forward.attention[key] = rows if known is None else torch.cat([known, rows], dim=2)


def later_attention(
    places: AttentionPlaces, current: CurrentForward, module: nn.Module, args: Any, kwargs: Any
) -> MethodWatch | None:
    """What looks at the operations of a later forward; None where none is looked at."""
    forward = current.recorded
    # The model may call itself.
    if forward is None or not len(forward.rows) or forward.next_index("attention", ""):
        return None
    watch = AttentionWatch(forward.rows, forward.batch_size)

    def done(result: Any) -> None:
        if len(watch.found) != len(places.expected):
            places.reasons[next(iter(watch.reasons), CHANGED)] += 1
            return
        for (_, found), key in zip(watch.found, places.expected, strict=True):
            if key is not None:
                _add_rows(forward, key, found)
                places.seen[key] += 1

    return MethodWatch(OperationsShown(watch), done)


def add_attention_sums(forward: Forward, heads: int) -> None:
    """Give a forward the sums over its real queries that see two keys or more, padded with NaN to so many ``heads``."""
    for (number, depth), rows_3SHQ in forward.attention.items():
        entropy, keys, first = rows_3SHQ.double()
        chosen = (keys >= 2) & entropy.isfinite()
        mask = forward.masks.get(number)
        if mask is not None:
            chosen &= mask[forward.rows[: rows_3SHQ.shape[1]].to(mask.device)][:, None].to(chosen.device)
        sums = {
            "attention_query_count": chosen.double(),
            "attention_entropy_sum": (entropy / keys.clamp_min(2).log()).where(chosen, 0.0),
            "sink_mass_sum": first.where(chosen, 0.0),
        }
        missing = torch.full((heads - rows_3SHQ.shape[2],), math.nan)
        padded = {name: torch.cat([of.sum((0, 2)), missing.to(of)]) for name, of in sums.items()}
        forward.chain_sums(number).add_values(depth, padded)


def fused_row_numbers(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, *, is_causal: bool
) -> torch.Tensor:
    """`row_numbers` of queries (S, H, Q, d), scaled, and keys (S, H, K, d), some queries at a time."""
    parts = []
    size = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for begin in range(0, q.shape[2], size):
        logits = q[:, :, begin : begin + size] @ k.mT
        if is_causal:
            position = torch.arange(begin, begin + logits.shape[2], device=logits.device)
            later = torch.arange(k.shape[2], device=logits.device) > position[:, None]
            logits = logits.masked_fill(later, -math.inf)
        if mask is not None:
            part = mask[..., begin : begin + size, :] if mask.shape[-2] > 1 else mask
            part = part[..., : k.shape[2]]  # padded to a multiple of 8 for the kernel
            logits = logits.masked_fill(~part, -math.inf) if part.dtype == torch.bool else logits + part
        parts.append(row_numbers(logits.softmax(-1), logits > MASKED))
    return torch.cat(parts, dim=-1)


def row_numbers(weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Entropy, number of keys and weight of the first key of each query, (3, S, H, Q) in float32.

    ``weights, seen``: (S, H, Q, K): attention weights, and whether a query may see a key.
    Returns: The entropy in nats, NaN where a query sees nothing or a weight is not finite.
    """
    weights = weights.float()
    keys = seen.sum(-1)
    # −∞ from 0 log 0 is 0: `xlogy` has that limit.
    entropy = -torch.xlogy(weights, weights).sum(-1)
    first = weights.gather(-1, seen.int().argmax(-1, keepdim=True)).squeeze(-1)
    nothing = (keys == 0) | ~entropy.isfinite()
    entropy, first = (of.masked_fill(nothing, math.nan) for of in (entropy, first))
    return torch.stack([entropy, keys.float(), first])
