"""The calls of one forward: which module called which, whose output became whose input, where streams are connected."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.detection import past_states, returned_site
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import PairedFamily, Site
from depthscope.probes.dataflow.trace import Trace
from depthscope.probes.dataflow.values import NONE, Value
from depthscope.probes.model.arguments import named_arguments
from depthscope.probes.model.tensors import floats_in, version
from depthscope.probes.reading.graph import TracedValue, ValuePlace
from depthscope.probes.reading.recorder import GraphRecorder
from depthscope.probes.structure.chain import HookPoint

# Three bounds on what a tape stores; heuristics of ours, which every tested family meets.
LEVELS = 3  # how deep inside a block its branches are looked for
RECENT = 8  # the producer of a tensor is one of this many calls that ended last
# An earlier state of a depth history was passed to one of so many calls that began last.
PAST_CALLS = 4 * RECENT

FORWARD = "forward"

Key = tuple[str, str, int]


class ChainError(InputError):
    """No chain of blocks was found, or the named layers do not form one."""


class SeveralStatesError(ChainError):
    """The blocks hand on several tensors of one shape, which may be streams."""


@dataclass(frozen=True)
class PassedTensor:
    """One of several tensors that a call took or returned."""

    tensor: torch.Tensor | None  # None when it was released
    version: int | None
    name: str = ""
    value: Value | None = None  # in the trace of the forward
    shape: tuple[int, ...] = ()


class Call:
    """One call of one module, or of a method that opens or closes a connection, during a forward.

    Parameters
    ----------
    path, module
        The module.
    index : int
        Among the calls of this method of the module.
    order : int
        Among all calls, by their beginning.
    parent : Call or None
        The call during which this one happened.
    x : Tensor or None
        The first floating tensor that it took.
    method : str
        Of the module.
    """

    # No dataclass: there is a call for every module, and what most of them do not have costs nothing here.
    y: torch.Tensor | None = None  # the first floating tensor that it returned
    x_shape: tuple[int, ...] = ()  # the shapes stay when the tensors are released
    y_shape: tuple[int, ...] = ()
    x_address: int = 0  # in memory
    y_address: int = 0
    producer: str = ""  # path of the call that returned x
    site: Site | None = None
    output: Any = None  # of returned connections only
    versions: tuple[int | None, int | None] = (None, None)  # of x when the call began, of y when it ended
    inputs: tuple[PassedTensor, ...] = ()  # all floating tensors, where there is more than one
    outputs: tuple[PassedTensor, ...] = ()
    branch: Call | None = None  # of a connection: the call whose output is its branch's
    closing: Call | None = None  # of an opening method: the call of the closing one
    parts: Parts | None = None  # of a closing method
    copy: torch.Tensor | None = None  # of a closing method: its output, which the model may rewrite in place
    # Of a depth-history connection: the call that shows its newest past state, and at which side.
    past: tuple[Call, str] | None = None
    children: tuple[Call, ...] = ()
    branch_sums: Any = None  # of a block: how its branches are added, where that was requested
    level: int = 0
    values: tuple[Value | None, Value | None] = (None, None)  # of x and y, in the trace of the forward
    # Numbers of the values of the floating tensors that it took and returned, in the recorded graph.
    taken: Sequence[int] = ()
    given: Sequence[int] = ()
    # Why the tensors of an ended call are still needed; see `Tape._release`.
    runs: int = 0  # by so many runs of linked calls
    pinned: bool = False  # as an end of a chain, a branch, or a connection
    inside_block: bool = False  # by the search inside the block around it

    def __init__(
        self,
        path: str,
        module: nn.Module,
        index: int,
        order: int,
        parent: Call | None,
        x: torch.Tensor | None,
        method: str = FORWARD,
    ):
        self.path = path
        self.module = module
        self.index = index
        self.order = order
        self.parent = parent
        self.x = x
        self.method = method

    @property
    def key(self) -> Key:
        """Module path, method and call index within the forward."""
        return self.path, self.method, self.index

    @property
    def value(self) -> torch.Tensor | None:
        """The output as it was when the call ended."""
        return self.y if self.copy is None else self.copy

    def passed(self, at: str, item: int) -> tuple[torch.Tensor | None, int | None]:
        """A tensor that it took (``"input"``) or returned (``"output"``), and the tensor's version at that time."""
        if item:
            several = (self.inputs if at == "input" else self.outputs)[item : item + 1]
            return (several[0].tensor, several[0].version) if several else (None, None)
        return (self.x, self.versions[0]) if at == "input" else (self.y, self.versions[1])

    def shown(self) -> Iterator[tuple[str, int, Value]]:
        """The values that its tensors held: at which side, which of the tensors there, the value."""
        for at, several, value in (
            ("input", self.inputs, self.values[0]),
            ("output", self.outputs, self.values[1]),
        ):
            if several:
                yield from (
                    (at, item, passed.value)
                    for item, passed in enumerate(several)
                    if passed.value is not None
                )
            elif value is not None:
                yield at, 0, value

    def value_of(self, at: str, item: int) -> Value | None:
        """The value that one of its tensors held in the trace."""
        several = self.inputs if at == "input" else self.outputs
        if several:
            return several[item].value if item < len(several) else None
        return self.values[0 if at == "input" else 1]

    def number_of(self, at: str, item: int) -> int | None:
        """The number, in the recorded graph, of the value that one of its tensors held."""
        numbers = self.taken if at == "input" else self.given
        return numbers[item] if item < len(numbers) else None

    def ancestors(self) -> Iterator[Call]:
        """The calls during which this one happened, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    def inside(self, other: Call) -> bool:
        """Whether this call happened during the other one."""
        return any(call is other for call in self.ancestors())


class Tape:
    """The calls of one forward.

    A tape of all tensors would keep every activation of the model at once, also where the user computes without a graph. So
    the tensors of an ended call are released as soon as nothing can need them: the runs of calls that link output to input
    (a chain may be one of them), the modules that the user named, and the connections keep theirs.

    Parameters
    ----------
    keep : collection of str
        Module paths whose tensors are stored in any case.
    on_block : callable, optional
        Called with every call that ends with the shape that it began with, while its children's tensors are there.
    """

    def __init__(self, keep: Collection[str] = (), on_block: Callable[[Call], Any] | None = None):
        self.attention: Any = None  # what watches it, of the session
        self.logits: Any = None  # what watches these, of the session
        self.calls: list[Call] = []
        self._by_key: dict[Key, Call] = {}
        # Of `find_chains`, which asks again and again: parameters and their sizes by module, and the size of the trunk.
        self.parameter_sizes: dict[int, dict[int, int]] = {}
        self._keep = frozenset(keep)
        self._on_block = on_block
        self._stack: list[Call] = []
        self._runs: dict[tuple[str, Any], list[list[Call]]] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._connected = False
        self._recent: deque[Call] = deque()
        self._named: Call | None = None  # the last call of a named module, and the first one after it
        self._after: Call | None = None
        self.split = False  # whether some call took a part of a tensor that is split over processes
        self.recorder: GraphRecorder | None = None  # of the same forward
        self.met: set[int] = set()  # numbers of the values in it that something took
        self.twins: dict[int, Value] = {}  # values of the trace by the numbers of those in the recorded graph
        self.trace: Trace | None = None  # what was computed from what, while the model's own forward runs
        self.unreadable: ValueError | None = None  # why the weights of a known connection cannot be read
        self.ran: Any = None  # the parameters that ran; see `ran_parameters`
        self._waiting: Call | None = None  # the last returned connection, while its branch may still come

    @property
    def searches_blocks(self) -> bool:
        """Whether it looks into blocks when they end."""
        return self._on_block is not None

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Call:
        """Note that a call begins."""
        tensors = floats_in(args, kwargs)
        call = self._begin(path, module, FORWARD, tensors[0] if tensors else None)
        if len(tensors) > 1:
            call.inputs = self._passed(tensors, _parameter_names(module, args, kwargs))
        past = past_states(args, kwargs, call.x) if len(args) + len(kwargs) > 1 else None
        if past is not None:
            call.past, call.pinned = self._source(past[-1]), True
        self._stack.append(call)
        if self._keep:
            self._note_follower(call)
        if call.x is not None and not self._connected:
            for key in _group_keys(call):
                self._append_to_run(key, call)
        return call

    def leave(self, module: nn.Module, output: Any) -> Call:
        """Note that the innermost open call ends."""
        call = self._stack.pop()
        if call.module is not module:
            raise ChainError(f"calls do not nest: {call.path} was open when {type(module).__name__} ended")
        tensors = floats_in(output)
        self._end(call, tensors[0] if tensors else None)
        if len(tensors) > 1:
            call.outputs = self._passed(tensors, [""] * len(tensors))
        if self.trace is not None:
            self.trace.call = call.parent.order if call.parent is not None else NONE
        call.site = returned_site(module, call.x, output)
        if call.site is not None:
            call.output = output
            self._note_connection(call)
        self._note_branch(call)
        # What has no parts and lies outside of all numbered blocks may be the norm after the last state.
        if call.x_shape == call.y_shape and not module._modules and not re.search(r"\d", call.path):
            call.pinned = True
        if self._on_block is not None:
            self._search_inside(call, self._on_block)
        self._recent.append(call)
        if len(self._recent) > RECENT:
            self._release(self._recent.popleft())
        return call

    def opened(self, path: str, module: nn.Module, method: str, x: torch.Tensor, site: Site) -> Call:
        """Note that a method opened a connection."""
        call = self._begin(path, module, method, x)
        call.site, call.pinned = site, True
        call.versions = version(x), None
        self._note_connection(call)
        return call

    def closed(
        self, opening: Call, method: str, branch_out: torch.Tensor, output: torch.Tensor, parts: Parts
    ) -> Call:
        """Note that a method closed a connection."""
        call = self._begin(opening.path, opening.module, method, branch_out)
        self._end(call, output)
        call.pinned, call.parts = True, parts
        family = None if opening.site is None else BY_NAME[opening.site.style]
        if isinstance(family, PairedFamily) and family.rewrites_output:
            # Models with AltUp add per-layer embeddings to this very tensor.
            call.copy = output.detach().clone()
        opening.closing = call
        opening.branch = next((c for c in reversed(self._recent) if same_tensor(c.y, branch_out)), None)
        return call

    def _begin(self, path: str, module: nn.Module, method: str, x: torch.Tensor | None) -> Call:
        key = path, method
        index = self._counts.get(key, 0)
        parent = self._stack[-1] if self._stack else None
        call = Call(path, module, index, len(self.calls), parent, x, method)
        if x is not None:
            self._note_input(call, x)
        call.level = len(self._stack)
        if self.trace is not None:
            if method == FORWARD:
                self.trace.call = call.order
            call.values = self.trace.taken(x), None
        self._counts[key] = index + 1
        if self._waiting is not None and self._waiting.x_shape == call.x_shape:
            self._waiting = None  # the next call takes the streams again, so the branch has ended
        self.calls.append(call)
        return call

    def _note_input(self, call: Call, x: torch.Tensor) -> None:
        call.x_shape, call.x_address = tuple(x.shape), _address(x)
        call.versions = version(x), None
        if type(x) is not torch.Tensor:  # a plain one has no such attribute, and looking for it takes long
            placements = getattr(x, "placements", None)
            self.split = self.split or (
                placements is not None and not all(each.is_replicate() for each in placements)
            )
        # The call that ended last: of a container and its last module, which return one tensor, the container.
        for earlier in reversed(self._recent):
            if _returned(earlier, call):
                call.producer = earlier.path
                break

    def _end(self, call: Call, y: torch.Tensor | None) -> None:
        if y is None:
            return
        call.y = y
        call.y_shape = tuple(y.shape)
        call.y_address = _address(y)
        call.versions = call.versions[0], version(y)
        if self.trace is not None:
            call.values = call.values[0], self.trace.value(y)

    def _source(self, tensor: torch.Tensor) -> tuple[Call, str] | None:
        """Which recent call took or returned a tensor, and at which side; the call is pinned."""
        began_last = reversed(self.calls[-PAST_CALLS:])
        for call in [*reversed(self._recent), *reversed(self._stack), *began_last]:
            at = "output" if same_tensor(call.y, tensor) else "input" if same_tensor(call.x, tensor) else None
            if at is not None:
                call.pinned = True
                return call, at
        return None

    def counts(self) -> dict[tuple[str, str], int]:
        """How often each method of each module was called, by module path and method."""
        return dict(self._counts)

    def by_key(self) -> dict[Key, Call]:
        """All calls by their keys; made anew where calls came since."""
        if len(self._by_key) != len(self.calls):
            self._by_key = {(call.path, call.method, call.index): call for call in self.calls}
        return self._by_key

    def recorded(self, point: HookPoint) -> TracedValue | None:
        """The value in the recorded graph that a hook point showed."""
        if self.recorder is None:
            return None
        graph = self.recorder.graph
        if point.at == "operation":
            place = ValuePlace(point.path, point.index, point.operation, point.item, point.result)
            return graph.at(place)
        number = self.by_key()[point.path, point.method, point.index].number_of(point.at, point.item)
        return None if number is None else graph.values[number]

    def place_of(self, value: Value) -> ValuePlace:
        """Where the recorded graph has a value of the trace."""
        assert self.recorder is not None
        number = next(number for number, twin in sorted(self.twins.items()) if twin is value)
        return self.recorder.graph.place(self.recorder.graph.values[number])

    def linked_runs(self) -> Iterator[tuple[tuple[str, Any], list[Call]]]:
        """All runs of two or more linked calls, with the key of their group."""
        for key, runs in self._runs.items():
            for run in runs:
                if len(run) > 1:
                    yield key, run

    def follower(self, named: Call) -> Call | None:
        """The first call after the last named block that takes a state of its shape."""
        return self._after if named is self._named else None

    def connection_calls(self) -> list[Call]:
        """The outermost calls of stream connections, in order."""
        found: list[Call] = []
        for call in self.calls:
            if call.site is not None and not any(call.inside(other) for other in found):
                found.append(call)
        return found

    def _note_connection(self, call: Call) -> None:
        """A connection is met: the blocks around it may show the last state, and runs of plain calls are not needed."""
        for ancestor in call.ancestors():
            ancestor.pinned = True
        if self._connected:
            return
        self._connected = True
        linked = [call for runs in self._runs.values() for run in runs for call in run]
        self._runs = {}
        for other in linked:
            other.runs = 0
            self._release(other)

    def _search_inside(self, call: Call, search: Callable[[Call], Any]) -> None:
        """Search how a block adds its branches, while its children's tensors are there.

        Where it turns out to be no block, as a wrapper around one, the children are passed on to the call around it.
        """
        if call.x_shape == call.y_shape and call.children:
            call.branch_sums = search(call)
        for step in call.branch_sums or ():
            for used in (*step.branches, *([] if step.seen is None else [step.seen])):
                used.pinned = True
        parent = call.parent
        outermost = call.branch_sums and parent is not None and parent.x_shape != call.x_shape
        passed_on = (call,) if outermost else (call, *call.children)
        near = [c for c in passed_on if parent is not None and c.level - parent.level <= LEVELS]
        if parent is not None:
            parent.children = (*parent.children, *near)
        for inner in near:
            inner.inside_block = True
        for inner in call.children:
            if inner not in near:
                inner.inside_block = False
                self._release(inner)
        call.children = ()

    def _note_follower(self, call: Call) -> None:
        """Pin the first call after a named block that takes its shape: it may show the state after that block."""
        named, after = self._named, self._after
        if call.path in self._keep:
            if after is not None:
                after.pinned = False
                self._release(after)
            self._named, self._after = call, None
        elif (
            named is not None and after is None and named not in self._stack and named.x_shape == call.x_shape
        ):
            self._after, call.pinned = call, True

    def _note_branch(self, call: Call) -> None:
        """The branch F is the last sibling after a returned connection that returns F's shape: its dropout, not its MLP."""
        waiting = self._waiting
        if (
            waiting is not None
            and waiting.site
            and call.parent is waiting.parent
            and call.y_shape == waiting.site.branch_shape
        ):
            if waiting.branch is not None:
                waiting.branch.pinned = False
                self._release(waiting.branch)
            waiting.branch, call.pinned = call, True
        if call.site is not None:
            self._waiting = call

    def _append_to_run(self, key: tuple[str, Any], call: Call) -> None:
        """Append a call to its group's last run where that run's last output is its input, or begin a run with it."""
        call.runs += 1
        runs = self._runs.setdefault(key, [])
        previous = runs[-1][-1] if runs else None
        if previous is not None and _returned(previous, call):
            runs[-1].append(call)
            return
        if previous is not None and len(runs[-1]) == 1:
            runs.pop()  # a run of one call links nothing
            previous.runs -= 1
            self._release(previous)
        runs.append([call])

    def _release(self, call: Call) -> None:
        """Drop the tensors of a call that nothing needs any more."""
        needed = call.runs or call.pinned or call.inside_block or call.site
        if not (needed or call.path in self._keep or call in self._recent or call in self._stack):
            call.x = call.y = None
            # What they held stays known: a value is no tensor.
            if call.inputs:
                call.inputs = tuple([replace(passed, tensor=None) for passed in call.inputs])
            if call.outputs:
                call.outputs = tuple([replace(passed, tensor=None) for passed in call.outputs])

    def _passed(self, tensors: list[torch.Tensor], names: list[str]) -> tuple[PassedTensor, ...]:
        value = self.trace.taken if self.trace is not None else lambda tensor: None
        return tuple(
            PassedTensor(tensor, version(tensor), name, value(tensor), tuple(tensor.shape))
            for tensor, name in zip(tensors, names, strict=True)
        )


