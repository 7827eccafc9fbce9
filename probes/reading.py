"""The weights of a stream connection, read from what its own run computed and checked against what it gave.

No family's formula is repeated here: the tensors that pass through the module while it runs are watched, and the one that
explains the module's output is the weight. Shapes: B batch, T token, N stream, V view (a branch input; mostly one), D feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from probes.connections import (
    STREAM_AXES,
    ConnectionError,
    Roles,
    Site,
    find_roles,
)  # ConnectionError: the field's word
from probes.hooks import computed_in, tensors_in
from probes.layout import canonical

T = TypeVar("T")
Explanation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# connections compute in float32 inside even where the states are float64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
EXACT = 4  # an error of so many roundings is none
SELECTING_TOKENS = 64  # tokens that tell which of the watched tensors are the weights; the proof looks again


@dataclass
class Parts:
    """The weights of one connection call and what its branch took and gave.

    Parameters
    ----------
    mix : Tensor or None
        (B, T, N, N) as the module keeps it; None where nothing mixes.
    read : Tensor or None
        H_pre, (B, T, V, N); None where no scalar read weights exist.
    write : Tensor
        H_post, (B, T, N, V).
    branch_in : Tensor
        (B, T, V, D).
    branch_out : Tensor or None
        (B, T, V, D), where the connection itself saw it.
    """

    mix: torch.Tensor | None
    read: torch.Tensor | None
    write: torch.Tensor
    branch_in: torch.Tensor
    branch_out: torch.Tensor | None = None

    def at(self, index: torch.Tensor | int) -> Parts:
        """The parts of some sequences."""
        return self.each(lambda tensor: tensor[index])

    def detached(self) -> Parts:
        """Copies in float32 that share nothing with the model's own tensors."""
        return self.each(lambda tensor: tensor.detach().to("cpu", torch.float32, copy=True))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Parts:
        """The parts with one change made to every tensor."""
        held = [getattr(self, field.name) for field in fields(self)]
        return Parts(*(None if tensor is None else change(tensor) for tensor in held))


class Watch(TorchFunctionMode):
    """Keep every tensor of some shapes that passes through torch functions while the mode is on.

    Parameters
    ----------
    accept : callable
        ``accept(shape) -> bool``.
    """

    def __init__(self, accept: Callable[[tuple[int, ...]], bool]):
        super().__init__()
        self._accept = accept
        self.seen: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and look at what goes in and comes out."""
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, result)):
            if self._accept(tuple(tensor.shape)):
                self.seen[id(tensor)] = tensor
        return result

    def floating(self) -> list[torch.Tensor]:
        """The floating ones of the tensors that were seen, the last one first: what is applied is computed last."""
        return [tensor.detach() for tensor in reversed(self.seen.values()) if tensor.is_floating_point()]


# --- returned connections ---


def returned_watch(x: torch.Tensor, site: Site) -> Watch:
    """A watch for the weights that a returned connection computes and keeps to itself.

    Parameters
    ----------
    x : Tensor
        Its input.
    site : Site
        What it is.

    Returns
    -------
    Watch
    """
    n = site.num_streams
    lead = _lead(x, site)
    shapes = {(*lead, *tail) for tail in ((n,), (n, 1), (1, n), (n, n))}
    return Watch(shapes.__contains__)


def _lead(x: torch.Tensor, site: Site) -> tuple[int, ...]:
    axis = STREAM_AXES.get(site.layout)
    return tuple(size for position, size in enumerate(x.shape[:-1]) if position != axis)


def read_returned(
    site: Site, x: torch.Tensor, output: Any, rows: torch.Tensor, seen: Callable[[], list[torch.Tensor]]
) -> tuple[Parts | None, Parts]:
    """Read a returned connection: for the sampled rows all parts, for all tokens what it returned.

    Parameters
    ----------
    site : Site
        What the connection is.
    x : Tensor
        Its input.
    output : object
        What it returned.
    rows : Tensor
        Indices of the sampled sequences.
    seen : callable
        Gives the tensors that the connection computed inside, of the sampled sequences or of all.

    Returns
    -------
    sampled : Parts or None
        None where no sequence is sampled.
    whole : Parts
        Every token, ``read`` None.
    """
    roles = find_roles(x, output)
    if roles is None:
        raise ConnectionError(
            "a connection returned other shapes than in the first forward; it cannot be followed"
        )
    streams = canonical(x, site.layout, batch_size=_batch(x, site), num_streams=site.num_streams)
    vectors = [_per_token(v, streams, (site.num_streams,)) for v in roles.vectors]
    collapsed = (
        None if roles.collapsed is None else roles.collapsed.reshape(*streams.shape[:2], 1, roles.width)
    )
    at = _Rows(streams, collapsed, rows)
    number, read = _told_read(vectors, at)
    write = vectors[-1 if number is None else next(i for i in range(len(vectors)) if i != number)]
    mix = _returned_mix(roles, streams, seen)
    if collapsed is None:
        collapsed = torch.einsum("btn,btnd->btd", vectors[0], streams.to(vectors[0].dtype)).unsqueeze(2)
        number, read = 0, vectors[0][rows]
    whole = Parts(mix, None, write.unsqueeze(-1), collapsed)
    if not len(rows):
        return None, whole
    if read is None and not site.reads_features:
        read = _watched_read(at, seen())
    sampled = whole.at(rows)
    sampled.read = None if read is None else read.unsqueeze(-2)
    return sampled, whole


@dataclass
class _Rows:
    """The sampled sequences of a connection's input and of its branch input."""

    streams: torch.Tensor
    collapsed: torch.Tensor | None
    rows: torch.Tensor

    @property
    def x(self) -> torch.Tensor:
        return self.streams[self.rows]

    @property
    def branch_in(self) -> torch.Tensor | None:
        return None if self.collapsed is None else self.collapsed[self.rows].squeeze(2)


