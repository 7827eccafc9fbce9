"""How does a run come from a session? Trace, statistics, coverage and attributes, put together and validated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr

from depthscope.diagnostics import schema
from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.connections.proof import Evidence, Joint, Parts, gather_evidence
from depthscope.probes.run.attributes import memory_facts, run_attributes
from depthscope.probes.run.connection_remarks import all_remarks
from depthscope.probes.run.connection_variables import weight_variables
from depthscope.probes.run.coverage import chain_groups, coverage, coverage_counts, coverage_dataset
from depthscope.probes.run.statistics_dataset import StepStatistics, statistics_dataset, step_variables
from depthscope.probes.run.trace_dataset import trace_dataset
from depthscope.probes.session.forward import Sequence, padded, token_masks
from depthscope.probes.session.session import Session
from depthscope.probes.statistics.token_sums import TokenSums

Variables: TypeAlias = dict[str, Any]


def prove(session: Session) -> tuple[list[Sequence], Evidence]:
    """The sequences that a session sampled, and what they prove of the connections of its model.

    ``session``: with its chains found and at least one sequence sampled.
    Raises ReconstructionError: Where a connection's coefficients do not give its next state.
    """
    sequences = session.step.reservoir.in_order()
    joints = sampled_joints(session, sequences)
    return sequences, gather_evidence(joints) if joints else Evidence()


def build_run(
    session: Session,
    row: StepStatistics | None,
    pooled: list[TokenSums],
    *,
    attrs: Mapping[str, Any] | None = None,
    token_text: Any = None,
    described: bool = False,
    metrics: Mapping[str, xr.Dataset] | None = None,
) -> xr.DataTree:
    """Build a validated run from what a session recorded.

    ``session``: with its chains found and at least one sequence sampled.
    ``row``: of a measured step; without one the run has no statistics.
    ``pooled``: statistics of all steps since the weights last changed, one per chain.
    ``token_text``: text of every token, by the sequence's index.
    ``described``: leave out what the weights say, and the digests by which runs are compared.
    ``metrics``: what was measured in the step, by group.
    Raises ReconstructionError: Where a connection's coefficients do not give its next state.
    """
    # The proof first: a run whose connections do not give their next states is refused, not saved with a warning.
    sequences, evidence = prove(session)
    remarks = all_remarks(session, evidence, [sequence.index for sequence in sequences])
    covered = coverage(session, evidence)
    chains = session.structure.chains
    trace: dict[str, xr.Dataset] = {}
    statistics: dict[str, xr.Dataset] = {}
    for number, name, depths, numbers, facts, coords in _groups(session, row):
        trace[name] = trace_dataset(
            session, number, depths, sequences, evidence, token_text, described=described
        )
        if row is not None:
            of_group = (chains[number], depths, row.step, pooled[number], numbers, coords)
            measured = statistics_dataset(*of_group, has_connections=bool(evidence.joints))
            statistics[name] = measured.assign(facts)
    memory = memory_facts(next(iter(trace.values())), session.observer.dtype)
    # The only group of a model with one chain and one stage has no name: its variables are the group's own.
    return schema.create_run(
        trace if list(trace) != [""] else trace[""],
        statistics=(statistics if list(statistics) != [""] else statistics[""]) or None,
        metrics=(metrics if list(metrics) != [""] else metrics[""]) if metrics else None,
        coverage=coverage_dataset(covered),
        attrs={
            **run_attributes(session, sequences, evidence, digests=not described),
            **coverage_counts(covered),
            **({"remarks": remarks} if remarks else {}),
            **({"memory": memory} if memory else {}),
            **(attrs or {}),
        },
    )


def step_numbers(session: Session, row: StepStatistics) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of one step, as `build_run` has it in ``/statistics``, without the step; and its coordinates.

    Both by ``statistics/variable``, or ``statistics/group/variable`` where the run has several groups.
    """
    numbers: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for _, name, _, of_group, _, labels in _groups(session, row):
        path = group_path("statistics", name)
        numbers |= {f"{path}/{label}": value for label, value in of_group.items()}
        coords |= {f"{path}/{label}": value for label, value in labels.items()}
    return numbers, coords


def _groups(
    session: Session, row: StepStatistics | None
) -> Iterator[tuple[int, str, list[int], Variables, Variables, Variables]]:
    """Number of the chain, name and depths of each group; its numbers in a step, what has no step, and coordinates."""
    chains, joined = session.structure.chains, len(session.structure.connections)
    cells_of = {
        number: tuple([name for name, size in of.items() for _ in range(size)])
        for number, of in session.observer.parameters.items()
    }
    for number in range(len(chains)):
        groups = chain_groups(session, number)
        starts = [group.depths[0] for group in groups]
        for stage, (name, depths) in enumerate(groups):
            if row is None:
                yield number, name, depths, {}, {}, {}
                continue
            found, cells = step_variables(number, depths, row, joined, cells_of)
            weights, facts, modules = weight_variables(row.weights, chains, number, starts, stage)
            yield number, name, depths, found | weights, facts, cells | modules


def sampled_joints(session: Session, sequences: list[Sequence]) -> list[Joint]:
    """States and parts around every stream connection, from the sampled sequences.

    Returns: One for each connection, in order; tensors (K, T, …).
    """
    # Chain 0: only the first chain has stream connections.
    if not (connections := session.structure.connections):
        return []
    mask = torch.from_numpy(np.stack(token_masks(sequences, 0)))

    @cache  # one connection's next state is the state before the next one
    def states(depth: int) -> torch.Tensor:
        return torch.stack([padded(sequence.states[0, depth], mask.shape[1]) for sequence in sequences])

    return [_joint(session, number, sequences, mask, states) for number in range(len(connections))]


def _joint(
    session: Session,
    number: int,
    sequences: list[Sequence],
    mask: torch.Tensor,
    states: Callable[[int], torch.Tensor],
) -> Joint:
    sampled = [parts for s in sequences if isinstance(parts := s.parts[0, number], Parts)]
    link = session.structure.connections[number]

    def stack(name: str) -> Any:
        """One part of every sequence, (K, T, …); None where some sequence lacks it."""
        found = [padded(part, mask.shape[1]) for of in sampled if (part := getattr(of, name)) is not None]
        return torch.stack(found) if len(found) == len(sampled) else None

    constant = stack("constant")
    after = states(link.depth_out)
    return Joint(
        path=link.path,
        x_in=states(link.depth_in),
        x_out=after if constant is None else after - constant,
        parts=Parts(*map(stack, ("mix", "read", "write", "branch_in", "branch_out"))),
        mask=mask,
        # In which the model multiplies them, so that the tolerance is that of its rounding: autocast's, where it is on.
        dtype=session.observer.precision,
        casts=() if session.structure.read is None else session.structure.read.casts,
    )
