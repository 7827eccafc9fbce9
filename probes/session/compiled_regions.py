"""Which parts of a model run compiled, and how is a measured call of one run? By a graph of ours, of the user's compiler.

In a measured step what `torch.compile` made is passed by: the hooks around a compiled module run as they are, and its forward
runs in a graph of ours that the same compiler makes from the same code, in which two operations more hand out what is
measured (`graph_ops`). Between measured steps the user's own graphs run. Blocks of one class with the same places share one
graph, as they share the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from depthscope.probes.model.errors import CaptureError
from depthscope.probes.model.hooks import restore_entry, without_frames
from depthscope.probes.model.modules import module_paths
from depthscope.probes.session.graph_ops import CallInRegion, PlaceInRegion, insert, noting, without_ticket

COMPILED_CALL = "_compiled_call_impl"  # where `Module.compile` keeps what runs in place of the module's call
COMPILED_FROM = "_torchdynamo_orig_callable"  # on functions that `torch.compile` made


@dataclass(frozen=True)
class Wanted:
    """What a graph of ours hands out in one call of a region."""

    places: tuple[PlaceInRegion, ...]
    operations: tuple[tuple[CallInRegion, tuple[Any, ...]], ...]  # of the calls that have places


@dataclass(eq=False)
class Region:
    """A module whose forward runs compiled.

    ``holder, name``: the module, and the name of its attribute, whose compiled function leads to it.
    ``context``: of torch's compiler, as the user called it.
    """

    path: str
    module: nn.Module
    holder: nn.Module
    name: str
    context: Any

    @property
    def paths(self) -> dict[int, str]:
        """Of the modules inside, by identity."""
        return {id(module): path for path, module in module_paths(self.module) if path}

    def contains(self, path: str) -> bool:
        """Whether a path of the model is that of a module inside, or of the compiled one itself."""
        return path == self.path or self.is_above(path)

    def is_above(self, path: str) -> bool:
        """Whether a module inside has a path of the model."""
        return path != self.path and (not self.path or path.startswith(f"{self.path}."))

    def inner(self, path: str) -> str:
        """A path of the model as one from the compiled module on."""
        return path[len(self.path) :].lstrip(".")


def is_compiled(module: nn.Module) -> bool:
    """Whether the call of a module runs compiled."""
    if vars(module).get(COMPILED_CALL) is not None or COMPILED_FROM in vars(module):
        return True
    # From the dictionaries: to ask a class of TorchScript's, or a property of the user's, would run code of theirs.
    places = (vars(module), *(vars(kind) for kind in type(module).__mro__))
    forward = next((place["forward"] for place in places if "forward" in place), None)
    return COMPILED_FROM in getattr(getattr(forward, "__func__", forward), "__dict__", ())


def regions_of(model: nn.Module, callers: list[nn.Module]) -> list[Region]:
    """The outermost compiled parts of a model.

    ``callers``: the modules that the user may call, of which compiled ones may contain the model.
    Raises CaptureError: Where one is compiled in a way that cannot be passed by.
    """
    around = [caller for caller in callers if caller is not model and is_compiled(caller)]
    if around:
        (outer,) = around if len(around) == 1 else (None,)
        if outer is None or _inside_of_wrappers(outer)[0] is not model or is_compiled(model):
            raise CaptureError("the model is a part of what was compiled")
        return [_region("", model, outer)]
    found: list[Region] = []
    for path, module in module_paths(model):
        if is_compiled(module) and not any(region.contains(path) for region in found):
            found.append(_region(path, module, module))
    return found


def _inside_of_wrappers(module: nn.Module, path: str = "") -> tuple[nn.Module, str]:
    """The module inside of wrappers of torch's compiler and of data parallelism, and its path."""
    while True:
        is_parallel = isinstance(module, nn.parallel.DistributedDataParallel)
        name = "module" if is_parallel else "_orig_mod"
        if name not in module._modules:
            return module, path
        module, path = module._modules[name], f"{path}.{name}".lstrip(".")


def _region(path: str, module: nn.Module, compiled: nn.Module) -> Region:
    """The region that a compiled module leads to; ``path``: of the module in the model."""
    is_wrapper = "_orig_mod" in compiled._modules
    name = COMPILED_CALL if vars(compiled).get(COMPILED_CALL) is not None else "forward"
    if compiled is module:
        module, path = _inside_of_wrappers(module, path)
    if is_compiled(module) and module is not compiled:
        raise CaptureError("a module was compiled twice")
    context = vars(compiled).get("dynamo_ctx") if is_wrapper else _context_of(vars(compiled).get(name))
    if context is None or ("forward" in vars(module) and not (module is compiled and name == "forward")):
        raise CaptureError(
            f"{path or 'the model'} has a forward of its own, or was compiled by its class; compile the module: "
            "torch.compile(module) or module.compile()"
        )
    if any(hasattr(inner, "_get_fsdp_state") for inner in module.modules() if inner is not module):
        raise CaptureError(
            f"{path or 'the model'} is compiled as a whole, with modules inside of it that gather their weights "
            "(fully_shard); compile these, such as each block"
        )
    return Region(path, module, compiled, name, context)


def _context_of(function: Any) -> Any:
    """With what settings a function was compiled; torch keeps them in its closure alone."""
    code = getattr(function, "__code__", None)
    if code is None or "self" not in code.co_freevars:
        return None
    found = function.__closure__[code.co_freevars.index("self")].cell_contents
    return found if hasattr(found, "callback") else None