def _batch(x: torch.Tensor, site: Site) -> int:
    return x.shape[1] if site.layout.startswith("N B") else x.shape[0]


def _per_token(weight: torch.Tensor, streams: torch.Tensor, tail: tuple[int, ...]) -> torch.Tensor:
    lead = tuple(streams.shape[:2])
    wanted = (*lead, *tail)
    return (
        weight.reshape(wanted) if weight.numel() == math.prod(wanted) else weight.reshape(tail).expand(wanted)
    )


def _told_read(vectors: list[torch.Tensor], at: _Rows) -> tuple[int | None, torch.Tensor | None]:
    """Which of the returned vectors is H_pre: the one that collapses the streams to the branch's input."""
    if at.branch_in is None or len(vectors) < 2 or not len(at.rows):
        return None, None
    errors = [read_error(at.x, vector[at.rows], at.branch_in) for vector in vectors]
    best = min(range(len(errors)), key=errors.__getitem__)
    if errors[best] > tolerance(computed_in(at.streams)):
        return None, None
    return best, vectors[best][at.rows]


def _returned_mix(
    roles: Roles, streams: torch.Tensor, seen: Callable[[], list[torch.Tensor]]
) -> torch.Tensor | None:
    n = roles.num_streams
    if roles.mix is not None:
        return _per_token(roles.mix, streams, (n, n))
    if roles.mixed is None:
        return None
    lead = streams.shape[:2]
    mixed = canonical(roles.mixed, roles.layout, batch_size=lead[0], num_streams=n)
    if relative_error(mixed.double() - streams.double(), streams) <= tolerance(computed_in(streams)):
        return None
    candidates = [t.reshape(*lead, n, n) for t in seen() if t.numel() == mixed[..., 0].numel() * n]
    found = explaining(((m, _mixing(m, streams)) for t in candidates for m in (t, t.mT)), mixed)
    if found is None:
        raise ConnectionError(
            "a connection returns its mixed streams, but none of the matrices that it computes explains them"
        )
    return found


def _watched_read(at: _Rows, seen: list[torch.Tensor]) -> torch.Tensor:
    """H_pre (K, T, N) among the tensors that the module computed, else by least squares."""
    x, branch_in = at.x, at.branch_in
    assert branch_in is not None
    candidates = []
    for tensor in seen:
        if tensor.numel() == x[..., 0].numel():
            candidates.append(tensor.reshape(x.shape[:-1]))
        elif tensor.numel() == at.streams[..., 0].numel():
            candidates.append(tensor.reshape(at.streams.shape[:-1])[at.rows])
    fits = [(read_error(x, read, branch_in), read) for read in candidates]
    error, best = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
    found = best is not None and error <= tolerance(computed_in(x))
    return best if best is not None and found else least_squares_read(x, branch_in)


def read_error(x: torch.Tensor, read: torch.Tensor, branch_in: torch.Tensor) -> float:
    """Relative error of Σ_j read_j X_j against the branch's input; on a spread of the tokens."""
    flat = x.flatten(0, -3)
    few = spread(len(flat), 8 * SELECTING_TOKENS)
    goal = branch_in.flatten(0, -2)[few].double()
    value = torch.einsum("...n,...nd->...d", read.flatten(0, -2)[few].double(), flat[few].double())
    return relative_error(value - goal, goal)


