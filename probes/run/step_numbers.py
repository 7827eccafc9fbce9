"""What does one measured step add to a run? The numbers of its row, by group and variable, without making a dataset."""

from __future__ import annotations

from typing import Any

from depthscope.diagnostics.schema.groups import group_path
from depthscope.probes.run.build_run import Proven
from depthscope.probes.run.groups import chain_groups
from depthscope.probes.run.statistics_dataset import StepStatistics, step_variables
from depthscope.probes.run.weight_variables import weight_variables
from depthscope.probes.session.session import Session


def step_numbers(session: Session, row: StepStatistics, proven: Proven) -> dict[str, tuple[Any, ...]]:
    """The row of one step, as `build_run` has it in ``/statistics``.

    Returns: By ``statistics/variable``, or ``statistics/group/variable`` where the run has several groups; without the
    step.
    """
    numbers: dict[str, tuple[Any, ...]] = {}
    chains = session.structure.chains
    for number in range(len(chains)):
        groups = chain_groups(session, number)
        starts = [group.depths[0] for group in groups]
        for stage, (name, depths) in enumerate(groups):
            variables, _ = step_variables(
                number, depths, [row], proven.evidence, session.observer.parameter_cells
            )
            variables.update(weight_variables([row.weights], chains, number, starts, stage)[0])
            for label, (dims, values, *attrs) in variables.items():
                dims = (dims,) if isinstance(dims, str) else dims
                if dims[0] == "step":
                    numbers[f"{group_path('statistics', name)}/{label}"] = (dims[1:], values[0], *attrs)
    return numbers
