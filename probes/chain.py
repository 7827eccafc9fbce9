"""The chain of blocks: found by how the calls of one forward link, output to input, never by class names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from torch import nn

from probes.connections import ConnectionError  # the field's word
from probes.tape import Call, ChainError, Tape, same_tensor

SHARE = 0.8  # a finer chain wins while it covers this share of the parameters of the coarsest one
LEAST = 0.3  # the largest chain must cover this share of the parameters beside embeddings and heads
SECOND = 0.1  # a second chain counts from this share of the first one's parameters


@dataclass(frozen=True)
class Place:
    """Where one state of a chain is seen: at the input or the output of one call."""

    path: str
    index: int
    at: str  # "input" or "output"
    layer: int
    site: str
    module: str  # the module that produced the state


@dataclass(frozen=True)
class Link:
    """One stream connection: the call that mixes, and the call whose output is the branch's."""

    path: str
    index: int
    layer: int
    branch: str
    branch_path: str | None
    branch_index: int
    style: str


@dataclass(frozen=True)
class Chain:
    """A residual chain: the places of its states in depth order and, with streams, its connections."""

    name: str
    places: tuple[Place, ...]
    links: tuple[Link, ...]
    blocks: tuple[str, ...]
    block_class: str
    shapes: tuple[tuple[int, ...], ...]
    channels_first: bool


def find_chains(tape: Tape, model: nn.Module, *, layers: Sequence[str] | None = None) -> list[Chain]:
    """Find the residual chains of a model in the calls of one forward.

    Parameters
    ----------
    tape : Tape
        The calls.
    model : Module
        For the share of the parameters that a chain covers.
    layers : sequence of str, optional
        Module paths (or one path of a ModuleList, or a pattern such as ``"h.{i}"``) that name the blocks.

    Returns
    -------
    list of Chain
        The largest chain first; more than one for an encoder and a decoder.

    Raises
    ------
    ChainError
        Where nothing links, with the override to give.
    """
    if layers is not None:
        return [_named_chain(tape, _named_blocks(tape, model, layers))]
    connections = tape.connections()
    _refuse_gated(connections)
    if connections:
        return [_stream_chain(tape, connections)]
    runs = _runs(tape, model)
    if not runs:
        raise ChainError(
            "no chain of blocks was found: no two calls of like modules hand one tensor on. "
            "Name the blocks with layers=, for example layers='model.layers.{i}' or layers=['stem', 'trunk.0', 'trunk.1']"
        )
    return [_chain(run, name) for name, run in zip(_names(runs), runs, strict=True)]


def _refuse_gated(connections: list[Call]) -> None:
    for call in connections:
        if call.site is not None and call.site.style == "gated":
            block = call.parent.path if call.parent is not None else call.path
            pattern = re.sub(r"\d+", "{i}", block, count=1)
            raise ConnectionError(
                f"{call.path!r} ({type(call.module).__name__}) keeps {call.site.num_streams} streams in one axis and reads "
                "them by per-feature gates, for which no scalar H_pre exists; this connection is not read yet. The states "
                f"alone are captured with layers={pattern!r}, layout={call.site.layout!r} and streams={call.site.num_streams}"
            )


def _runs(tape: Tape, model: nn.Module) -> list[list[Call]]:
    found = [(run, size) for run in _candidates(tape) if (size := _size(call.module for call in run))]
    if not found:
        return []
    largest = max(size for _, size in found)
    best, best_size = max(
        (pair for pair in found if pair[1] >= SHARE * largest), key=lambda pair: len(pair[0])
    )
    share = best_size / _trunk_size(model)
    if share < LEAST:
        raise ChainError(
            f"the longest chain of calls that links, {best[0].path!r} to {best[-1].path!r}, holds only {share:.0%} of the "
            "model's parameters, so it is not the trunk; name the blocks with layers=, such as layers='blocks.{i}'"
        )
    chosen = [best]
    for run, size in sorted(found, key=lambda pair: -len(pair[0])):
        apart = all(not _entangled(run, other) for other in chosen)
        if apart and size >= SECOND * best_size and type(run[0].module) is type(best[0].module):
            chosen.append(run)
    return sorted(chosen, key=lambda run: run[0].order)


