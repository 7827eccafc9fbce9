"""The calls of one forward: who called whom, which outputs became whose inputs, and where streams are connected."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.detection import past_states, returned_site
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import PairedFamily, Site
from depthscope.probes.model.arguments import arguments
from depthscope.probes.model.hooks import first_float, floats_in

LEVELS = 3  # how deep below a block its branches are looked for
RECENT = 8  # the first state is the output of one of this many calls before the chain
FORWARD = "forward"

Key = tuple[str, str, int]


class ChainError(ValueError):
    """No chain of blocks was found, or the named layers do not form one."""


@dataclass(frozen=True)
class Passed:
    """One of several tensors that a call took or gave."""

    tensor: torch.Tensor
    version: int | None
    name: str = ""


@dataclass(eq=False)
class Call:
    """One call of one module, or of a method that opens or closes a connection, during a forward."""

    path: str
    module: nn.Module
    index: int
    order: int
    parent: Call | None
    x: torch.Tensor | None
    method: str = FORWARD
    y: torch.Tensor | None = None
    x_shape: tuple[int, ...] = ()
    y_shape: tuple[int, ...] = ()
    producer: str = ""
    site: Site | None = None
    output: Any = None  # kept for returned connections only
    versions: tuple[int | None, int | None] = (None, None)
    inputs: tuple[Passed, ...] = ()  # all floating tensors, where there is more than one
    outputs: tuple[Passed, ...] = ()
    branch: Call | None = None  # of a returned connection: the call whose output is its branch's
    closing: Call | None = None  # of an opening method: the call of the closing one
    parts: Parts | None = None  # of a closing method
    copy: torch.Tensor | None = None  # what a closing method gave, which the model may rewrite in place
    past: tuple[Call, str] | None = (
        None  # of a depth-history connection: where its newest past state was seen
    )
    children: list[Call] = field(default_factory=list)
    adds: Any = None  # of a block: how its branches are added, where that was asked for
    level: int = 0
    runs: int = 0
    held: bool = False
    inner: bool = False  # kept for the block around it

    @property
    def key(self) -> Key:
        """Module path, method and call index within the forward."""
        return self.path, self.method, self.index

    @property
    def value(self) -> torch.Tensor | None:
        """The output as it was when the call ended."""
        return self.y if self.copy is None else self.copy

    def seen(self, at: str, item: int) -> tuple[torch.Tensor | None, int | None]:
        """One of the tensors that it took (``"input"``) or gave (``"output"``), and how often that was written by then."""
        if item:
            held = (self.inputs if at == "input" else self.outputs)[item : item + 1]
            return (held[0].tensor, held[0].version) if held else (None, None)
        return (self.x, self.versions[0]) if at == "input" else (self.y, self.versions[1])

    def inside(self, other: Call) -> bool:
        """Whether this call happened during the other one."""
        call = self.parent
        while call is not None and call is not other:
            call = call.parent
        return call is other


class Tape:
    """The calls of one forward; tensors are kept only where calls link, are named, or connect streams.

    Parameters
    ----------
    keep : collection of str
        Module paths whose tensors are kept in any case.
    on_block : callable, optional
        Called with every call that ends with the shape that it began with, while its children's tensors are there.
    """

    def __init__(self, keep: Collection[str] = (), on_block: Any = None):
        self.calls: list[Call] = []
        self._keep = frozenset(keep)
        self._on_block = on_block
        self._stack: list[Call] = []
        self._segments: dict[tuple[str, Any], list[list[Call]]] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._connected = False
        self._recent: deque[Call] = deque()
        self._named: Call | None = None  # the last call of a named module, and the first one after it
        self._after: Call | None = None
        self._waiting: Call | None = None  # the last connection, while its branch may still come

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Call:
        """Note that a call begins."""
        call = self._begin(path, module, FORWARD, first_float(args, kwargs))
        call.inputs = _several(floats_in(args, kwargs), lambda: _names(module, args, kwargs))
        past = past_states(args, kwargs, call.x)
        if past is not None:
            call.past, call.held = self._seen_at(past[-1]), True
        self._stack.append(call)
        self._note_follower(call)
        for key in _group_keys(call) if call.x is not None and not self._connected else ():
            self._link(key, call)
        return call

    def leave(self, module: nn.Module, output: Any) -> Call:
        """Note that the innermost open call ends."""
        call = self._stack.pop()
        if call.module is not module:
            raise ChainError(f"calls do not nest: {call.path} was open when {type(module).__name__} ended")
        self._end(call, first_float(output))
        call.outputs = _several(floats_in(output))
        call.site = returned_site(module, call.x, output)
        call.output = output if call.site is not None else None
        self._note_branch(call)
        self._hold_ends(call)
        if self._on_block is not None:
            self._look_inside(call)
        self._recent.append(call)
        if len(self._recent) > RECENT:
            self._release(self._recent.popleft())
        return call

    def opened(self, path: str, module: nn.Module, method: str, x: torch.Tensor, site: Site) -> Call:
        """Note that a method opened a connection."""
        call = self._begin(path, module, method, x)
        call.site, call.held = site, True
        self._forget_runs()
        call.versions = version(x), None
        for ancestor in _ancestors(call):
            ancestor.held = True
        return call

    def closed(
        self, opening: Call, method: str, branch_out: torch.Tensor, output: torch.Tensor, parts: Parts
    ) -> Call:
        """Note that a method closed a connection."""
        call = self._begin(opening.path, opening.module, method, branch_out)
        self._end(call, output)
        call.held, call.parts = True, parts
        family = None if opening.site is None else BY_NAME[opening.site.style]
        if isinstance(family, PairedFamily) and family.rewrites_output:
            call.copy = output.detach().clone()
        opening.closing = call
        opening.branch = next((c for c in reversed(self._recent) if same_tensor(c.y, branch_out)), None)
        return call

    def _begin(self, path: str, module: nn.Module, method: str, x: torch.Tensor | None) -> Call:
        index = self._counts.get((path, method), 0)
        parent = self._stack[-1] if self._stack else None
        call = Call(path, module, index, len(self.calls), parent, x, method)
        call.x_shape = tuple(x.shape) if x is not None else ()
        call.versions = version(x), None
        call.level = len(self._stack)
        call.producer = next((c.path for c in reversed(self._recent) if same_tensor(c.y, x)), "")
        self._counts[path, method] = index + 1
        if self._waiting is not None and self._waiting.x_shape == call.x_shape:
            self._waiting = None  # the streams are met again, so its branch has been
        self.calls.append(call)
        return call

    def _end(self, call: Call, y: torch.Tensor | None) -> None:
        call.y = y
        call.y_shape = tuple(y.shape) if y is not None else ()
        call.versions = call.versions[0], version(y)

    def _seen_at(self, tensor: torch.Tensor) -> tuple[Call, str] | None:
        """Which recent call took or gave a tensor; the call is held."""
        for call in [*reversed(self._recent), *reversed(self._stack), *reversed(self.calls[-4 * RECENT :])]:
            at = "output" if same_tensor(call.y, tensor) else "input" if same_tensor(call.x, tensor) else None
            if at is not None:
                call.held = True
                return call, at
        return None

    def segments(self) -> Iterable[tuple[tuple[str, Any], list[Call]]]:
        """All runs of two or more linked calls, with the key of their group."""
        for key, runs in self._segments.items():
            for run in runs:
                if len(run) > 1:
                    yield key, run

    def follower(self, named: Call) -> Call | None:
        """The first call after the last named block that takes a state of its shape."""
        return self._after if named is self._named else None

    def connections(self) -> list[Call]:
        """The outermost calls of stream connections, in order."""
        found: list[Call] = []
        for call in self.calls:
            if call.site is not None and not any(call.inside(other) for other in found):
                found.append(call)
        return found

    def _hold_ends(self, call: Call) -> None:
        """Keep what may be the last state of a chain with streams, or the state behind its last norm."""
        if call.site is not None:
            self._forget_runs()
            for ancestor in _ancestors(call):
                ancestor.held = True
        if is_norm(call.module) and call.x_shape == call.y_shape and not re.search(r"\d", call.path):
            call.held = True

    def _look_inside(self, call: Call) -> None:
        """Find how a block adds its branches while its children's tensors are there; hand them up where it is no block."""
        if call.x_shape == call.y_shape and call.children:
            call.adds = self._on_block(call)
        for add in call.adds or ():
            for used in (*add.branches, *([] if add.seen is None else [add.seen])):
                used.held = True
        parent = call.parent
        whole = (
            call.adds and parent is not None and parent.x_shape != call.x_shape
        )  # no block around this one
        kept = [call] if whole else [call, *call.children]
        near = [c for c in kept if parent is not None and c.level - parent.level <= LEVELS]
        if parent is not None:
            parent.children.extend(near)
        for inner in near:
            inner.inner = True
        for inner in call.children:
            if inner not in near:
                inner.inner = False
                self._release(inner)
        call.children = []

    def _note_follower(self, call: Call) -> None:
        """The first call after a named block that takes its shape may show the state behind it."""
        named, after = self._named, self._after
        if call.path in self._keep:
            if after is not None:
                after.held = False
                self._release(after)
            self._named, self._after = call, None
        elif (
            named is not None and after is None and named not in self._stack and named.x_shape == call.x_shape
        ):
            self._after, call.held = call, True

    def _note_branch(self, call: Call) -> None:
        """The branch F is the last sibling after a returned connection that returns F's shape."""
        parent, waiting = call.parent, self._waiting
        if (
            waiting is not None
            and waiting.site
            and parent is waiting.parent
            and call.y_shape == waiting.site.branch_shape
        ):
            if waiting.branch is not None:
                waiting.branch.held = False
                self._release(waiting.branch)
            waiting.branch, call.held = call, True
        if call.site is not None:
            self._waiting = call

    def _link(self, key: tuple[str, Any], call: Call) -> None:
        call.runs += 1
        runs = self._segments.setdefault(key, [])
        previous = runs[-1][-1] if runs else None
        if previous is not None and same_tensor(previous.y, call.x):
            runs[-1].append(call)
            return
        if previous is not None and len(runs[-1]) == 1:
            runs.pop()
            previous.runs -= 1
            self._release(previous)
        runs.append([call])

    def _forget_runs(self) -> None:
        """A model with connections is read by them: what links without them need not be kept."""
        if self._connected:
            return
        self._connected = True
        calls = [call for runs in self._segments.values() for run in runs for call in run]
        self._segments = {}
        for call in calls:
            call.runs = 0
            self._release(call)

    def _release(self, call: Call) -> None:
        """Let go of the tensors of a call that nothing needs any more."""
        needed = call.runs or call.held or call.inner or call.site
        if not (needed or call.path in self._keep or call in self._recent or call in self._stack):
            call.x = call.y = None
            call.inputs = call.outputs = ()


