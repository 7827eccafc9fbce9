"""Which coefficients does each connection of streams apply in a forward? Proven in the first one, read again in the others."""

from __future__ import annotations

from dataclasses import replace

from depthscope.probes.connections.applied import as_applied
from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.family import ReconstructionError
from depthscope.probes.connections.proof import (
    Evidence,
    Joint,
    applied_matrix,
    gather_evidence,
    solved_branch,
)
from depthscope.probes.run.joints import sampled_joints
from depthscope.probes.session.session import Session


class AppliedConnections:
    """The parts of the connections of a model's first chain, forward by forward.

    Parameters
    ----------
    session : Session
        That stores every sequence of a forward.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._evidence: Evidence | None = None
        self._solved = False  # from the states, where other matrices are applied than computed

    @property
    def are_proven(self) -> bool:
        """Whether the next states were recomputed from the parts of an unchanged forward."""
        return self._evidence is not None

    def of_last_forward(self) -> dict[int, Parts]:
        """The parts by the number of the connection, on the CPU; empty where they cannot be known in a changed forward.

        Raises ReconstructionError: Where those of the first forward do not give its states.
        """
        if not self._session.structure.connections:
            return {}
        sequences = sorted(self._session.reservoir.stored.values(), key=lambda sequence: sequence.index)
        joints = sampled_joints(self._session, sequences)
        if self._evidence is None:
            # In the first forward alone: a changed one does not satisfy its own equation.
            joints = self._proven(joints)
        elif self._solved:
            return {}  # the states are changed ones now
        return {number: self._as_applied(number, joint) for number, joint in enumerate(joints)}

    def _proven(self, joints: list[Joint]) -> list[Joint]:
        try:
            self._evidence = gather_evidence(joints)
        except ReconstructionError:
            joints, replaced = as_applied(joints)
            if not replaced:
                raise
            self._solved = True
            self._evidence = gather_evidence(joints)
        return joints

    def _as_applied(self, number: int, joint: Joint) -> Parts:
        """H_res destination by source, and the branch's output, solved for where none was seen."""
        assert self._evidence is not None
        reading, parts = self._evidence.reading(number), joint.parts
        matrix, given = applied_matrix(joint, reading), parts.branch_out
        if given is None or not reading.observed:
            rest = joint.x_out.double() - matrix.double() @ joint.x_in.double()
            given = solved_branch(rest, parts.write.double())
        return replace(parts, mix=None if parts.mix is None else matrix, branch_out=given)