def _candidates(tape: Tape) -> list[list[Call]]:
    """Runs of one class; and runs in one container that are not a class run with a norm or a head at its ends."""
    runs = [(key[0], run) for key, run in tape.segments()]
    classes = [run for kind, run in runs if kind == "class"]
    mixed = [part for kind, run in runs if kind == "container" for part in _even_parts(run)]
    return classes + [run for run in mixed if not any(_covers(run, other) for other in classes)]


def _even_parts(run: list[Call]) -> Iterable[list[Call]]:
    """The longest parts of a run in which no call changes the shape."""
    for even, part in groupby(run, key=lambda call: call.x_shape == call.y_shape):
        calls = list(part)
        if even and len(calls) > 1:
            yield calls


def _trunk_size(model: nn.Module) -> int:
    """Number of parameters beside embeddings and the heads that read out into their vocabulary."""
    vocabularies = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    outside = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        or (isinstance(module, nn.Linear) and module.out_features in vocabularies)
        for p in module.parameters(recurse=False)
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in outside) or 1


def _covers(container: list[Call], run: list[Call]) -> bool:
    """Whether a run of one class makes up nearly all of a container's run, so that the rest are norms and heads."""
    inside = set(map(id, run)) <= set(map(id, container))
    return inside and _size(c.module for c in run) >= SHARE * _size(c.module for c in container)


def _entangled(a: list[Call], b: list[Call]) -> bool:
    return any(x is y or x.inside(y) or y.inside(x) for x in a for y in b)


def _size(modules: Iterable[nn.Module]) -> int:
    parameters = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(parameters.values())


def _names(runs: list[list[Call]]) -> list[str]:
    """Short distinct names: the first path component that tells the chains apart."""
    if len(runs) == 1:
        return [""]
    paths = [run[0].path.split(".") for run in runs]
    for parts in zip(*paths, strict=False):
        if len(set(parts)) == len(runs):
            return list(parts)
    return [f"chain{i}" for i in range(len(runs))]


def _named_blocks(tape: Tape, model: nn.Module, layers: Sequence[str]) -> list[Call]:
    modules = dict(model.named_modules())
    wanted = block_paths(model, layers)
    calls = {path: [call for call in tape.calls if call.path == path] for path in wanted}
    for path in wanted:
        if path not in modules:
            raise ChainError(f"no module {path!r} in the model; {_closest(path, modules)}")
        if not calls[path]:
            raise ChainError(f"the module {path!r} was never called in the forward; name modules that run")
    blocks = sorted((call for path in wanted for call in calls[path]), key=lambda call: call.order)
    for call in blocks:
        if not (call.x_shape and call.y_shape):
            raise ChainError(
                f"{call.path} has no floating tensor as input and output; it cannot hold a residual state"
            )
    return blocks


