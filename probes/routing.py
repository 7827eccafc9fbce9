"""Frozen routing: stream connections whose coefficients are constants, at the values that they have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from probes.connections import (
    ConnectionError,
    Parts,
    Watch,
    read_error,
    read_returned,
    read_width,
    tolerance,
)
from probes.hooks import first_float
from probes.layout import canonical
from probes.session import Session


@contextmanager
def constant_routing(session: Session, start: int, stop: int) -> Iterator[None]:
    """Hold H_pre, H_post and H_res of the connections between two depths constant in the forwards made inside.

    X' = H_res X + H_post ⊗ F(H_pre · X) keeps its value, but is differentiated through X and F only.

    Parameters
    ----------
    session : Session
        One that has found its chains.
    start, stop : int
        Depths; connection i joins the depths i and i + 1.

    Yields
    ------
    None

    Raises
    ------
    ConnectionError
        Where the model has streams but no connection that is known, or a connection's coefficients cannot be read.
    """
    if session.num_streams > 1 and not session.links:
        raise ConnectionError(
            f"routing='frozen' needs the stream connections, but none was found for {session.num_streams} streams; "
            "take routing='full'"
        )
    modules = dict(session.model.named_modules(remove_duplicate=False))
    links = {link.path: link.style for link in session.links[start:stop]}
    with ExitStack() as stack:
        for path, style in links.items():
            if style not in FREEZE:
                raise ConnectionError(
                    f"{path!r} connects streams in the {style} style, which cannot be held constant yet"
                )
            FREEZE[style](stack, modules[path], session.num_streams)
        yield


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
        A shallow copy; the containers that came are left as they are.
    """
    if isinstance(value, torch.Tensor):
        return changes.get(id(value), value)
    if isinstance(value, dict):
        changed = copy.copy(value)
        for name, item in value.items():
            changed[name] = replaced(item, changes)
        return changed
    if isinstance(value, (tuple, list)):
        items = [replaced(item, changes) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _freeze_returned(stack: ExitStack, module: nn.Module, num_streams: int) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = first_float(args, kwargs)
        assert x is not None
        nothing = torch.zeros(0, dtype=torch.long, device=x.device)
        _, parts = read_returned(module, x.detach(), output, nothing)
        pre = _read_weights(module, x.detach(), parts.branch_in.detach())
        read = torch.einsum("...n,...nd->...d", pre, x.to(pre.dtype)).to(parts.branch_in.dtype)
        changes = {
            id(parts.post): parts.post.detach(),
            id(parts.branch_in): _valued(read, parts.branch_in),
        }
        if parts.mix is not None:
            changes[id(parts.mix)] = parts.mix.detach()
        return replaced(output, changes)

    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _read_weights(module: nn.Module, x: torch.Tensor, branch_in: torch.Tensor) -> torch.Tensor:
    """H_pre (…, n), found among what the module computes; a least-squares guess would not be its own."""
    lead, n = tuple(x.shape[:-2]), x.shape[-2]
    shapes = {(*lead, n), (*lead, n, 1), (*lead, 1, n)}
    with torch.no_grad(), Watch(shapes.__contains__) as watch:
        module.forward(x)
    candidates = [t.reshape(*lead, n) for t in watch.seen.values() if t.is_floating_point()]
    fits = [(read_error(x, pre, branch_in), pre.detach()) for pre in candidates]
    error, best = min(fits, key=lambda fit: fit[0], default=(float("inf"), x))
    if error > tolerance(x.dtype):
        raise ConnectionError(
            f"routing='frozen': {type(module).__name__} computes no {n} read weights that explain its branch input (best "
            f"relative error {error:.1e}); take routing='full'"
        )
    return best


def _freeze_width(stack: ExitStack, module: Any, num_streams: int) -> None:
    """Stand in for the module's ``width_connection`` while the stack is open."""
    connect: Callable[..., Any] = module.width_connection
    own = "width_connection" in vars(module)

    def constant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        module.width_connection = connect  # which is what is read here
        try:
            parts = read_width(module, x.detach(), num_streams)
        finally:
            module.width_connection = constant
        branch_in, mixed, depth = connect(x)
        read, carried = _applied(parts, x, num_streams)
        held = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in depth.items()}
        return _valued(read, branch_in), _valued(carried, mixed), held

    def restore() -> None:
        if own:
            module.width_connection = connect
        else:
            del module.width_connection

    module.width_connection = constant
    stack.callback(restore)


def _applied(parts: Parts, x: torch.Tensor, num_streams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What constant weights read, (B, T, D), and carry on, ((B n), T, D)."""
    assert parts.mix is not None
    assert parts.pre is not None
    streams = canonical(x, "(B N) T D", batch_size=x.shape[0] // num_streams, num_streams=num_streams)
    read = torch.einsum("btn,btnd->btd", parts.pre.to(x.dtype), streams)
    carried = torch.einsum(
        "btio,btid->btod", parts.mix.to(x.dtype), streams
    )  # as kept: source by destination
    return read, carried.transpose(1, 2).reshape(x.shape)


def _valued(path: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of one and the derivative of the other, so that freezing moves no state."""
    return value.detach() + (path - path.detach())


FREEZE: dict[str, Callable[[ExitStack, nn.Module, int], None]] = {
    "returned": _freeze_returned,
    "width": _freeze_width,
}
