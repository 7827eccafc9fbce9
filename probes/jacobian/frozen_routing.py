"""How is a model differentiated with constant coefficients of its stream connections? They are replaced, and then checked.

    X' = H_res X + H_post ⊗ F(H_pre · X)

keeps its value, but its derivative is that of X and F only: Jᵀu = H_resᵀ u + H_preᵀ F'ᵀ (H_post · u).
Shapes: B batch, T token, N stream, V view (a branch input), D feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.coefficients import Parts, as_views, relative_error, tolerance
from depthscope.probes.connections.families import BY_NAME
from depthscope.probes.connections.family import ForwardFamily, PairedFamily, Site, StreamConnectionError
from depthscope.probes.connections.reading import (
    Opening,
    canonical_streams,
    forward_family,
    returned_watch,
    watched_read,
)
from depthscope.probes.model.hooks import replace_method
from depthscope.probes.model.tensors import first_float, floats_in, tensors_in
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Connection

INSTEAD = "take routing='full', or capture() the model, which reports whether its connections can be proven"
# Heuristic: the checks compare derivatives, which a backward through a block rounds more often than a forward.
ROUNDINGS = 3.0


@dataclass
class FrozenCall:
    """One call of a connection whose coefficients were replaced by constants.

    Parameters
    ----------
    site : Site
        What it is.
    x : Tensor
        The streams that it took, with their graph.
    read : Tensor
        (B, T, V, N): the weights that read ``branch_in``.
    branch_in : Tensor
        What the model's branch takes, as it was replaced.
    parts : Parts or None
        H_res and H_post, after the connection was closed.
    """

    site: Site
    x: torch.Tensor
    read: torch.Tensor
    branch_in: torch.Tensor
    parts: Parts | None


class FrozenRouting:
    """The connections between two depths that are frozen, and what was replaced of each during a forward.

    Parameters
    ----------
    session : Session
        One that has found its chains.
    start, stop : int
        Depths.
    """

    def __init__(self, session: Session, start: int, stop: int):
        self.session = session
        self.links = {
            number: link
            for number, link in enumerate(session.structure.connections)
            if start <= link.depth_in and link.depth_out <= stop
        }
        self.calls: dict[str, list[FrozenCall]] = {link.path: [] for link in self.links.values()}

    def call_of(self, number: int, link: Connection) -> FrozenCall:
        """What was replaced in one connection.

        Raises
        ------
        StreamConnectionError
            Where the connection did not run, or was not closed, so that its coefficients would be differentiated.
        """
        calls = self.calls[link.path]
        if link.index >= len(calls) or calls[link.index].parts is None:
            closed = sum(call.parts is not None for call in calls)
            raise StreamConnectionError(
                f"routing='frozen': H_pre, H_post and H_res of connection {number} ({link.path!r}, call {link.index}) were "
                f"not replaced by constants: {len(calls)} calls were seen and {closed} of them were closed, expected at least "
                f"{link.index + 1}; {INSTEAD}"
            )
        return calls[link.index]


@contextmanager
def constant_routing(session: Session, start: int, stop: int) -> Iterator[FrozenRouting]:
    """Replace H_pre, H_post and H_res of the connections between two depths by constants in the forwards made inside.

    Parameters
    ----------
    session : Session
        One that has found its chains.
    start, stop : int
        Depths; connection i joins the depths i and i + 1.

    Yields
    ------
    FrozenRouting
        For `require_frozen`, which must be called with the states of the forward.

    Raises
    ------
    StreamConnectionError
        Where the model has streams but no connection that is known, or a connection's coefficients cannot be read.
    """
    if session.structure.num_streams > 1 and not session.structure.connections:
        raise StreamConnectionError(
            f"routing='frozen' needs the stream connections, but none was found for {session.structure.num_streams} streams; "
            "take routing='full'"
        )
    modules = dict(session.model.named_modules(remove_duplicate=False))
    sites = {
        link.path: session.structure.sites[number]
        for number, link in enumerate(session.structure.connections)
    }
    routing = FrozenRouting(session, start, stop)
    with ExitStack() as stack:
        for path, calls in routing.calls.items():
            site = sites[path]
            if site.reads_features:
                raise StreamConnectionError(
                    f"{path!r} ({site.family}, layout {site.layout!r}) reads by gates per feature, which cannot be held "
                    "constant yet; take routing='full'"
                )
            freeze = _freeze_forward if isinstance(BY_NAME[site.style], ForwardFamily) else _freeze_paired
            freeze(stack, modules[path], site, calls)
        yield routing


# --- replacing


def _freeze_forward(stack: ExitStack, module: nn.Module, site: Site, calls: list[FrozenCall]) -> None:
    forward: Callable[..., Any] = module.forward

    def constant_forward(*args: Any, **kwargs: Any) -> Any:
        x = first_float(args, kwargs)
        assert x is not None
        with returned_watch(x, site) as watch:
            output = forward(*args, **kwargs)
        parts = forward_family(site).read(site, x.detach(), output, watch.floating).each(torch.Tensor.detach)
        if parts.read is None:
            every = torch.arange(len(parts.branch_in), device=x.device)
            read = watched_read(site, x.detach(), every, parts.branch_in.squeeze(2), watch.floating())
            if (
                read is None
            ):  # the least-squares weights would not be the module's own where streams are copies
                raise StreamConnectionError(
                    f"routing='frozen': {type(module).__name__} computes no {site.num_streams} read weights that explain its "
                    f"branch input; {INSTEAD}"
                )
            parts = replace(parts, read=read.unsqueeze(-2))
        output, branch_in = _with_constants(output, x, site, site.batch_size(x), parts, type(module).__name__)
        assert parts.read is not None
        calls.append(FrozenCall(site, x, parts.read, branch_in, parts))
        return output

    replace_method(stack, module, "forward", constant_forward)


def _freeze_paired(stack: ExitStack, module: nn.Module, site: Site, calls: list[FrozenCall]) -> None:
    family = BY_NAME[site.style]
    assert isinstance(family, PairedFamily)
    opens, closes = getattr(module, family.opens), getattr(module, family.closes)
    opened: list[tuple[Opening, FrozenCall]] = []

    def constant_opening(*args: Any, **kwargs: Any) -> Any:
        x = first_float(args, kwargs)
        assert x is not None
        opening = Opening(site, site.batch_size(x), x.detach())
        with opening.watch() as watch:
            result = opens(*args, **kwargs)
        opening.read(_detached(result), watch)
        parts = opening.parts
        assert parts is not None
        assert parts.read is not None
        result, branch_in = _with_constants(result, x, site, opening.batch_size, parts, type(module).__name__)
        call = FrozenCall(site, x, parts.read, branch_in, None)
        calls.append(call)
        opened.append((opening, call))
        return result

    def constant_closing(*args: Any, **kwargs: Any) -> Any:
        opening, call = opened.pop()
        branch_out = floats_in(args, kwargs)[family.branch_argument]
        watch = opening.closing_watch(branch_out)
        if (
            watch is None
        ):  # it computes no weights: with the constants of the opening method it is linear as it stands
            result = closes(*args, **kwargs)
            call.parts = opening.close(branch_out.detach(), result, None)
            return result
        with watch:
            result = closes(*args, **kwargs)
        call.parts = opening.close(branch_out.detach(), result, watch)
        return _with_linear_form(result, branch_out, call)

    replace_method(stack, module, family.opens, constant_opening)
    replace_method(stack, module, family.closes, constant_closing)


def _detached(value: Any) -> Any:
    return replaced(value, {id(tensor): tensor.detach() for tensor in tensors_in(value)})


def _with_constants(
    output: Any, x: torch.Tensor, site: Site, batch_size: int, parts: Parts, name: str
) -> tuple[Any, torch.Tensor]:
    """A connection's output with every weight detached, and with the branch input and mixed streams linear in x.

    Returns
    -------
    output : object
        Of the same values.
    branch_in : Tensor
        The branch input in it.
    """
    streams = canonical_streams(site, x, batch_size)
    assert parts.read is not None
    read = torch.einsum("btvn,btnd->btvd", parts.read.to(x.dtype), streams)
    changes: dict[int, torch.Tensor] = {}
    branch_in: torch.Tensor | None = None
    for tensor in tensors_in(output):
        if not tensor.is_floating_point():
            continue
        views = as_views(tensor, *read.shape)
        if views is not None and torch.equal(views, parts.branch_in):
            branch_in = _valued(_rearranged(read, lambda t: as_views(t, *read.shape), tensor), tensor)
            changes[id(tensor)] = branch_in
        else:
            changes[id(tensor)] = _mixed_or_detached(tensor, streams, site, parts.mix)
    if branch_in is None:
        raise StreamConnectionError(
            f"routing='frozen': {name} returns no branch input that its read weights explain; {INSTEAD}"
        )
    return replaced(output, changes), branch_in


def _mixed_or_detached(
    tensor: torch.Tensor, streams: torch.Tensor, site: Site, mix: torch.Tensor | None
) -> torch.Tensor:
    """One output of a connection: H_res X where it has that value, and a constant otherwise."""
    if tensor.numel() != streams.numel():
        return tensor.detach()

    def arrange(t: torch.Tensor) -> torch.Tensor:
        # streams of a merged layout may be returned split, which is the canonical order already
        return (
            t.reshape(streams.shape) if t.ndim == streams.ndim else canonical_streams(site, t, len(streams))
        )

    values = arrange(tensor.detach())
    for matrix in _orientations(mix, streams):
        mixed = matrix.to(streams.dtype) @ streams
        if relative_error(mixed - values, values) <= tolerance(streams.dtype):
            return _valued(_rearranged(mixed, arrange, tensor), tensor)
    return tensor.detach()


def _with_linear_form(output: Any, branch_out: torch.Tensor, call: FrozenCall) -> Any:
    """What a closing method returned, with the derivative of H_res X + H_post F."""
    assert call.parts is not None
    parts = call.parts
    batch_size, tokens, _, width = parts.branch_in.shape
    views = branch_out.reshape(batch_size, tokens, parts.write.shape[-1], width)
    streams = canonical_streams(call.site, call.x, batch_size)
    written = parts.write.to(branch_out.dtype) @ views
    state = next(tensors_in(output))

    def arrange(t: torch.Tensor) -> torch.Tensor:
        return canonical_streams(call.site, t, batch_size)

    candidates = [m.to(streams.dtype) @ streams + written for m in _orientations(parts.mix, streams)]
    path = min(candidates, key=lambda form: relative_error(form - arrange(state), arrange(state)))
    return replaced(output, {id(state): _valued(_rearranged(path, arrange, state), state)})


def _orientations(mix: torch.Tensor | None, streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """H_res in both orientations, since only its effect shows which one is applied."""
    if mix is None:
        return (torch.eye(streams.shape[2], device=streams.device),)
    return mix, mix.mT


def _valued(path: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of one and the derivative of the other, so that freezing moves no state."""
    return value.detach() + (path - path.detach())