def _parameter_names(module: nn.Module, args: Any, kwargs: Any) -> list[str]:
    """The forward's parameters that the floating tensors belong to; numbered where one has several."""
    by_parameter = {name: floats_in(value) for name, value in named_arguments(module, args, kwargs).items()}
    names: list[str] = []
    for tensor in floats_in(args, kwargs):
        name, tensors = next(
            ((n, those) for n, those in by_parameter.items() if any(t is tensor for t in those)),
            ("track", [tensor]),
        )
        number = next(i for i, t in enumerate(tensors) if t is tensor)
        names.append(f"{name}{number}" if len(tensors) > 1 or name == "track" else name)
    return names


def _returned(earlier: Call, call: Call) -> bool:
    """Whether an earlier call returned what a call took; by what is noted of both first, since it is asked very often."""
    y, x = earlier.y, call.x
    if y is x:
        return x is not None
    return (
        (earlier.y_address == call.x_address or not earlier.y_address or not call.x_address)
        and earlier.y_shape == call.x_shape
        and same_tensor(y, x)
    )


def _address(tensor: torch.Tensor) -> int:
    """Where a plain tensor begins in memory; 0 where that is not known, as of one that stands for another."""
    return tensor.data_ptr() if type(tensor) is torch.Tensor and tensor.layout is torch.strided else 0


