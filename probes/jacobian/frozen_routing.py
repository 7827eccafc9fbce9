"""How are the coefficients of stream connections held constant in a forward? Each is replaced by its value.

    X' = H_res X + H_post ⊗ F(H_pre · X)

keeps its value, but its derivative is that of X and F only: Jᵀu = H_resᵀ u + H_preᵀ F'ᵀ (H_post · u).
Shapes: B batch, T token, N stream, V view (a branch input), D feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
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
from depthscope.probes.connections.tensor_watch import Watch
from depthscope.probes.model.hooks import replace_method
from depthscope.probes.model.tensors import first_float, floats_in, tensors_in
from depthscope.probes.session.session import Session
from depthscope.probes.structure.chain import Connection

INSTEAD = "take routing='full', or capture() the model, which reports whether its connections can be proven"


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
        # The precision that the states are multiplied in: autocast's, where it is on, and not the dtype of the streams.
        self.precision = session.observer.precision
        # Connections outside of start … stop are not between the two states, and nothing differentiates them.
        self.links = {
            number: link
            for number, link in enumerate(session.structure.connections)
            if start <= link.depth_in and link.depth_out <= stop
        }
        # By module: one that several blocks share is called several times, and `Connection.index` counts its calls.
        self.calls: dict[str, list[FrozenCall]] = {link.path: [] for link in self.links.values()}

    def call_of(self, number: int, link: Connection) -> FrozenCall:
        """What was replaced in one connection.

        Raises StreamConnectionError: Where the connection did not run, or was not closed, so that its coefficients
        would be differentiated.
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

    ``start, stop``: depths; connection i joins the depths i and i + 1.
    Yields: For `depthscope.probes.jacobian.derivative_check.require_frozen`, which must be called with the states of
    the forward.
    Raises StreamConnectionError: Where the model has streams but no connection that is known, or a connection's
    coefficients cannot be read.
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
    family, name = forward_family(site), type(module).__name__

    def constant_forward(*args: Any, **kwargs: Any) -> Any:
        x = first_float(args, kwargs)
        assert x is not None
        generic = _generic_run(forward, args, kwargs, x, lambda other: returned_watch(other, site))
        with returned_watch(x, site) as watch:
            output = forward(*args, **kwargs)
        # Every sequence is differentiated, so none is left out of the sample.
        seen, every = watch.floating(), torch.arange(site.batch_size(x), device=x.device)

        def reads_matrix(candidate: torch.Tensor) -> bool:
            return _succeeds(lambda: family.read(site, generic.x, generic.result, lambda: [candidate]))

        matrices = _tensors_that_explain(seen, generic.seen, reads_matrix, name)
        parts = family.read(site, x.detach(), _detached(output), lambda: matrices)
        if parts.read is None:
            at = family.read(site, generic.x, generic.result, lambda: generic.seen).branch_in.squeeze(2)

            def reads_branch(candidate: torch.Tensor) -> bool:
                return watched_read(site, generic.x, every, at, [candidate]) is not None

            vectors = _tensors_that_explain(seen, generic.seen, reads_branch, name)
            read = watched_read(site, x.detach(), every, parts.branch_in.squeeze(2), vectors)
            if read is None:  # least-squares weights would not be the module's own where streams are copies
                raise StreamConnectionError(
                    f"routing='frozen': {name} computes no {site.num_streams} read weights that explain its branch input; "
                    f"{INSTEAD}"
                )
            parts = replace(parts, read=read.unsqueeze(-2))
        output, branch_in = _with_constants(output, x, site, site.batch_size(x), parts, name)
        assert parts.read is not None
        calls.append(FrozenCall(site, x, parts.read, branch_in, parts))
        return output

    replace_method(stack, module, "forward", constant_forward)


def _freeze_paired(stack: ExitStack, module: nn.Module, site: Site, calls: list[FrozenCall]) -> None:
    family, name = BY_NAME[site.style], type(module).__name__
    assert isinstance(family, PairedFamily)
    opens, closes = getattr(module, family.opens), getattr(module, family.closes)
    opened: list[tuple[Opening, FrozenCall]] = []

    def constant_opening(*args: Any, **kwargs: Any) -> Any:
        x = first_float(args, kwargs)
        assert x is not None
        batch_size = site.batch_size(x)
        generic = _generic_run(opens, args, kwargs, x, lambda other: family.watch(site, other))
        with family.watch(site, x) as watch:
            result = opens(*args, **kwargs)

        def reads(candidate: torch.Tensor) -> bool:
            result = generic.result
            return _succeeds(lambda: family.read(site, batch_size, generic.x, result, [candidate], None))

        seen = _tensors_that_explain(watch.floating(), generic.seen, reads, name)
        parts = family.read(site, batch_size, x.detach(), _detached(result), seen, None)
        assert parts.read is not None
        result, branch_in = _with_constants(result, x, site, batch_size, parts, name)
        call = FrozenCall(site, x, parts.read, branch_in, None)
        calls.append(call)
        opened.append((Opening(site, batch_size, x.detach(), parts=parts), call))
        return result

    def constant_closing(*args: Any, **kwargs: Any) -> Any:
        opening, call = opened.pop()  # the last one that was opened is closed first
        branch_out = floats_in(args, kwargs)[family.branch_argument]
        watch = opening.closing_watch(branch_out)
        with watch or nullcontext():
            result = closes(*args, **kwargs)
        call.parts = opening.close(branch_out.detach(), result, watch)
        # a method that computes no weights is linear as it stands, with the constants of the opening method
        return result if watch is None else _with_linear_form(result, branch_out, call)

    replace_method(stack, module, family.opens, constant_opening)
    replace_method(stack, module, family.closes, constant_closing)


