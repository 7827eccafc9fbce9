"""Frozen routing: stream connections whose coefficients are constants, at the values that they have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from probes.connections import ConnectionError, Site, find_roles
from probes.hooks import first_float
from probes.layout import canonical
from probes.pairs import Opening
from probes.reading import Parts, read_error, returned_watch, tolerance
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
    held = {
        link.path: session.sites[number]
        for number, link in enumerate(session.links)
        if start <= link.depth_in and link.depth_out <= stop
    }
    with ExitStack() as stack:
        for path, site in held.items():
            freeze = FREEZE.get(site.style)
            if freeze is None or site.reads_features or site.fractions > 1 or site.layout not in FREEZABLE:
                raise ConnectionError(
                    f"{path!r} ({site.family}, layout {site.layout!r}) cannot be held constant yet; take routing='full'"
                )
            freeze(stack, modules[path], site)
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


def _freeze_returned(stack: ExitStack, module: nn.Module, site: Site) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = first_float(args, kwargs)
        assert x is not None
        roles = find_roles(x.detach(), output)
        if roles is None or roles.collapsed is None or roles.mixed is not None:
            raise ConnectionError(
                f"routing='frozen': {type(module).__name__} returns no branch input and matrix; take routing='full'"
            )
        pre = _read_weights(module, x.detach(), roles.collapsed.detach(), site)
        read = torch.einsum("...n,...nd->...d", pre, x.to(pre.dtype)).to(roles.collapsed.dtype)
        changes = {id(vector): vector.detach() for vector in roles.vectors}
        changes[id(roles.collapsed)] = _valued(read, roles.collapsed)
        if roles.mix is not None:
            changes[id(roles.mix)] = roles.mix.detach()
        return replaced(output, changes)

    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _read_weights(module: nn.Module, x: torch.Tensor, branch_in: torch.Tensor, site: Site) -> torch.Tensor:
    """H_pre (…, n), found among what the module computes; a least-squares guess would not be its own."""
    lead, n = tuple(x.shape[:-2]), x.shape[-2]
    with torch.no_grad(), returned_watch(x, site) as watch:
        module.forward(x)
    candidates = [t.reshape(*lead, n) for t in watch.floating() if t.numel() == x[..., 0].numel()]
    fits = [(read_error(x, pre, branch_in), pre) for pre in candidates]
    error, best = min(fits, key=lambda fit: fit[0], default=(float("inf"), x))
    if error > tolerance(x.dtype):
        raise ConnectionError(
            f"routing='frozen': {type(module).__name__} computes no {n} read weights that explain its branch input (best "
            f"relative error {error:.1e}); take routing='full'"
        )
    return best


def _freeze_width(stack: ExitStack, module: Any, site: Site) -> None:
    """Stand in for the module's ``width_connection`` while the stack is open."""
    connect: Callable[..., Any] = module.width_connection
    own = "width_connection" in vars(module)

    def constant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        batch_size = x.shape[0] // (site.num_streams if site.layout.startswith("(B N)") else 1)
        opening = Opening(site, batch_size, x.detach())
        with opening.watch() as watch:
            branch_in, mixed, depth = result = connect(x)
        opening.read(result, watch)
        assert opening.parts is not None
        read, carried = _applied(opening.parts, x, site, batch_size)
        held = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in depth.items()}
        return _valued(read, branch_in), _valued(carried, mixed), held

    def restore() -> None:
        if own:
            module.width_connection = connect
        else:
            del module.width_connection

    module.width_connection = constant
    stack.callback(restore)


def _applied(parts: Parts, x: torch.Tensor, site: Site, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What constant weights read, (B, T, D), and carry on, in the shape of the streams that came."""
    assert parts.mix is not None
    assert parts.read is not None
    streams = canonical(x, site.layout, batch_size=batch_size, num_streams=site.num_streams)
    read = torch.einsum("btn,btnd->btd", parts.read[..., 0, :].to(x.dtype), streams)
    carried = torch.einsum(
        "btio,btid->btod", parts.mix.to(x.dtype), streams
    )  # as kept: source by destination
    merged = carried.transpose(1, 2) if site.layout.startswith("(B N)") else carried
    return read, merged.reshape(x.shape)


def _valued(path: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of one and the derivative of the other, so that freezing moves no state."""
    return value.detach() + (path - path.detach())


FREEZABLE = ("B T N D", "(B N) T D")
FREEZE: dict[str, Callable[[ExitStack, nn.Module, Site], None]] = {
    "returned": _freeze_returned,
    "width": _freeze_width,
}
