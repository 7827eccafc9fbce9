"""What does a model predict, and how well? Its output by token, and the loss of the next token where that is proven.

Shapes: B sequence, T token, V entry of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.loss_graph import Loss
from depthscope.probes.model.tensors import mapped, tensors_in

Pick: TypeAlias = Callable[[Any], torch.Tensor]

FEWEST_KINDS = 3  # of ids; a tensor of fewer different numbers is taken for a mask


def output_values(output: Any, pick: Pick | None = None, *, batch_axis: int = 0) -> torch.Tensor:
    """The model's main output as (B, T, V), T = 1 where it has one vector a sequence.

    ``pick``: ``pick(output)`` returns the tensor; by default ``logits``, or the first floating tensor with two axes, or one.
    ``batch_axis``: axis of the sequences: 1 for a model that takes its tokens first.
    Returns: float32, or float64 where the output is.
    """
    found = pick(output) if pick is not None else _main_tensor(output)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.ndim < 1:
        raise CaptureError(
            "the output has no floating tensor with a batch axis to compare; pass logits=lambda output: …"
        )
    values = found.detach()
    return by_token(values if values.dtype == torch.float64 else values.float(), batch_axis)


def by_token(values: torch.Tensor, batch_axis: int) -> torch.Tensor:
    """An output as (B, T, V); T = 1 where it has other axes than these three."""
    if values.ndim == 3:
        return values.transpose(0, 1) if batch_axis == 1 else values
    return values.reshape(len(values), -1).unsqueeze(1)


def _main_tensor(output: Any) -> torch.Tensor | None:
    named = named_logits(output)
    if named is not None:
        return named
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.ndim]
    return next((t for t in tensors if t.ndim > 1), tensors[0] if tensors else None)


def named_logits(output: Any) -> torch.Tensor | None:
    """The field ``logits`` of an output, as transformers' models with a head return it."""
    value = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class Targets:
    """What the output is compared with.

    ``ids``: (B, T) token ids that the output is proven to predict one ahead; None where it does not.
    ``mask``: (B, T), true on real tokens.
    ``why``: why there is no next-token loss; empty where there is one.
    ``distribution``: whether the output is known to be logits, whose softmax means something.
    """

    ids: torch.Tensor | None
    mask: torch.Tensor | None
    why: str
    distribution: bool

    def next_token_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """−log p(next token), (B, T) in nats; NaN at the last token, on padding, and where there are no ids."""
        lost = logits.new_full(logits.shape[:2], torch.nan)
        if self.ids is None:
            return lost
        ids = self.ids.to(logits.device)
        # One sequence at a time: the probabilities of a batch over a large vocabulary would take gigabytes.
        for row in range(len(logits)):
            log_p = torch.log_softmax(logits[row, :-1], -1)
            lost[row, :-1] = -log_p.gather(-1, ids[row, 1:, None]).squeeze(-1)
        if self.mask is not None:
            real = self.mask.to(logits.device)
            lost[:, :-1][~(real[:, :-1] & real[:, 1:])] = torch.nan
            lost[:, -1] = torch.nan
        return lost


def find_targets(
    batch: Any,
    output: Any,
    logits: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    width: int,
    again: Callable[[Any], torch.Tensor],
    picked: bool = False,
) -> Targets:
    """Which ids of the batch does the output predict one ahead? Asked of the model, not of names.

    Ids are an integer tensor of the output's (B, T) whose numbers are below V. That the output predicts the next one is
    believed only where the model looks at no later token: the last ids are changed, and no earlier output may move.

    ``width``: D: an output that wide may be a state and no logits.
    ``again``: ``again(batch)`` runs the model and returns (B, T, V).
    """
    named = picked or named_logits(output) is not None
    size = logits.shape[-1]
    mask = mask if mask is not None and tuple(mask.shape) == tuple(logits.shape[:2]) else None
    if not named and (size == width or isinstance(output, Mapping)):
        return Targets(None, mask, "the output is not known to be logits: pass logits= or loss=", False)
    ids = _candidate_ids(batch, logits)
    if len(ids) != 1:
        found = "no tensor" if not ids else f"{len(ids)} tensors"
        why = f"{found} of the batch can be the ids of the {logits.shape[1]} tokens that the output predicts: pass loss="
        return Targets(None, mask, why, named)
    seen_ahead = _looks_ahead(batch, ids[0], logits, again)
    if seen_ahead:
        return Targets(None, mask, seen_ahead, named)
    return Targets(ids[0], mask, "", True)


