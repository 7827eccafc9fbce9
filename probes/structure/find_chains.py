"""The chains of blocks that a model has.

Found by how the calls of one forward link, output to input, never by class names: new models have new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

from torch import nn

from depthscope.diagnostics.closest_names import did_you_mean
from depthscope.probes.dataflow.linear import LinearDependence
from depthscope.probes.model.modules import all_parameters
from depthscope.probes.structure.branch_sums import with_branch_sums
from depthscope.probes.structure.chain import Chain, HookPoint, layer_numbers
from depthscope.probes.structure.final_norm import final_norm
from depthscope.probes.structure.history_chain import history_chain
from depthscope.probes.structure.plain_proof import plain_step
from depthscope.probes.structure.ran_parameters import ran_parameters
from depthscope.probes.structure.stages import join_stages
from depthscope.probes.structure.stream_chain import stream_chain
from depthscope.probes.structure.tape import Call, ChainError, Tape, same_tensor
from depthscope.probes.structure.tracks import split_tracks
from depthscope.probes.structure.value_chain import unchanged_origin

# Shares of parameters; heuristics of ours, tested on the models of docs/compatibility.md.
# A chain of finer blocks, such as those inside of stages, is taken while it covers this much of the coarsest chain.
FINER_SHARE = 0.8
# The largest chain is the model's trunk if it covers this much of all but embeddings and heads.
TRUNK_SHARE = 0.3
# A further chain, such as a decoder, needs this much of the largest one; smaller ones are parts of heads.
FURTHER_SHARE = 0.1


def find_chains(tape: Tape, model: nn.Module, *, layers: Sequence[str] | None = None) -> list[Chain]:
    """Find the residual chains of a model in the calls of one forward.

    ``model``: for the share of the parameters that a chain covers.
    ``layers``: module paths (or one path of a ModuleList, or a pattern such as ``"h.{i}"``) that name the blocks.
    Returns: In the order in which they run; more than one for an encoder and a decoder.
    """
    if layers is not None:
        blocks = _named_blocks(tape, model, layers)
        return split_tracks(with_final(tape, _named_chain(tape, blocks)), blocks, named=True)
    # Connections first: the blocks of a model with streams, or with a depth history, may link like plain ones.
    connections = tape.connection_calls()
    if connections:
        return [with_final(tape, stream_chain(tape, connections))]
    histories = history_chain(tape)
    if histories is not None:
        return [with_final(tape, histories)]
    runs = _chosen_runs(tape, model)
    if not runs:
        raise ChainError(
            "no chain of blocks was found: no two calls of like modules hand one tensor on. "
            "Name the blocks with layers=, for example layers='model.layers.{i}' or layers=['stem', 'trunk.0', 'trunk.1']"
        )
    chains: list[Chain] = []
    for name, run in zip(distinct_names([run[0].path for run in runs]), runs, strict=True):
        chain = with_final(tape, _linked_chain(run, name))
        chains += split_tracks(chain, run, named=False)
    return chains


def with_final(tape: Tape, chain: Chain, streams: int = 1) -> Chain:
    """The chain with the hook point after its last norm, where there is one."""
    norm, why = final_norm(tape, chain, streams)
    if norm is None:
        return replace(chain, without_final=why)
    layer = chain.points[-1].layer
    return replace(chain, final=HookPoint(norm.path, norm.index, "output", layer, "final", norm.path))


def _chosen_runs(tape: Tape, model: nn.Module) -> list[list[Call]]:
    runs = _with_linked_runs(tape, list(_candidate_runs(tape)))
    found = [(run, size) for run in runs if (size := _num_parameters(tape, (call.module for call in run)))]
    if not found:
        return []
    best, best_size = _finest_run(found)
    chosen = [best]
    # A model may have several trunks; parts of one trunk, such as its attentions, overlap with it and are left out.
    rest = [pair for pair in found if _is_block_run(pair[0]) and pair[1] >= FURTHER_SHARE * best_size]
    while rest := [pair for pair in rest if not any(_share_calls(pair[0], other) for other in chosen)]:
        chosen.append(_finest_run(rest)[0])
    # Of several towers none need be most of the model; single layers that follow one another are no tower.
    towers = chosen if _is_block_run(best) else [best]
    share = _num_parameters(tape, (call.module for run in towers for call in run)) / (
        ran_parameters(tape, model).total or 1
    )
    if share < TRUNK_SHARE:
        pattern = re.sub(r"\d+", "{i}", best[0].path, count=1)
        # A part that is in no list is no example of a block.
        advice = f", such as layers={pattern!r}" if "{i}" in pattern else ""
        raise ChainError(
            f"the longest chain of calls that links, {best[0].path!r} to {best[-1].path!r}, has only {share:.0%} of the "
            f"model's parameters, so it is not the trunk; name the blocks with layers={advice}"
        )
    return sorted(chosen, key=lambda run: run[0].order)


def _with_linked_runs(tape: Tape, runs: list[list[Call]]) -> list[list[Call]]:
    """Runs of blocks, with the blocks of other classes that take or give the very states of these put in their places.

    The stages of a network may have blocks of several classes: convolutions first and attention later.
    """
    blocks = [run for run in runs if _is_block_run(run)]
    found: dict[tuple[int, ...], list[Call]] = {}
    for run in runs:
        longer = _longer(tape, run, blocks) if _is_block_run(run) else run
        found.setdefault(tuple(call.order for call in longer), longer)
    return list(found.values())


def _longer(tape: Tape, run: list[Call], blocks: list[list[Call]]) -> list[Call]:
    """A run with all others in it that belong there."""
    while True:
        free = [other for other in blocks if not _share_calls(run, other)]
        for other in free:
            place = _place(tape, run, other, [run, *free])
            if place is not None and _adds_branches(tape, other):
                run = [*run[:place], *other, *run[place:]]
                break
        else:
            return run


def _place(tape: Tape, run: list[Call], other: list[Call], runs: list[list[Call]]) -> int | None:
    """Where in a run another one belongs that takes a state of it, or gives its first one; None where neither does."""
    if same_tensor(other[-1].y, run[0].x):
        return 0 if _goes_on_once(other, runs) else None
    for number, call in enumerate(run, 1):
        if same_tensor(call.y, other[0].x):
            at_the_end = number == len(run)
            fits = _goes_on_once(run, runs) if at_the_end else _leads_to(tape, other, run[number])
            return number if fits else None
    return None


def _goes_on_once(run: list[Call], runs: list[list[Call]]) -> bool:
    """Whether one run alone goes on from the last state of another: of two heads neither is the rest of the trunk."""
    first = {id(each[0]): each[0] for each in runs if same_tensor(run[-1].y, each[0].x)}.values()
    return sum(not any(call.inside(other) for other in first) for call in first) == 1


def _leads_to(tape: Tape, run: list[Call], call: Call) -> bool:
    """Whether a call takes what was computed from the last state of a run: else the run is a branch to the side."""
    given, taken = run[-1].values[1], call.values[0]
    return (
        tape.trace is not None
        and given is not None
        and taken is not None
        and tape.trace.depends(taken, given)
    )


def _adds_branches(tape: Tape, run: list[Call]) -> bool:
    """Whether every block of a run that keeps the shape of its state adds something to it, and some block does."""
    if tape.trace is None or tape.trace.error is not None:
        return False
    kept = [call.values for call in run if call.x_shape == call.y_shape]
    return bool(kept) and all(
        before is not None and after is not None and not plain_step(tape.trace, before, after)
        for before, after in kept
    )


def _finest_run(found: list[tuple[list[Call], int]]) -> tuple[list[Call], int]:
    """The longest of the runs that cover nearly as many parameters as the largest one; blocks before single layers.

    An MLP may be a longer run of layers than the model is of blocks.
    """
    largest = max(size for _, size in found)
    fit = [pair for pair in found if pair[1] >= FINER_SHARE * largest]
    return max(fit, key=lambda pair: (_is_block_run(pair[0]), len(pair[0])))


def _is_block_run(run: list[Call]) -> bool:
    """Whether all calls but those between stages have parts of their own; their classes may differ."""
    return all(_has_children(call) for call in run if call.x_shape == call.y_shape)


def _candidate_runs(tape: Tape) -> list[list[Call]]:
    """Runs of one class; and runs in one container, unless they are a class run with a norm or a head at its ends.

    Blocks of one model may have several classes, as in hybrids of attention and state-space layers; a container has them all.
    """
    by_class: dict[Any, list[list[Call]]] = {}
    mixed: list[list[Call]] = []
    for (kind, key), run in tape.linked_runs():
        if kind == "class":
            by_class.setdefault(key, []).extend(_parts_between_forks(tape, run))
        else:
            mixed += _parts_of_one_shape(run)
    classes: list[list[Call]] = []
    for parts in by_class.values():
        runs = [part for part in parts if len(part) > 1]
        if not runs:
            continue
        # Only blocks have stages: single layers of one class, such as norms, follow one another by chance.
        classes += join_stages(tape, runs) if _has_children(runs[0][0]) else runs
    return classes + [run for run in mixed if not any(_covers(tape, run, other) for other in classes)]


def _parts_between_forks(tape: Tape, run: list[Call]) -> Iterator[list[Call]]:
    """A run, cut where it leaves a list of blocks for another one although a further block takes the same state.

    Which of them goes on with the trunk does not show: the others are branches to the side, such as heads.
    """
    start = 0
    for end, (before, after) in enumerate(pairwise(run), 1):
        if _list_of(before) != _list_of(after) and _forks(tape, before, after):
            yield run[start:end]
            start = end
    yield run[start:]


def _list_of(call: Call) -> str:
    """The path of the numbered list that a module is in; of one in none its own."""
    container, _, last = call.path.rpartition(".")
    return container if last.isdigit() else call.path


def _forks(tape: Tape, before: Call, after: Call) -> bool:
    """Whether a block other than the next one takes the state that a call gave."""
    return any(
        other.x_shape == other.y_shape == before.y_shape
        and same_tensor(before.y, other.x)
        and _has_children(other)
        and not (other is after or other.inside(after) or after.inside(other) or before.inside(other))
        for other in tape.calls[before.order + 1 :]
    )


def _has_children(call: Call) -> bool:
    return any(True for _ in call.module.children())


def _parts_of_one_shape(run: list[Call]) -> Iterable[list[Call]]:
    """The longest parts of a run in which no call changes the shape."""
    for same_shape, part in groupby(run, key=lambda call: call.x_shape == call.y_shape):
        calls = list(part)
        if same_shape and len(calls) > 1:
            yield calls


def _covers(tape: Tape, container: list[Call], run: list[Call]) -> bool:
    """Whether a run of one class is nearly all of a container's run, and the rest are single layers: norms and heads."""
    in_run = set(map(id, run))
    rest = [call for call in container if id(call) not in in_run]
    if len(rest) + len(run) > len(container) or any(_has_children(call) for call in rest):
        return False
    return _num_parameters(tape, (c.module for c in run)) >= FINER_SHARE * _num_parameters(
        tape, (c.module for c in container)
    )


