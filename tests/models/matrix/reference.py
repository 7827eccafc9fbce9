"""What do plain hooks see? An independent record of a forward and its backward, without any code of `probes`.

Hooks of torch on every module note, at the moment of the call, the tensors that go in and come out, and their gradients.
Blocks are the children of one container that hand one tensor of one shape on. Two more forwards, with another number of
sequences and another number of tokens, tell which axis of a state is which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tests.models.families import floats

NEAR = 0.3
"""Cosine above which a tensor counts as a changed copy of another one; heuristic, where unrelated ones have about 0."""
MOST_BYTES = 1_500_000_000
"""Of the copies of one forward's tensors."""


@dataclass(eq=False)
class Seen:
    """One tensor as it was when a module took or gave it, and the gradient that arrived at it."""

    value: torch.Tensor
    gradient: torch.Tensor | None = None

    def has_elements_of(self, other: Seen) -> bool:
        """Whether another tensor is this one, or has its elements elsewhere."""
        one, two = self.value, other.value
        if one.shape == two.shape and torch.equal(one, two):
            return True
        return one.numel() == two.numel() and torch.equal(
            one.flatten().sort().values, two.flatten().sort().values
        )


@dataclass(eq=False)
class Call:
    """One call of a module: where it is, inside which call, and what it took and gave."""

    path: str
    module: nn.Module
    number: int
    parent: Call | None
    taken: list[Seen] = field(default_factory=list)
    given: list[Seen] = field(default_factory=list)

    def inside(self) -> Iterable[Call]:
        """The calls around this one, the nearest first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


def states_in(value: Any) -> list[torch.Tensor]:
    """Floating tensors of two axes or more in arguments or outputs, in their order."""
    return [tensor for tensor in floats(value) if tensor.ndim >= 2]


class Recorder:
    """Notes every call of a module while its hooks are on.

    Parameters
    ----------
    gradients : bool
        Whether the gradients that arrive are noted.
    copies : bool
        Whether values are kept; without, tensors of the same shape on no device stand for them.
    """

    def __init__(self, *, gradients: bool, copies: bool):
        self.gradients, self.copies = gradients, copies
        self.calls: list[Call] = []
        self._open: list[Call] = []
        self._bytes = 0

    def hooks(self, model: nn.Module) -> ExitStack:
        """Hooks on every module, until the stack is closed."""
        stack = ExitStack()
        for path, module in model.named_modules():
            enter = partial(self._enter, path)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(self._leave).remove)
        return stack

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(path, module, len(self.calls), self._open[-1] if self._open else None)
        call.taken = [self._note(t) for t in states_in((args, kwargs))]
        self.calls.append(call)
        self._open.append(call)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop().given = [self._note(t) for t in states_in(output)]

    def _note(self, tensor: torch.Tensor) -> Seen:
        if not self.copies:
            return Seen(tensor.detach().to("meta"))
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes > MOST_BYTES:
            raise MemoryError("the copies of the forward's tensors exceed their bound")
        seen = Seen(tensor.detach().clone())
        if self.gradients and tensor.requires_grad:
            tensor.register_hook(lambda gradient: setattr(seen, "gradient", gradient.detach().clone()))
        return seen


def calls_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    copies: bool = True,
) -> list[Call]:
    """Every call of a module in one forward, with gradients where there is a loss.

    Parameters
    ----------
    model : Module
    batch : mapping
        Keywords.
    loss : callable, optional
        ``loss(output, batch)``; without it there is no backward.
    copies : bool
        As of `Recorder`.
    """
    recorder = Recorder(gradients=loss is not None, copies=copies)
    with recorder.hooks(model), torch.set_grad_enabled(loss is not None):
        output = model(**batch)
    if loss is not None:
        loss(output, batch).backward()
        model.zero_grad(set_to_none=True)
    return recorder.calls


def listening(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with floating leaves that carry gradients; masks excepted, which would change the attention's kernel."""
    return {
        name: value.detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "mask" not in name
        else value
        for name, value in batch.items()
    }


# --- blocks ---


@dataclass(eq=False)
class Group:
    """Calls of one container's children, or of one module again and again, in one call of what is around them."""

    container: str
    calls: list[Call]

    @property
    def paths(self) -> list[str]:
        return [call.path for call in self.calls]

    def states(self) -> list[tuple[str, bool, Seen]]:
        """(path, taken, tensor): what goes into and comes out of the blocks; what has the same elements counts once."""
        found: list[tuple[str, bool, Seen]] = []
        for call in self.calls:
            sides = [(call.path, True, of) for of in call.taken[:1]] + [
                (call.path, False, of) for of in call.given[:1]
            ]
            for path, taken, seen in sides:
                if not found or not found[-1][2].has_elements_of(seen):
                    found.append((path, taken, seen))
        return found