@dataclass
class _GenericRun:
    """A connection at streams that are no copies of one another: what it took, returned and computed."""

    x: torch.Tensor
    result: Any
    seen: list[torch.Tensor]


def _generic_run(
    method: Callable[..., Any],
    args: Any,
    kwargs: Any,
    x: torch.Tensor,
    watch_of: Callable[[torch.Tensor], Watch],
) -> _GenericRun:
    """Run a connection's method once at perturbed streams.

    Models begin with equal streams, and there any weights of the same sum explain the output, H_post as well as H_pre. At
    generic streams only the weights that are applied do. This run comes before the real one, which thus has the last word
    where the module stores something.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    scale = torch.linalg.vector_norm(x.detach().float()) / x.numel() ** 0.5
    other = x.detach() + (noise.to(x.device) * scale).to(x.dtype)
    args, kwargs = replaced((args, kwargs), {id(x): other})
    devices = [x.device] if x.device.type == "cuda" else []
    # the model's own random numbers, of dropout for one, must come as without this run
    with torch.random.fork_rng(devices=devices), torch.no_grad(), watch_of(other) as watch:
        result = method(*args, **kwargs)
    return _GenericRun(other, result, watch.floating())


def _tensors_that_explain(
    seen: list[torch.Tensor],
    generic: list[torch.Tensor],
    explains: Callable[[torch.Tensor], bool],
    name: str,
) -> list[torch.Tensor]:
    """Those of the tensors that were seen whose counterparts explain the output at generic streams."""
    if len(seen) != len(generic):
        raise StreamConnectionError(
            f"routing='frozen': {name} computed {len(seen)} tensors that may be weights, and {len(generic)} when it ran at "
            f"other streams; expected the same computation; {INSTEAD}"
        )
    # The i-th tensors of both runs are counterparts, since one computation made them in one order.
    return [tensor for tensor, other in zip(seen, generic, strict=True) if explains(other)]


def _succeeds(read: Callable[[], Any]) -> bool:
    try:
        read()
    except StreamConnectionError:
        return False
    return True


def _detached(value: Any) -> Any:
    return replaced(value, {id(tensor): tensor.detach() for tensor in tensors_in(value)})


def _with_constants(
    output: Any, x: torch.Tensor, site: Site, batch_size: int, parts: Parts, name: str
) -> tuple[Any, torch.Tensor]:
    """A connection's output with every weight detached, and with the branch input and mixed streams linear in x."""
    streams = canonical_streams(site, x, batch_size)
    assert parts.read is not None
    read = torch.einsum("btvn,btnd->btvd", parts.read.to(x.dtype), streams)
    changes: dict[int, torch.Tensor] = {}
    branch_in: torch.Tensor | None = None
    for tensor in tensors_in(output):
        if not tensor.is_floating_point():
            continue
        views = as_views(tensor, *read.shape)
        # To the bit: the parts contain this very output, and another output of its shape may come near it.
        if views is not None and torch.equal(views, parts.branch_in):
            branch_in = _with_value(rearranged(read, lambda t: as_views(t, *read.shape), tensor), tensor)
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
    for matrix in orientations(mix, streams):
        mixed = matrix.to(streams.dtype) @ streams
        if relative_error(mixed - values, values) <= tolerance(streams.dtype):
            return _with_value(rearranged(mixed, arrange, tensor), tensor)
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

    candidates = [m.to(streams.dtype) @ streams + written for m in orientations(parts.mix, streams)]
    # A symmetric H_res makes both candidates equal; otherwise only one gives the state that came.
    path = min(candidates, key=lambda form: relative_error(form - arrange(state), arrange(state)))
    return replaced(output, {id(state): _with_value(rearranged(path, arrange, state), state)})


def orientations(mix: torch.Tensor | None, streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """H_res in both orientations, since only its effect shows which one is applied."""
    if mix is None:  # nothing mixes: H_res = I
        return (torch.eye(streams.shape[2], device=streams.device),)
    return mix, mix.mT


def _with_value(path: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of one and the derivative of the other, so that freezing moves no state."""
    return value.detach() + (path - path.detach())


def rearranged(
    values: torch.Tensor, arrange: Callable[[torch.Tensor], torch.Tensor | None], like: torch.Tensor
) -> torch.Tensor:
    """The tensor t of the shape of ``like`` for which ``arrange(t)`` is ``values``, where arrange only moves elements."""
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

    ``changes``: new tensors by the ``id`` of the old ones.
    Returns: A shallow copy; the containers that came are unchanged.
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
