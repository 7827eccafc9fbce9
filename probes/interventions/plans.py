"""What is to be tried on a model, and where? Plans name places; a change is one experiment, with the edits of its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.experiments import kind_named
from depthscope.probes.interventions.branch_tensors import BranchOutput
from depthscope.probes.interventions.errors import InterventionError
from depthscope.probes.interventions.model_under_test import Edit, ModelUnderTest

Numbers: TypeAlias = int | Iterable[int] | None


@dataclass(frozen=True)
class Plan:
    """What is to be tried, and where; without places every place of the model is tried, one at a time.

    Parameters
    ----------
    kind : str
        Name of an `ExperimentKind`.
    blocks, connections, depths, streams : tuple of int, optional
        Where.
    together : bool
        All places at once, as one experiment.
    source : object, optional
        Of ``patch``: where the states come from.
    tokens : tuple of int, optional
        Of ``patch`` and the stream kinds: the positions that are changed; all by default. Of ``skip_past`` the first half.
    """

    kind: str
    blocks: tuple[int, ...] | None = None
    connections: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    streams: tuple[int, ...] | None = None
    together: bool = False
    source: Any = None
    tokens: tuple[int, ...] | None = None


def plan(
    kind: str,
    *,
    blocks: Numbers = None,
    connections: Numbers = None,
    depths: Numbers = None,
    streams: Numbers = None,
    together: bool = False,
    source: Any = None,
    tokens: Numbers = None,
) -> Plan:
    """What is to be tried, and where.

    Parameters
    ----------
    kind : str
        ``"skip"``, ``"skip_past"``, ``"repeat"``, ``"swap"`` (of blocks); ``"identity"``, ``"uniform"``, ``"mean"``,
        ``"sinkhorn"`` (in place of H_res); ``"drop_stream"``, ``"freeze_stream"``, ``"rescue"``, ``"massive"``, ``"patch"``,
        ``"bypass"``, ``"without_attention"``, ``"merge_tokens"``, ``"without_mean"``,
        ``"merge_streams"`` (of the state at a depth).
    blocks, connections, depths, streams : int or iterable of int, optional
        Where; every place by default. A depth means the block or connection that ends there.
    together : bool
        All places at once, as one experiment.
    source : DataTree, batch or Module, optional
        Of ``"patch"``: a run, another batch of the same shape, or another model.
    tokens : int or iterable of int, optional
        Positions that are changed; of ``"skip_past"`` the later ones are measured.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        For an unknown kind.
    """
    found = kind_named(kind)
    if found.name == "patch" and source is None:
        raise InputError("patch needs source=: a run, another batch of the same shape, or another model")
    return Plan(
        found.name,
        _numbers(blocks),
        _numbers(connections),
        _numbers(depths),
        _numbers(streams),
        together,
        source,
        _numbers(tokens),
    )


def _numbers(given: Numbers) -> tuple[int, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, int) else tuple(int(number) for number in given)


@dataclass(frozen=True)
class Change:
    """One experiment: a name for people, where it is, and the edits of its forward.

    ``name``: such as ``"skip block 3"``.
    ``kind``: its kind.
    ``edits``: ``edits(model)`` returns the edits by depth; it may run the model to learn them.
    ``block, depth, connection, stream``: where; −1 where it is none alone.
    ``compared``: name of the change that this one undoes in part, for the share that is rescued.
    ``measured``: (B, T), true on the tokens that are measured; all by default.
    """

    name: str
    kind: str
    edits: Callable[[ModelUnderTest], Mapping[Any, Edit]]
    block: int = -1
    depth: int = -1
    connection: int = -1
    stream: int = -1
    compared: str = ""
    measured: torch.Tensor | None = None


def selected(depth: int, connections: Iterable[int], block: int, wanted: Plan) -> bool:
    """Whether a place is among those that a plan asks for."""
    given = [
        (wanted.depths, {depth}),
        (wanted.connections, set(connections)),
        (wanted.blocks, {block}),
    ]
    asked = [set(numbers) & here for numbers, here in given if numbers is not None]
    return not asked or all(asked)


# --- what edits have in common


def require_sums_of_blocks(kind: str, model: ModelUnderTest) -> None:
    """Refuse a model whose blocks read more than the state before them; if they can be silenced, other kinds alone."""
    silent = kind in ("skip", "bypass") and model.chain.over_depth
    if (model.chain.over_depth or model.chain.history) and not silent:
        raise InterventionError(
            f"{kind}: blocks of this model read sums over all earlier depths ({model.structure.family}), so that the "
            "state before a block is not what the later ones would read without it; patch or drop states at a depth instead"
        )


def constant(value: torch.Tensor) -> Edit:
    """The edit that puts a value in the place of a state of its shape."""

    def edit(state: torch.Tensor, seen: Any) -> torch.Tensor:
        if value.shape != state.shape:
            raise InterventionError(
                f"a state of shape {tuple(value.shape)} cannot take the place of one of {tuple(state.shape)} (sequence, "
                "token, stream, feature): the blocks between them change the width or the tokens"
            )
        return value.clone()

    return edit


def fitting(value: torch.Tensor, state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The value, where it has the shape of the state whose place it takes."""
    if value.shape != state.shape:
        raise InterventionError(
            f"the block from depth {start} to {stop} turns a state of shape {tuple(value.shape)} into one of "
            f"{tuple(state.shape)} (sequence, token, stream, feature); a block that changes the shape cannot be skipped"
        )
    return value


def bypassing(start: int, stop: int) -> Callable[[ModelUnderTest], Mapping[Any, Edit]]:
    """The edits that put the state at one depth in the place of that at a later one.

    Where branches read sums over depth, what those between the two give is zero in every sum.
    """

    def edits(model: ModelUnderTest) -> Mapping[Any, Edit]:
        if not model.chain.over_depth:
            return {stop: lambda state, seen: fitting(seen[start], state, start, stop).clone()}
        return {
            BranchOutput(number): lambda given, seen: torch.zeros_like(given)
            for number in between(start, stop, model)
        }

    return edits


def between(start: int, stop: int, model: ModelUnderTest) -> list[int]:
    """The connections from one depth to a later one."""
    return [n for n, link in enumerate(model.chain.connections) if start <= link.depth_in < stop]


def positions(numbers: tuple[int, ...], count: int) -> torch.Tensor:
    """Which of so many positions are among the numbers."""
    outside = [number for number in numbers if not 0 <= number < count]
    if outside:
        raise InterventionError(f"position {outside[0]} is outside of 0 … {count - 1}")
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[list(numbers)] = True
    return chosen