def parts_with_weights(module: nn.Module) -> int:
    """Number of modules inside that hold weights themselves."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def groups(model: nn.Module, calls: list[Call]) -> list[Group]:
    """All groups of calls that hand a state on, outer and inner."""
    modules = dict(model.named_modules())
    found: dict[tuple[str, int], list[Call]] = defaultdict(list)
    for call in calls:
        container = call.path.rpartition(".")[0]
        around = -1 if call.parent is None else call.parent.number
        if call.path and isinstance(modules[container], (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            found[container, around].append(call)
        elif call.path:
            found[call.path, around].append(call)
    blocks = {key: _without_ends(members) for key, members in found.items()}
    return [
        Group(container, members)
        for (container, _), members in blocks.items()
        if len(members) >= 2 and _hand_on(members)
    ]


def _without_ends(calls: list[Call]) -> list[Call]:
    """Without what comes before the first block and after the last one: what a stem takes and a head gives is no state."""
    blocks = [number for number, call in enumerate(calls) if parts_with_weights(call.module) >= 3]
    return calls[blocks[0] : blocks[-1] + 1] if blocks else []


def _hand_on(calls: list[Call]) -> bool:
    """Whether most of the calls are blocks: of several weighted parts, with an output shaped as their input."""
    blocks = [
        call
        for call in calls
        if call.taken
        and call.given
        and parts_with_weights(call.module) >= 3
        and call.taken[0].value.shape == call.given[0].value.shape
    ]
    pairs = [_linked(before.given[0], after.taken[0]) for before, after in pairwise(blocks)]
    return len(blocks) >= 2 and 2 * len(blocks) > len(calls) and 2 * sum(pairs) >= len(pairs)


def _linked(given: Seen, taken: Seen) -> bool:
    """Whether a block takes what the one before it gave, or something near to it: a model may scale or add in between."""
    if given.value.shape != taken.value.shape:
        return False  # the next stage
    return bool(
        torch.cosine_similarity(given.value.flatten().double(), taken.value.flatten().double(), dim=0) > NEAR
    )


def outermost(found: list[Group]) -> list[Group]:
    """Groups that are not inside of a block of another one."""
    blocks = {call for group in found for call in group.calls}
    return [group for group in found if not any(around in blocks for around in group.calls[0].inside())]


# --- axes ---


def axes_of(
    first: list[Call], sequences: int, more_sequences: list[Call] | None, more_tokens: list[Call] | None
) -> dict[tuple[str, int, bool], str]:
    """(path, how often called before, taken) → letters of the first tensor's axes.

    B has a place for every sequence, P has several for each (packed: its places are tokens, of all sequences one behind the
    other), T grows with the number of tokens, D is unchanged, ? is unknown.
    """
    base = _shapes(first)
    batch, token = (_shapes(calls) if calls else {} for calls in (more_sequences, more_tokens))
    letters = {}
    for key, shape in base.items():
        word = []
        for axis, size in enumerate(shape):
            moved = [
                len(other.get(key, ())) == len(shape) and other[key][axis] != size for other in (batch, token)
            ]
            word.append(_letter(size, sequences, *moved))
        letters[key] = "".join(word)
    return letters


def _letter(size: int, sequences: int, with_sequences: bool, with_tokens: bool) -> str:
    if with_sequences:
        return "P" if with_tokens or size != sequences else "B"
    return "T" if with_tokens else "D"


def _shapes(calls: list[Call]) -> dict[tuple[str, int, bool], tuple[int, ...]]:
    times: dict[str, int] = defaultdict(int)
    found = {}
    for call in calls:
        for taken, tensors in ((True, call.taken), (False, call.given)):
            if tensors:
                found[call.path, times[call.path], taken] = tuple(tensors[0].value.shape)
        times[call.path] += 1
    return found


# --- is the state all that is handed on? ---


def bypassed(model: nn.Module, batch: Mapping[str, Any], group: Group) -> bool | None:
    """Whether the last state depends on the first one although the state between them was cut off.

    A plain residual chain hands nothing on but its state. None where it cannot be told: no gradient, or blocks that are one
    module, in which no single call can be cut.
    """
    if len(group.calls) < 3 or len(set(group.paths)) < len(group.paths):
        return None
    start: list[torch.Tensor] = []
    end: list[torch.Tensor] = []
    first, middle, last = group.calls[0], group.calls[len(group.calls) // 2 - 1], group.calls[-1]

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        start.extend(states_in((args, kwargs))[:1])

    def give(module: nn.Module, args: Any, output: Any) -> None:
        end.extend(states_in(output)[:1])

    with ExitStack() as stack:
        stack.callback(first.module.register_forward_pre_hook(take, with_kwargs=True).remove)
        stack.callback(middle.module.register_forward_hook(lambda module, args, output: cut(output)).remove)
        stack.callback(last.module.register_forward_hook(give).remove)
        model(**batch)
    if not (start and end and start[0].requires_grad):
        return None
    if not end[0].requires_grad:
        return False
    weight = torch.linspace(-1, 1, end[0].numel()).view_as(end[0])
    (gradient,) = torch.autograd.grad((end[0] * weight).sum(), start, allow_unused=True)
    return gradient is not None and bool(gradient.abs().max() > 0)


def cut(output: Any) -> Any:
    """A block's output whose state, its first tensor, carries no gradient on."""
    state = states_in(output)[:1]

    def without(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach() if any(value is each for each in state) else value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(without, value))
        return type(value)(map(without, value)) if type(value) in (tuple, list) else value

    return without(output)