def block_paths(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Module paths that a user's ``layers=`` names: paths, one ModuleList's path, or one pattern.

    Parameters
    ----------
    model : Module
        The model.
    layers : sequence of str
        As given.

    Returns
    -------
    list of str

    Raises
    ------
    ChainError
        Where a pattern names nothing.
    """
    return _expand(layers[0], dict(model.named_modules())) if len(layers) == 1 else list(layers)


def _expand(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    if "{i}" in pattern or "*" in pattern:
        expression = re.escape(pattern).replace(r"\{i\}", r"\d+").replace(r"\*", r"[^.]+")
        found = [path for path in modules if re.fullmatch(expression, path)]
        if not found:
            raise ChainError(f"the pattern {pattern!r} names no module; {_closest(pattern, modules)}")
        return found
    held = modules.get(pattern)
    if isinstance(held, (nn.ModuleList, nn.Sequential)):
        return [f"{pattern}.{i}".lstrip(".") for i in range(len(held))]
    return [pattern]


def _closest(path: str, modules: dict[str, nn.Module]) -> str:
    import difflib

    near = difflib.get_close_matches(path, list(modules), n=3, cutoff=0.3)
    return f"closest: {', '.join(map(repr, near))}" if near else "print the model to see its module paths"


def _named_chain(tape: Tape, blocks: list[Call]) -> Chain:
    """A chain of the user's blocks; where they are branches of skips outside, the last state is the next call's input."""
    chain = _chain(blocks, "")
    if all(same_tensor(a.y, b.x) for a, b in pairwise(blocks)):
        return chain
    last = blocks[-1]
    following = tape.follower(last)
    end = (
        ()
        if following is None
        else (replace(chain.places[-1], path=following.path, index=following.index, at="input"),)
    )
    places = (*chain.places[:-1], *end)
    return replace(chain, places=places, shapes=chain.shapes[: len(places)])


def _chain(blocks: list[Call], name: str) -> Chain:
    """A plain chain: the input of every block and the output of the last one."""
    layers = _layer_numbers(blocks)
    places = [
        _place(
            call,
            "input",
            layers,
            position,
            blocks[position - 1].path if position else call.producer or "(input)",
        )
        for position, call in enumerate(blocks)
    ]
    places.append(_place(blocks[-1], "output", layers, len(blocks), blocks[-1].path))
    return Chain(
        name=name,
        places=tuple(places),
        links=(),
        blocks=tuple(dict.fromkeys(call.path for call in blocks)),
        block_class=type(blocks[0].module).__name__,
        shapes=(*(call.x_shape for call in blocks), blocks[-1].y_shape),
        channels_first=_convolves(blocks),
    )


def _convolves(blocks: list[Call]) -> bool:
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    return (
        any(isinstance(module, kinds) for module in blocks[0].module.modules())
        and len(blocks[0].x_shape) == 4
    )


def _place(call: Call, at: str, layers: list[int], depth: int, producer: str) -> Place:
    layer = layers[depth - 1] if depth else -1
    following = layers[depth] if depth < len(layers) else None
    site = "embed" if depth == 0 else ("mid" if following == layer else "post")
    return Place(call.path, call.index, at, layer, site, producer)


def _layer_numbers(calls: list[Call]) -> list[int]:
    """Block numbers from the first number in the paths where these ascend, else by order."""
    numbers = [int(found.group()) if (found := re.search(r"\d+", call.path)) else -1 for call in calls]
    steps = [b - a for a, b in pairwise(numbers)]
    if (
        numbers
        and numbers[0] >= 0
        and all(step in (0, 1) for step in steps)
        and (any(steps) or len(calls) < 3)
    ):
        return numbers
    return list(range(len(calls)))


def _stream_chain(tape: Tape, connections: list[Call]) -> Chain:
    """A chain with streams: the input of every connection, and the state after the last one."""
    layers = _layer_numbers(connections)
    places = [
        _place(
            call, "input", layers, depth, connections[depth - 1].path if depth else call.producer or "(input)"
        )
        for depth, call in enumerate(connections)
    ]
    last, at = _exit(tape, connections[-1])
    places.append(_place(last, at, layers, len(connections), connections[-1].path))
    parents = {id(call.parent): call.parent for call in connections if call.parent is not None}
    return Chain(
        name="",
        places=tuple(places),
        links=tuple(_link(*pair) for pair in zip(connections, layers, strict=True)),
        blocks=tuple(dict.fromkeys(call.path for call in parents.values())),
        block_class=type(next(iter(parents.values())).module).__name__ if parents else "",
        shapes=(*(call.x_shape for call in connections), connections[-1].x_shape),
        channels_first=False,
    )


def _exit(tape: Tape, last: Call) -> tuple[Call, str]:
    """Where the state after the last connection shows: its own output, its block's, or the next call's input."""
    call: Call | None = last
    while call is not None:
        if call.y_shape == last.x_shape and call.x_shape == last.x_shape:
            return call, "output"
        call = call.parent
    for later in tape.calls[last.order + 1 :]:
        if later.x_shape == last.x_shape and not later.inside(last):
            return later, "input"
    raise ChainError(
        f"the state after the last connection {last.path!r} (shape {last.x_shape}) is seen by no module: "
        "no later call takes or returns it. Collapse the streams in a module, for example einops' Reduce layer"
    )


def _link(call: Call, layer: int) -> Link:
    assert call.site is not None
    branch = call.branch
    return Link(
        path=call.path,
        index=call.index,
        layer=layer,
        branch=_branch_label(call, branch),
        branch_path=branch.path if branch else None,
        branch_index=branch.index if branch else 0,
        style=call.site.style,
    )


_LABELS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("attn", re.compile(r"att|ssm|mamba|mixer|retention", re.IGNORECASE).search),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert", re.IGNORECASE).search),
)


def _branch_label(call: Call, branch: Call | None) -> str:
    named = [call.path.rpartition(".")[2], branch.path.rpartition(".")[2] if branch else ""]
    named.append(type(branch.module).__name__ if branch else "")
    for text in named:
        for label, matches in _LABELS:
            if matches(text):
                return label
    return "block"
