"""Frozen routing: stream connections whose coefficients are constants, at the values that they have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from depthscope.probes.connections.altup import altup_watch
from depthscope.probes.connections.coefficients import Parts, tolerance
from depthscope.probes.connections.detection import ConnectionError, Site, find_roles
from depthscope.probes.connections.paired import Opening
from depthscope.probes.connections.returned import read_error, returned_watch
from depthscope.probes.model.hooks import replace_method
from depthscope.probes.model.layout import canonical
from depthscope.probes.model.tensors import first_float
from depthscope.probes.session.session import Session


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
    if session.structure.num_streams > 1 and not session.structure.connections:
        raise ConnectionError(
            f"routing='frozen' needs the stream connections, but none was found for {session.structure.num_streams} streams; "
            "take routing='full'"
        )
    modules = dict(session.model.named_modules(remove_duplicate=False))
    held = {
        link.path: session.structure.sites[number]
        for number, link in enumerate(session.structure.connections)
        if start <= link.depth_in and link.depth_out <= stop
    }
    with ExitStack() as stack:
        for path, site in held.items():
            freeze = FREEZE.get(site.style)
            other_order = site.style == "returned" and site.layout != "B T N D"
            if freeze is None or other_order or site.reads_features or site.layout not in FREEZABLE:
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
    connect: Callable[..., Any] = module.width_connection

    def constant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        merged = site.num_streams // site.fractions if site.layout.startswith("(B N)") else 1
        opening = Opening(site, x.shape[0] // merged, x.detach())
        with opening.watch() as watch:
            branch_in, mixed, depth = result = connect(x)
        opening.read(result, watch)
        assert opening.parts is not None
        read, carried = _applied(opening.parts, x, opening)
        held = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in depth.items()}
        return (
            _valued(_as_taken(read, branch_in), branch_in),
            _valued(_as_held(carried, mixed, site), mixed),
            held,
        )

    replace_method(stack, module, "width_connection", constant)


def _applied(parts: Parts, x: torch.Tensor, opening: Opening) -> tuple[torch.Tensor, torch.Tensor]:
    """What constant weights read, (B, T, V, D), and carry on, (B, T, N, D)."""
    assert parts.mix is not None
    assert parts.read is not None
    site = opening.site
    streams = canonical(
        x,
        site.layout,
        batch_size=opening.batch_size,
        num_streams=site.num_streams,
        fractions=site.fractions,
    )
    read = torch.einsum("btvn,btnd->btvd", parts.read.to(x.dtype), streams)
    carried = torch.einsum(
        "btio,btid->btod", parts.mix.to(x.dtype), streams
    )  # as kept: source by destination
    return read, carried


def _as_taken(read_BTVD: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Branch inputs in the shape that the branch takes: views outermost, or fractions merged."""
    if like.ndim == 4 or like.shape[0] != read_BTVD.shape[0]:
        return read_BTVD.permute(2, 0, 1, 3).reshape(like.shape)
    return read_BTVD.reshape(like.shape)


def _as_held(carried_BTND: torch.Tensor, like: torch.Tensor, site: Site) -> torch.Tensor:
    """Streams in the shape in which the module holds them."""
    if site.layout.startswith("(B N)") and like.ndim == 3:
        outer = carried_BTND.unflatten(2, (-1, site.fractions))  # (B, T, N, F, D)
        return outer.transpose(1, 2).reshape(like.shape)
    return carried_BTND.reshape(like.shape)


def _freeze_altup(stack: ExitStack, module: Any, site: Site) -> None:
    """Hold the coefficients of ``predict`` and ``correct`` constant."""
    predict: Callable[..., Any] = module.predict
    correct: Callable[..., Any] = module.correct
    opened: list[Opening] = []

    def constant_predict(x: torch.Tensor) -> torch.Tensor:
        opening = Opening(site, x.shape[1], x.detach())
        with opening.watch() as watch:
            predicted = predict(x)
        opening.read(predicted, watch)
        opened.append(opening)
        assert opening.matrix is not None
        return _valued(torch.einsum("btoi,ibtd->obtd", opening.matrix.to(x.dtype), x), predicted)

    def constant_correct(predictions: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        opening = opened.pop()
        with altup_watch(activated) as watch:
            corrected = correct(predictions, activated)
        parts = opening.close(activated, corrected, watch)
        active = (predictions.detach() - parts.branch_in[:, :, 0]).flatten(1).norm(dim=1).argmin()
        write = parts.write[..., 0].movedim(-1, 0).unsqueeze(-1).to(activated.dtype)
        return _valued(predictions + write * (activated - predictions[active]), corrected)

    replace_method(stack, module, "predict", constant_predict)
    replace_method(stack, module, "correct", constant_correct)


def _valued(path: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor with the value of one and the derivative of the other, so that freezing moves no state."""
    return value.detach() + (path - path.detach())


FREEZABLE = ("B T N D", "(B N) T D", "B T N (F D)", "(B N) T (F D)", "N B T D")
FREEZE: dict[str, Callable[[ExitStack, nn.Module, Site], None]] = {
    "returned": _freeze_returned,
    "width": _freeze_width,
    "altup": _freeze_altup,
}