def least_squares_read(x: torch.Tensor, branch_in: torch.Tensor) -> torch.Tensor:
    """The smallest read weights that give the branch's input; exact where the streams are independent.

    Parameters
    ----------
    x : Tensor
        Streams, (..., N, D).
    branch_in : Tensor
        (..., D).

    Returns
    -------
    Tensor
        (..., N). By pseudo-inverse, since the streams may be copies of one another.
    """
    inverse = torch.linalg.pinv(x.double().mT, rtol=1e-6)
    return (inverse @ branch_in.double().unsqueeze(-1)).squeeze(-1).float()


# --- width connections: alpha = [read | mix], one row for each stream ---


def width_watch(x: torch.Tensor, site: Site) -> Watch:
    """A watch for the joint weights (…, N, V + N) of a width connection, in whatever order of its axes.

    Parameters
    ----------
    x : Tensor
        Its input.
    site : Site
        What it is.

    Returns
    -------
    Watch
    """
    per_view = x.numel() // _width(x, site)  # B·T·N

    def accept(shape: tuple[int, ...]) -> bool:
        views, rest = divmod(math.prod(shape), per_view)
        return not rest and site.num_streams < views <= 3 * site.num_streams

    return Watch(accept)


def _width(x: torch.Tensor, site: Site) -> int:
    channels = x.shape[1] if "D H W" in site.layout or "D T" in site.layout else x.shape[-1]
    return int(channels) // site.fractions


def read_width(
    site: Site, batch_size: int, x: torch.Tensor, result: Any, seen: Iterable[torch.Tensor]
) -> Parts:
    """Read a width connection from what its ``width_connection`` computed.

    Parameters
    ----------
    site : Site
        What it is.
    batch_size : int
        Size of the batch.
    x : Tensor
        Its input.
    result : object
        ``(branch_input, residuals, {"beta": …})``.
    seen : iterable of Tensor
        What passed through torch functions meanwhile, of the shapes that `width_watch` accepts.

    Returns
    -------
    Parts
        In which ``mix`` is as the module keeps it, source by destination.

    Raises
    ------
    ConnectionError
        Where no tensor that the module computed explains its output.
    """
    branch_in, mixed, depth = result
    streams = _canonical(x, site, batch_size)
    n, lead = site.num_streams, tuple(streams.shape[:2])
    carried = _mixed_streams(mixed, streams, site, batch_size)
    joint = [alpha for tensor in seen for alpha in _arrangements(tensor, lead, n, site.fractions)]
    for views in sorted({alpha.shape[-1] - n for alpha in joint}):
        taken = as_views(branch_in, batch_size, lead[1], views, streams.shape[-1])
        if taken is None:
            continue
        candidates = [alpha for alpha in joint if alpha.shape[-1] == views + n]
        found = explaining(
            ((alpha, _mixing(alpha.mT, streams)) for alpha in candidates), torch.cat([taken, carried], dim=2)
        )
        if found is not None:
            write = _write_weights(depth, lead, site)
            return Parts(found[..., views:], found[..., :views].mT, write, taken)
    raise ConnectionError(
        f"a width connection with {n} streams computes no weights (streams × views + streams) that explain its output; "
        "this version of it is not known"
    )


def _canonical(x: torch.Tensor, site: Site, batch_size: int) -> torch.Tensor:
    return canonical(
        x.detach(), site.layout, batch_size=batch_size, num_streams=site.num_streams, fractions=site.fractions
    )


def _mixed_streams(mixed: torch.Tensor, streams: torch.Tensor, site: Site, batch_size: int) -> torch.Tensor:
    """The mixed streams, which some versions hand on split (B, …, N, D) though their input is merged."""
    if mixed.shape == streams.shape or mixed.ndim > len(site.layout.replace("(B N)", "B").split()):
        return mixed.detach().reshape(streams.shape)
    return _canonical(mixed, site, batch_size)