def _share_calls(a: list[Call], b: list[Call]) -> bool:
    return any(x is y or x.inside(y) or y.inside(x) for x in a for y in b)


def _num_parameters(tape: Tape, modules: Iterable[nn.Module]) -> int:
    sizes: dict[int, int] = {}  # of shared ones once
    for module in modules:
        own = tape.parameter_sizes.get(id(module))
        if own is None:
            own = {id(p): p.numel() for p in all_parameters(module)}
            tape.parameter_sizes[id(module)] = own
        sizes |= own
    return sum(sizes.values())


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Short distinct names of chains, by the paths of their first blocks: the first component in which all differ."""
    if len(paths) == 1:
        return [""]
    parts = [path.split(".") for path in paths]
    for names in zip(*parts, strict=False):
        if len(set(names)) == len(paths):
            return list(names)
    return [f"chain{i}" for i in range(len(paths))]


def _named_blocks(tape: Tape, model: nn.Module, layers: Sequence[str]) -> list[Call]:
    modules = dict(model.named_modules())
    wanted = block_paths(model, layers)
    calls = {path: [call for call in tape.calls if call.path == path] for path in wanted}
    for path in wanted:
        if path not in modules:
            raise ChainError(f"no module {path!r} in the model; {_closest_paths(path, modules)}")
        if not calls[path]:
            raise ChainError(f"the module {path!r} was never called in the forward; name modules that run")
    blocks = sorted((call for path in wanted for call in calls[path]), key=lambda call: call.order)
    for call in blocks:
        if not (call.x_shape and call.y_shape):
            raise ChainError(
                f"{call.path} has no floating tensor as input and output; it cannot have a residual state"
            )
    return blocks


def block_paths(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Module paths that a user's ``layers=`` names: paths, one ModuleList's path, or one pattern."""
    if len(layers) > 1:
        return list(layers)
    pattern, modules = layers[0], dict(model.named_modules())
    if "{i}" in pattern or "*" in pattern:
        expression = re.escape(pattern).replace(r"\{i\}", r"\d+").replace(r"\*", r"[^.]+")
        found = [path for path in modules if re.fullmatch(expression, path)]
        if not found:
            raise ChainError(f"the pattern {pattern!r} names no module; {_closest_paths(pattern, modules)}")
        return found
    container = modules.get(pattern)
    if isinstance(container, (nn.ModuleList, nn.Sequential)):
        return [f"{pattern}.{i}".lstrip(".") for i in range(len(container))]
    return [pattern]