def fuses(region: Region) -> bool:
    """Whether what compiles a part is torch's inductor, which fuses operations."""
    return getattr(_backend_of(region.context), "compiler_name", "") == "inductor"


def _backend_of(context: Any) -> Any:
    return torch._dynamo.eval_frame.innermost_backend(context.callback)


def _call(module: nn.Module, args: Any, kwargs: Any, ticket: torch.Tensor) -> Any:
    """What is compiled: the user's forward, and a sign by which the graph tells its ticket."""
    torch.ops.depthscope.take(ticket, ticket, -1)
    return type(module).forward(module, *args, **kwargs)


@dataclass(eq=False)
class CompiledGraph:
    """A forward compiled by the user's compiler, with what it hands out.

    ``context``: of torch's compiler, as the user called it.
    ``wanted``: none for the user's code alone.
    """

    context: Any
    wanted: Wanted | None
    error: str = ""  # why nothing is handed out
    listened: set[int] = field(default_factory=set)  # places whose values have a gradient
    num_compiled: int = 0  # how often a graph was
    _region: Region | None = None
    _graphs: int = 0  # in which the forward that is compiled came
    _function: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        # A code of its own: torch keeps compiled code, and counts how often it compiled, by the code of a function.
        own = FunctionType(_call.__code__.replace(co_firstlineno=1), globals(), "call_of_a_measured_step")
        self._function = torch.compile(own, backend=self._compile, dynamic=self.context._dynamic)

    def _compile(self, graph_module: Any, inputs: Any) -> Any:
        """The user's compiler, on a graph that hands out what is wanted."""
        backend = _backend_of(self.context)
        self._graphs += 1
        self.num_compiled += 1
        try:
            if self.wanted is None or self._region is None or self.error:
                without_ticket(graph_module)
            elif self._graphs > 1:
                raise CaptureError(
                    "its forward is compiled in several parts, between which Python runs (graph breaks)"
                )
            else:
                insert(graph_module, self.wanted.places, dict(self.wanted.operations), self._region.paths)
        except Exception as error:
            self.error = str(without_frames(error)) or type(error).__name__
            without_ticket(graph_module)
        with noting(self.listened):
            return backend(graph_module, inputs)

    def is_for(self, context: Any) -> bool:
        """Whether the user compiles a module in the same way."""
        own = self.context
        return own._dynamic == context._dynamic and bool(_backend_of(own) == _backend_of(context))

    def run(self, region: Region, args: Any, kwargs: Any, ticket: torch.Tensor) -> Any:
        """Run the forward of a region; None with an `error` where the compiler refused what is handed out."""
        self._region, self._graphs = region, 0
        try:
            return self._function(region.module, args, kwargs, ticket)
        except torch._dynamo.exc.TorchDynamoException as error:
            if self.wanted is None:
                raise  # as without us
            self.error = f"it could not be compiled: {str(error).partition(chr(10))[0]}"
            return None
        finally:
            self._region = None


class Passages:
    """The ways around what was compiled, while they are open.

    ``is_measured``: whether a call that begins is to be measured; others run as the user compiled them.
    ``run``: ``run(region, args, kwargs)`` in place of the compiled module's forward.
    ``unseen``: makes a context without the modes of ours, in which the user's compiled code runs.
    """

    def __init__(
        self,
        regions: list[Region],
        is_measured: Callable[[], bool],
        run: Callable[[Region, Any, Any], Any],
        unseen: Callable[[], AbstractContextManager[Any]],
    ):
        self._regions, self._is_measured, self._run, self._unseen = regions, is_measured, run, unseen
        self._entries: list[tuple[nn.Module, str, Any]] = []
        self._functions: dict[tuple[int, str], Any] = {}  # of ours, by holder and attribute

    def open(self) -> None:
        """Pass by the compiled functions.

        Raises CaptureError: Where another probe does so already: the one that leaves first would restore what it found.
        """
        if any(isinstance(vars(region.holder)[region.name], partial) for region in self._regions):
            raise CaptureError(
                "another recorder measures the same compiled model in this step; let them measure different ones"
            )
        for region in self._regions:
            holder, name, inside = region.holder, region.name, partial(self._inside, region)
            is_forward = holder is region.module and name == "forward"
            around = holder._call_impl if name == COMPILED_CALL else holder._modules.get("_orig_mod")
            self._put(
                holder, name, partial(self._enter, vars(holder)[name], inside if is_forward else around)
            )
            if not is_forward:
                self._put(region.module, "forward", inside)

    def _put(self, holder: nn.Module, name: str, function: Any) -> None:
        self._entries.append((holder, name, vars(holder).get(name)))
        self._functions[id(holder), name] = vars(holder)[name] = function

    def close(self) -> None:
        """Restore them."""
        while self._entries:
            restore_entry(*self._entries.pop())

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The user's attributes: compiled code looks at some of them, and is compiled anew where one is another."""
        entries = list(self._entries)
        self.close()
        try:
            yield
        finally:
            for holder, name, _ in entries:
                self._put(holder, name, self._functions[id(holder), name])

    def _enter(self, own: Any, measured: Any, *args: Any, **kwargs: Any) -> Any:
        """The call of what is compiled: the user's own function, or what runs in its place where it is measured."""
        if self._is_measured():
            return measured(*args, **kwargs)
        with self._as_it_was(), self._unseen():
            return own(*args, **kwargs)

    def _inside(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        return self._run(region, args, kwargs)