def _candidate_ids(batch: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for tensor in tensors_in(batch):
        whole = not tensor.is_floating_point() and tensor.dtype not in (torch.bool, torch.uint8)
        if not whole or tuple(tensor.shape) != tuple(logits.shape[:2]) or tensor.shape[1] < 2:
            continue
        kinds = tensor.unique()
        # Labels mark padding by −100, masks have two numbers.
        fits = kinds.numel() >= FEWEST_KINDS and int(kinds[0]) >= 0 and int(kinds[-1]) < logits.shape[-1]
        # Labels without padding are the ids once more.
        if fits and not any(torch.equal(tensor, other) for other in found):
            found.append(tensor)
    # Numbers that go up by one are positions, where anything else can be what the model reads.
    positions = [tensor for tensor in found if bool((tensor.diff(dim=1) == 1).all())]
    vectors = any(tensor.is_floating_point() and tensor.ndim == 3 for tensor in tensors_in(batch))
    if positions and (vectors or len(found) > len(positions)):
        found = [tensor for tensor in found if not any(tensor is other for other in positions)]
    return found


SEES_LATER = "the model sees later tokens"


def sees_later_tokens(
    batch: Any, again: Callable[[Any], torch.Tensor], *, must_see_earlier: bool = False
) -> bool | None:
    """Whether earlier outputs move when the last ids of a batch are others.

    ``again``: ``again(batch)`` runs the model and returns (B, T, V).
    ``must_see_earlier``: whether a network of which no output sees another token counts as one of which it is not known.
    Returns: None where no tensor can be the ids.
    """
    logits = again(batch)
    ids = _candidate_ids(batch, logits)
    # Of inputs and targets that were cut from one text, the inputs are those that the others are one ahead of.
    ahead = [a for a in ids if any(torch.equal(b[:, :-1], a[:, 1:]) for b in ids)]
    known = ahead or ids
    if len(known) != 1:
        return None
    if _looks_ahead(batch, known[0], logits, again).startswith(SEES_LATER):
        return True
    if not must_see_earlier:
        return False
    other = known[0].clone()
    other[:, 0] = (other[:, 0] + 1) % logits.shape[-1]
    return False if bool((again(_with(batch, known[0], other)) != logits)[:, 1:].any()) else None


def _looks_ahead(
    batch: Any, ids: torch.Tensor, logits: torch.Tensor, again: Callable[[Any], torch.Tensor]
) -> str:
    """Why the output does not predict the next id; empty where there is no reason."""
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % logits.shape[-1]
    changed = again(_with(batch, ids, other))
    moved = (changed - logits).abs().amax(-1)  # (B, T)
    scale = float(logits.abs().amax())
    # A few roundings: another id may be routed to other experts, in another order of sums.
    limit = 1e-3 * scale
    if float(moved[:, :-1].max()) > limit:
        return f"{SEES_LATER}, so that its output is not a prediction of the next one: pass loss="
    if float(moved[:, -1].max()) == 0:
        return "the output at a token does not depend on that token's id: pass loss="
    return ""


def _with(batch: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """A batch with the ids exchanged, wherever the same ids are in it."""

    def exchanged(one: torch.Tensor) -> torch.Tensor:
        same = one.shape == old.shape and one.dtype == old.dtype and torch.equal(one, old)
        return new if same else one

    return mapped(batch, exchanged)


def divergence(base: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """KL(base ‖ changed) = Σ p log(p/q) of the softmax of two (B, T, V), (B, T) in nats."""
    found = base.new_empty(base.shape[:2])
    for row in range(len(base)):
        log_p, log_q = torch.log_softmax(base[row], -1), torch.log_softmax(changed[row], -1)
        # Never below zero but by rounding.
        found[row] = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    return found


def relative_change(base: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """‖changed − base‖ / ‖base‖ over the last axis, (B, T)."""
    scale = torch.linalg.vector_norm(base, dim=-1)
    change = torch.linalg.vector_norm(changed - base, dim=-1)
    return torch.where(scale > 0, change / scale.clamp_min(torch.finfo(base.dtype).tiny), torch.nan)


def user_loss(loss: Loss, output: Any, batch: Any, shape: tuple[int, int]) -> torch.Tensor:
    """What the user's loss gives, as (B, T) with T = 1 for one number a sequence, and B = 1 for one number in all."""
    value = loss(output, batch)
    value = value.detach().float() if isinstance(value, torch.Tensor) else torch.as_tensor(float(value))
    if value.ndim == 0:
        return value.reshape(1, 1)
    if value.ndim == 1 and value.shape[0] == shape[0]:
        return value.unsqueeze(1)
    if tuple(value.shape) == shape:
        return value
    raise CaptureError(
        f"loss= returned a tensor of shape {tuple(value.shape)}; expected one number for each of the {shape[0]} sequences, "
        f"for each of their {shape[1]} tokens, or one in all (which has no standard error)"
    )