def _closest_paths(path: str, modules: dict[str, nn.Module]) -> str:
    return did_you_mean(path, modules, otherwise="print the model to see its module paths")


def _named_chain(tape: Tape, blocks: list[Call]) -> Chain:
    """A chain of the user's blocks.

    Where these do not link they are branches, which something outside adds to the state: their outputs are no states, and
    the last state is the input of the next call.
    """
    chain = _plain_chain(blocks, "")
    if all(same_tensor(a.y, b.x) for a, b in pairwise(blocks)):
        return chain
    if all(_changed_between(*pair) or same_tensor(pair[0].y, pair[1].x) for pair in pairwise(blocks)):
        return _named_as_taken(chain, blocks)
    points = list(chain.points[:-1])
    following = tape.follower(blocks[-1])
    if following is not None:
        last = replace(chain.points[-1], path=following.path, index=following.index, at="input")
        points.append(last)
    return replace(chain, points=tuple(points), shapes=chain.shapes[: len(points)])


def _changed_between(before: Call, after: Call) -> bool:
    """Whether what a block gave is the state, and something was done to it before the next block took it."""
    taken, given, changed = before.values[0], before.values[1], after.values[0]
    if taken is None or given is None or changed is None:
        return False
    reached = LinearDependence(changed, [taken, given]).reached
    return (
        len(reached) == 1 and reached[0] is given
    )  # of a branch's output the state that it is added to is there as well