def is_norm(module: nn.Module) -> bool:
    """Whether a module's class calls itself a norm: models write their own RMSNorm, which is no class of torch's."""
    return _names_a_norm(type(module).__name__)


@cache
def _names_a_norm(kind: str) -> bool:
    return "norm" in kind.lower()


def _group_keys(call: Call) -> list[tuple[str, Any]]:
    """The two groups of a call: its class (outermost only) and the numbered container that it is in."""
    keys: list[tuple[str, Any]] = []
    kind, ancestor = type(call.module), call.parent
    while ancestor is not None and type(ancestor.module) is not kind:
        ancestor = ancestor.parent
    if ancestor is None:
        keys.append(("class", kind))
    if call.path[-1:].isdigit():
        container, _, last = call.path.rpartition(".")
        if last.isdigit():
            keys.append(("container", container))
    return keys


def same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are one object, or views of the same memory in the same shape.

    A checkpoint, a wrapper or ``x.view(…)`` between two blocks makes another Python object of one tensor.
    """
    if a is None or b is None:
        return False
    if a is b:
        return True
    # Meta tensors have no memory, and neither have empty ones: their addresses are all zero.
    if a.dtype != b.dtype or a.is_meta or b.is_meta or a.shape != b.shape or a.device != b.device:
        return False
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.numel() > 0


def same_values(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are one, or equal in every element."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return same_tensor(a, b) or bool(torch.equal(a.detach(), b.detach()))