def _rearranged(
    values: torch.Tensor, arrange: Callable[[torch.Tensor], torch.Tensor | None], like: torch.Tensor
) -> torch.Tensor:
    """The tensor t of the shape of ``like`` for which ``arrange(t)`` is ``values``; arrange only moves elements."""
    result = values.new_empty(like.shape)
    view = arrange(result)
    assert view is not None
    if view.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
        view.copy_(values)  # through the view into the result, which autograd follows
        return result
    # merged axes of a permuted tensor are a copy: their elements are moved by number
    numbers = arrange(torch.arange(like.numel(), device=like.device).reshape(like.shape))
    assert numbers is not None
    return result.flatten().scatter(0, numbers.flatten(), values.flatten()).reshape(like.shape)


def replaced(value: Any, changes: Mapping[int, torch.Tensor]) -> Any:
    """Nested tuples, lists, dicts and model outputs with some tensors exchanged.

    Parameters
    ----------
    value : object
        What a module takes or returns.
    changes : mapping of int to Tensor
        New tensors by the ``id`` of the old ones.

    Returns
    -------
    object
        A shallow copy; the containers that came are unchanged.
    """
    if isinstance(value, torch.Tensor):
        return changes.get(id(value), value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # a model output has its own class
        for name, item in value.items():
            changed[name] = replaced(item, changes)
        return changed
    if isinstance(value, (tuple, list)):
        items = [replaced(item, changes) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


# --- checking


def require_frozen(routing: FrozenRouting, states: Mapping[int, torch.Tensor]) -> None:
    """Refuse where the derivative of a connection is not that of its formula with constant coefficients.

    A model may use other tensors than those that its connection returned: an attribute, the fused tensor of which they are
    slices, or the same weights computed again. Their values agree, so nothing but the derivative shows it. With the branch
    input b = H_pre · X as a tensor of the graph, and a random cotangent u at X', the total derivatives must satisfy

        ∂X'/∂X · u = H_resᵀ u + H_preᵀ (∂X'/∂b · u)        (coefficients do not depend on X)
        ∂X'/∂b · u = 0   for u ⟂ H_post                    (b acts through H_post ⊗ F(b) alone)

    and, for u ⟂ H_post, the derivative by the first state must be that through X alone (no weights of an earlier depth).
    A gate on all of H_post at once that is computed from b outside of the connection is the one case that passes.

    Parameters
    ----------
    routing : FrozenRouting
        Of `constant_routing`.
    states : mapping of int to Tensor
        The states of the forward by depth, with the graph between them.

    Raises
    ------
    StreamConnectionError
        With the first connection that was not frozen, and by how much its derivative differs.
    """
    generator = torch.Generator().manual_seed(0)
    later: list[torch.Tensor] = []
    earlier: list[torch.Tensor] = []
    cotangents: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, link in routing.links.items():
        call, x, x_next = routing.call_of(number, link), states[link.depth_in], states[link.depth_out]
        check = _DerivativeCheck(call, x, x_next, generator)
        if not check.error <= check.limit:
            raise StreamConnectionError(_not_frozen(number, link, check.error, check.limit))
        later.append(x_next)
        earlier.append(x)
        cotangents.append((check.cotangent, check.carried))
    if not later:
        return
    # All connections at once, with independent cotangents: two backwards in place of two for each pair of depths.
    first = states[min(states)]
    total = _gradient(later, [first], [u for u, _ in cotangents])[0]
    through = _gradient(earlier, [first], [v for _, v in cotangents])[0]
    limit = ROUNDINGS * tolerance(first.dtype)
    error = _finite_error(total, through)
    if not error <= limit:
        number, link = next(iter(routing.links.items()))
        raise StreamConnectionError(_not_frozen(number, link, error, limit, "it or a later one"))


def _not_frozen(number: int, link: Connection, error: float, limit: float, which: str = "it") -> str:
    return (
        f"routing='frozen': connection {number} ({link.path!r}) returned H_pre, H_post and H_res and they were replaced by "
        f"constants, but the derivative of the next state differs from that of H_res X + H_post ⊗ F(H_pre X) by {error:.1e} "
        f"(limit {limit:.0e}): {which} is applied with other tensors than those returned, such as an attribute, slices of one "
        f"fused tensor, or weights that are computed again; {INSTEAD}"
    )


class _DerivativeCheck:
    """The first two equations of `require_frozen` for one connection.

    Attributes
    ----------
    error, limit : float
        The larger of both relative errors, and up to which it is rounding.
    cotangent, carried : Tensor
        u ⟂ H_post at X' and H_resᵀ u at X, in the layouts of the states.
    """

    def __init__(
        self, call: FrozenCall, x: torch.Tensor, x_next: torch.Tensor, generator: torch.Generator
    ) -> None:
        self._call, self._x, self._x_next = call, x, x_next
        assert call.parts is not None
        write, streams = call.parts.write.double(), self._canonical(x)
        batch_size, tokens, _, width = streams.shape
        self._views = (batch_size, tokens, call.read.shape[-2], width)
        any_u = torch.randn(streams.shape, generator=generator, dtype=torch.float64).to(x.device)
        flat_u = any_u - write @ (torch.linalg.pinv(write) @ any_u)  # ⟂ H_post for every token and feature
        by_x, by_branch = self._derivatives(any_u)
        _, by_branch_flat = self._derivatives(flat_u)
        read = torch.einsum("btvn,btvd->btnd", call.read.double(), by_branch)
        errors = {}
        for matrix in _orientations(call.parts.mix, streams):
            errors[_finite_error(by_x, matrix.double().mT @ any_u + read)] = matrix.double()
        best = min(errors)
        leak = _finite_norm(by_branch_flat) / max(_finite_norm(by_branch), torch.finfo(torch.float64).tiny)
        self.error = max(best, leak)
        self.limit = ROUNDINGS * tolerance(x.dtype)
        self.cotangent = self._as_state(flat_u, x_next)
        self.carried = self._as_state(errors[best].mT @ flat_u, x)

    def _canonical(self, state: torch.Tensor) -> torch.Tensor:
        assert self._call.parts is not None
        return canonical_streams(self._call.site, state.detach(), self._call.parts.branch_in.shape[0])

    def _as_state(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return _rearranged(values, self._canonical, like).to(like.dtype)

    def _derivatives(self, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By X, (B, T, N, D), and by the branch input, (B, T, V, D)."""
        at = self._as_state(cotangent, self._x_next)
        by_x, by_branch = _gradient([self._x_next], [self._x, self._call.branch_in], [at])
        views = as_views(by_branch, *self._views)
        assert views is not None
        return self._canonical(by_x).double(), views.double()


def _gradient(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], cotangents: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Total derivatives; zero where nothing links."""
    found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def _finite_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error over finite entries: padding may have no finite gradient. NaN where nothing is finite."""
    finite = value.isfinite() & expected.isfinite()
    if not finite.any():
        return float("nan")
    return relative_error(value[finite] - expected[finite], expected[finite])


def _finite_norm(value: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value[value.isfinite()].double()))