def _arrangements(
    seen: torch.Tensor, lead: tuple[int, ...], n: int, fractions: int
) -> Iterator[torch.Tensor]:
    """A watched tensor as (B, T, N, V + N) in each order of axes that lucidrains' versions keep it in."""
    batch, tokens = lead
    if seen.numel() % (batch * tokens * n):
        return
    size = seen.numel() // (batch * tokens * n)
    shape = (batch, tokens, n, size)
    if fractions == 1:
        if seen.ndim >= 4 and tuple(seen.shape[:3]) == (
            batch,
            n,
            size,
        ):  # channels first: (B, N, V + N, H, W)
            yield seen.reshape(batch, n, size, tokens).permute(0, 3, 1, 2)
        if n in seen.shape and size in seen.shape:
            yield seen.reshape(shape)
        return
    own = n // fractions
    # (F, N, F, V + N): fractions outer in rows and columns, as HC keeps them
    if seen.ndim >= 4 and tuple(seen.shape[-4:-1]) == (fractions, own, fractions):
        split = seen.reshape(batch, tokens, fractions, own, fractions, size // fractions)
        views = size // fractions - own
        moved = split.permute(0, 1, 3, 2, 5, 4)  # (N, F), (V + N, F)
        yield moved.reshape(batch, tokens, n, (views + own) * fractions)
    # (N, F, (V + N)·F): fractions inner, as mHCv2 keeps them
    if tuple(seen.shape[-3:]) == (own, fractions, size):
        yield seen.reshape(shape)


def _write_weights(depth: Any, lead: tuple[int, ...], site: Site) -> torch.Tensor:
    """Write weights as (B, T, N, V): one column for each branch output or fraction of it."""
    beta = next((tensor.detach() for tensor in tensors_in(depth) if tensor.is_floating_point()), None)
    if beta is None:
        raise ConnectionError(
            "a width connection gives no write weights (add_branch_out_to_residual=False): nothing is written back, so "
            "there is no connection to follow"
        )
    n, fractions = site.num_streams, site.fractions
    if fractions > 1:
        own = n // fractions
        if site.layout.startswith("(B N)"):  # (F1, N, F2), F1 of the branch
            return (
                beta.reshape(*lead, fractions, own, fractions)
                .permute(0, 1, 3, 4, 2)
                .reshape(*lead, n, fractions)
            )
        return beta.reshape(*lead, own, fractions, fractions).mT.reshape(*lead, n, fractions)  # (N, F1, F2)
    if "D H W" in site.layout and tuple(beta.shape[:2]) == (lead[0], n) and beta.ndim == 4:
        return beta.reshape(lead[0], n, lead[1], 1).movedim(1, 2)
    return beta.reshape(*lead, n, -1)


def as_views(
    tensor: torch.Tensor, batch_size: int, tokens: int, views: int, width: int
) -> torch.Tensor | None:
    """A branch's input or output as (B, T, V, D), or None where its shape fits no way of keeping views.

    Parameters
    ----------
    tensor : Tensor
        As the model holds it.
    batch_size, tokens, views, width : int
        B, T, V and D.

    Returns
    -------
    Tensor or None
    """
    t, shape = tensor.detach(), tuple(tensor.shape)
    if t.numel() != batch_size * tokens * views * width:
        return None
    if views > 1 and (shape[:2] == (views, batch_size) or shape[0] == views * batch_size):
        return t.reshape(views, batch_size, tokens, width).permute(1, 2, 0, 3)
    if shape[0] != batch_size:
        return None
    if len(shape) == 4 and shape[1] == width != shape[-1] and views == 1:
        return t.flatten(2).mT.unsqueeze(2)
    return t.reshape(batch_size, tokens, views, width)


# --- AltUp: X' = P + c ⊗ (F − P_a) with the prediction P = (I + C) X and its active row a ---


def altup_watch(x: torch.Tensor) -> Watch:
    """A watch for AltUp's prediction coefficients (B, T, n, n) and correction coefficients (…, n).

    Parameters
    ----------
    x : Tensor
        Streams (n, B, T, D), or what the branch gave (B, T, D).

    Returns
    -------
    Watch
    """
    lead = tuple(x.shape[-3:-1])

    def accept(shape: tuple[int, ...]) -> bool:
        square = len(shape) == 4 and shape[:2] == lead and shape[2] == shape[3]
        vector = len(shape) in (3, 4) and (
            shape[:2] == lead or shape[1:3] == lead
        )  # (B, T, n) or (n, B, T[, 1])
        return (square or vector) and shape[-1] <= 64

    return Watch(accept)


def read_altup(
    x: torch.Tensor, predicted: torch.Tensor, seen: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction's matrix I + C (B, T, N, N), destination by source, and the streams (B, T, N, D).

    Parameters
    ----------
    x, predicted : Tensor
        (n, B, T, D): what ``predict`` was given and gave.
    seen : list of Tensor
        What it computed.

    Returns
    -------
    matrix, streams : Tensor
    """
    n = x.shape[0]
    streams, goal = x.detach().movedim(0, 2), predicted.detach().movedim(0, 2)
    eye = torch.eye(n, device=x.device)
    squares = [t for t in seen if t.ndim == 4 and tuple(t.shape[-2:]) == (n, n)]
    whole = [eye + m.float() for t in squares for m in (t, t.mT)]
    found = explaining(((matrix, _mixing(matrix, streams)) for matrix in whole), goal)
    if found is None:
        raise ConnectionError(
            "an AltUp module computes no coefficients that explain its prediction; this version of it is not known"
        )
    return found, streams


def read_correction(
    matrix: torch.Tensor,
    predicted: torch.Tensor,
    branch_out: torch.Tensor,
    corrected: torch.Tensor,
    seen: list[torch.Tensor],
) -> Parts:
    """The parts of an AltUp connection: H_res = (I − c e_aᵀ)(I + C), H_post = c, H_pre = row a of I + C.

    Parameters
    ----------
    matrix : Tensor
        I + C, (B, T, N, N).
    predicted, corrected : Tensor
        (n, B, T, D): what ``correct`` was given and gave.
    branch_out : Tensor
        (B, T, D), the branch's output.
    seen : list of Tensor
        What ``correct`` computed.

    Returns
    -------
    Parts
        ``mix`` destination by source.
    """
    n = len(predicted)
    prediction, goal = predicted.detach().movedim(0, 2), corrected.detach().movedim(0, 2)
    branch = branch_out.detach()
    vectors = [v for t in seen for v in _as_vectors(t, tuple(branch.shape[:2]), n)]
    best = explaining(
        (((active, v), _innovation(active, v, prediction, branch)) for active in range(n) for v in vectors),
        goal - prediction,
    )
    if best is None:
        raise ConnectionError(
            "an AltUp module computes no coefficients that explain its correction; this version of it is not known"
        )
    active, write = best
    row = matrix[..., active, :]
    mix = matrix - write.float().unsqueeze(-1) * row.unsqueeze(-2)
    return Parts(
        mix,
        row.unsqueeze(-2),
        write.unsqueeze(-1),
        prediction[:, :, active].unsqueeze(2),
        branch.unsqueeze(2),
    )


def _innovation(
    active: int, write: torch.Tensor, prediction: torch.Tensor, branch: torch.Tensor
) -> Explanation:
    """The correction c ⊗ (F − P_a)."""
    return lambda few: (
        _few(write, few).unsqueeze(-1) * (_few(branch, few) - _few(prediction, few)[:, active]).unsqueeze(-2)
    )


def _as_vectors(tensor: torch.Tensor, lead: tuple[int, int], n: int) -> Iterator[torch.Tensor]:
    if tuple(tensor.shape) == (*lead, n):
        yield tensor
    if tensor.numel() == math.prod(lead) * n and tuple(tensor.shape[:3]) == (n, *lead):
        yield tensor.reshape(n, *lead).movedim(0, -1)


# --- which of the watched tensors explains what was seen ---


def explaining(candidates: Iterable[tuple[T, Explanation]], goal: torch.Tensor) -> T | None:
    """The candidate whose explanation comes nearest to a goal, where it comes near enough; the first that is exact ends it.

    Parameters
    ----------
    candidates : iterable of (result, explanation)
        What to return, and a function from token indices to what it explains at these.
    goal : Tensor
        (B, T, …).

    Returns
    -------
    object or None
    """
    few = spread(goal.shape[0] * goal.shape[1], SELECTING_TOKENS).to(goal.device)
    wanted = _few(goal, few)
    exact = EXACT * torch.finfo(goal.dtype).eps
    best, least = None, math.inf
    for result, explain in candidates:
        error = relative_error(explain(few) - wanted, wanted)
        if error < least:
            best, least = result, error
        if error <= exact:
            break
    return best if least <= tolerance(computed_in(goal)) else None


def _mixing(matrix: torch.Tensor, streams: torch.Tensor) -> Explanation:
    return lambda few: _few(matrix, few) @ _few(streams, few)


def _few(tensor: torch.Tensor, few: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, 1)[few].double()


def spread(count: int, most: int) -> torch.Tensor:
    """At most ``most`` indices below ``count``, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def relative_error(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """‖difference‖ / ‖reference‖ in float64; the plain norm where the reference is zero."""
    scale = torch.linalg.vector_norm(reference.detach().double())
    error = torch.linalg.vector_norm(difference.detach().double())
    return float(error / scale) if scale > 0 else float(error)


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a reconstruction counts as proof, by the precision of the states."""
    return TOLERANCE.get(dtype, 1e-4)