def _named_as_taken(chain: Chain, blocks: list[Call]) -> Chain:
    """A chain with as many states as the user's blocks have: one that was changed before a block took it is its input."""
    points = list(chain.points)
    if len(points) != len(blocks) + 1:
        return chain
    for depth, (before, after) in enumerate(pairwise(blocks), 1):
        if not _handed_on(before, after):
            points[depth] = replace(
                points[depth], layer=points[depth].layer + 1, site="pre", module=after.path
            )
    return replace(chain, points=tuple(points))


def _handed_on(before: Call, after: Call) -> bool:
    """Whether a block took what the one before it gave, as it was given: it may have been written in place in between."""
    given, taken = before.values[1], after.values[0]
    unchanged = given is None or taken is None or unchanged_origin(given) is unchanged_origin(taken)
    return same_tensor(before.y, after.x) and unchanged


def _with_changes(chain: Chain, blocks: list[Call]) -> Chain:
    """A chain with the states after each block and before the next one, where these differ."""
    points, shapes = [chain.points[0]], [chain.shapes[0]]
    for depth, (before, after) in enumerate(pairwise(blocks), 1):
        point, shape = chain.points[depth], chain.shapes[depth]
        if not _handed_on(before, after):
            points.append(replace(point, path=before.path, index=before.index, at="output"))
            shapes.append(before.y_shape)
            point = replace(point, layer=point.layer + 1, site="pre", module=after.path)
        points.append(point)
        shapes.append(shape)
    return replace(chain, points=(*points, chain.points[-1]), shapes=(*shapes, chain.shapes[-1]))


def _linked_chain(blocks: list[Call], name: str) -> Chain:
    """A chain of blocks that link; the state before a bridge between stages is the output of the block before it."""
    chain = _plain_chain(blocks, name)
    one_each = len(chain.points) == len(blocks) + 1
    if one_each and any(same_tensor(a.y, b.x) and not _handed_on(a, b) for a, b in pairwise(blocks)):
        return _with_changes(chain, blocks)
    points = list(chain.points)
    shapes = list(chain.shapes)
    for depth, (before, call) in enumerate(pairwise(blocks), 1):
        if call.x is None or (before.y is not None and not same_tensor(before.y, call.x)):
            points[depth] = replace(points[depth], path=before.path, index=before.index, at="output")
            shapes[depth] = before.y_shape
    return replace(chain, points=tuple(points), shapes=tuple(shapes))


def _plain_chain(blocks: list[Call], name: str) -> Chain:
    """A plain chain: the input of every block and the output of the last one."""
    # Where the shape changes there are stages, whose blocks are numbered from 0 each.
    one_shape = len({call.x_shape for call in blocks}) == 1
    layers = layer_numbers(blocks) if one_shape else list(range(len(blocks)))
    points = []
    for depth, call in enumerate(blocks):
        producer = blocks[depth - 1].path if depth else call.producer or "(input)"
        points.append(_hook_point(call, "input", layers, depth, producer))
    points.append(_hook_point(blocks[-1], "output", layers, len(blocks), blocks[-1].path))
    chain = Chain(
        name=name,
        points=tuple(points),
        connections=(),
        blocks=tuple(dict.fromkeys(call.path for call in blocks)),
        block_class="/".join(dict.fromkeys(type(call.module).__name__ for call in blocks)),
        shapes=(*(call.x_shape for call in blocks), blocks[-1].y_shape),
    )
    return with_branch_sums(chain, blocks)


def _hook_point(call: Call, at: str, layers: list[int], depth: int, producer: str) -> HookPoint:
    layer = layers[depth - 1] if depth else -1
    following = layers[depth] if depth < len(layers) else None
    site = "embed" if depth == 0 else ("mid" if following == layer else "post")
    return HookPoint(call.path, call.index, at, layer, site, producer)