def _several(tensors: list[torch.Tensor], names: Callable[[], list[str]] | None = None) -> tuple[Passed, ...]:
    if len(tensors) < 2:
        return ()
    named = names() if names is not None else [""] * len(tensors)
    return tuple(Passed(tensor, version(tensor), name) for tensor, name in zip(tensors, named, strict=True))


def _names(module: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """The forward's parameters that hold the floating tensors; numbered where one holds several."""
    known = {name: floats_in(value) for name, value in arguments(module, args, kwargs).items()}
    names: list[str] = []
    for tensor in floats_in(args, kwargs):
        name, held = next(
            ((n, held) for n, held in known.items() if any(t is tensor for t in held)), ("track", [tensor])
        )
        number = next(i for i, t in enumerate(held) if t is tensor)
        names.append(f"{name}{number}" if len(held) > 1 or name == "track" else name)
    return names


def _ancestors(call: Call) -> Iterable[Call]:
    above = call.parent
    while above is not None:
        yield above
        above = above.parent


def final_norm(tape: Tape, last: Key, shape: tuple[int, ...]) -> Call | None:
    """The norm that takes the last state of a chain, or what its streams are collapsed to.

    Parameters
    ----------
    tape : Tape
        The calls.
    last : key
        The call that shows the last state.
    shape : tuple of int
        Shape of that state.

    Returns
    -------
    Call or None
    """
    ends = next(call for call in tape.calls if call.key == last)
    sites = [call.site for call in tape.connections() if call.site is not None]
    merged = (
        sites[0].num_streams // sites[0].fractions if sites else 1
    )  # streams that are collapsed before the norm
    for call in tape.calls:
        after = call.order > ends.order and not call.inside(ends)
        if not after or call.y is None or not is_norm(call.module) or call.x_shape != call.y_shape:
            continue
        one = math.prod(call.x_shape) * merged == math.prod(shape)
        if one and (merged > 1 or same_state(call.x, ends.value) or same_state(call.x, ends.x)):
            return call
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module's class calls itself a norm."""
    return "norm" in type(module).__name__.lower()


def _group_keys(call: Call) -> list[tuple[str, Any]]:
    """The two groups of a call: its class (outermost only) and the numbered container that holds it."""
    keys: list[tuple[str, Any]] = []
    ancestor = call.parent
    while ancestor is not None and type(ancestor.module) is not type(call.module):
        ancestor = ancestor.parent
    if ancestor is None:
        keys.append(("class", type(call.module)))
    container, _, last = call.path.rpartition(".")
    if last.isdigit():
        keys.append(("container", container))
    return keys


def version(tensor: torch.Tensor | None) -> int | None:
    """How often a tensor was written in place; None where torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are one object, or show the same memory in the same shape."""
    if a is None or b is None:
        return False
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.is_meta or b.is_meta:
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.numel() > 0


def same_state(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are one, or hold the same values."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return same_tensor(a, b) or bool(torch.equal(a.detach(), b.detach()))
