"""The calls of one forward: who called whom, which outputs became whose inputs, and where streams are connected."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probes.connections import Site, streams_of
from probes.hooks import first_float

RECENT = 8  # the first state is the output of one of this many calls before the chain


class ChainError(ValueError):
    """No chain of blocks was found, or the named layers do not form one."""


@dataclass(eq=False)
class Call:
    """One call of one module during a forward."""

    path: str
    module: nn.Module
    index: int
    order: int
    parent: Call | None
    x: torch.Tensor | None
    y: torch.Tensor | None = None
    x_shape: tuple[int, ...] = ()
    y_shape: tuple[int, ...] = ()
    producer: str = ""
    site: Site | None = None
    output: Any = None  # kept for connections only
    versions: tuple[int | None, int | None] = (None, None)
    branch: Call | None = None  # of a connection: the call whose output is its branch's
    runs: int = 0
    held: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Module path and call index within the forward."""
        return self.path, self.index

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
    """

    def __init__(self, keep: Collection[str] = ()):
        self.calls: list[Call] = []
        self._keep = frozenset(keep)
        self._stack: list[Call] = []
        self._segments: dict[tuple[str, Any], list[list[Call]]] = {}
        self._counts: dict[str, int] = {}
        self._recent: deque[Call] = deque()
        self._named: Call | None = None  # the last call of a named module, and the first one after it
        self._after: Call | None = None
        self._waiting: Call | None = None  # the last connection, while its branch may still come

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Call:
        """Note that a call begins."""
        x = first_float(args, kwargs)
        call = Call(
            path,
            module,
            self._counts.get(path, 0),
            len(self.calls),
            self._stack[-1] if self._stack else None,
            x,
        )
        call.x_shape = tuple(x.shape) if x is not None else ()
        call.producer = next((c.path for c in reversed(self._recent) if same_tensor(c.y, x)), "")
        self._counts[path] = call.index + 1
        if self._waiting is not None and self._waiting.x_shape == call.x_shape:
            self._waiting = None  # the streams are met again, so its branch has been
        self.calls.append(call)
        self._stack.append(call)
        self._note_follower(call)
        for key in _group_keys(call) if x is not None else ():
            self._link(key, call)
        return call

    def leave(self, module: nn.Module, output: Any) -> Call:
        """Note that the innermost open call ends."""
        call = self._stack.pop()
        if call.module is not module:
            raise ChainError(f"calls do not nest: {call.path} was open when {type(module).__name__} ended")
        call.y = first_float(output)
        call.y_shape = tuple(call.y.shape) if call.y is not None else ()
        call.site = streams_of(module, call.x, output)
        call.output = output if call.site is not None else None
        call.versions = version(call.x), version(call.y)
        self._note_branch(call)
        self._recent.append(call)
        if len(self._recent) > RECENT:
            self._release(self._recent.popleft())
        return call

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
        """The branch F is the connection's own child, or the last sibling after it that returns F's shape."""
        parent, waiting = call.parent, self._waiting
        if parent is not None and getattr(parent.module, "branch", None) is call.module:
            parent.branch, call.held = call, True
        elif (
            waiting is not None
            and waiting.site
            and parent is waiting.parent
            and call.y_shape == waiting.site.branch_shape
        ):
            if waiting.branch is not None:
                waiting.branch.held = False
                self._release(waiting.branch)
            waiting.branch, call.held = call, True
        if call.site is not None and call.branch is None:
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

    def _release(self, call: Call) -> None:
        """Let go of the tensors of a call that nothing needs any more."""
        needed = call.runs or call.held or call.site
        if not (needed or call.path in self._keep or call in self._recent or call in self._stack):
            call.x = call.y = None


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
