"""Which coefficients does each connection of streams apply in a forward? Proven in the first one, read again in the others."""

from __future__ import annotations

from depthscope.probes.connections.coefficients import Parts
from depthscope.probes.connections.proof import gather_evidence
from depthscope.probes.run.joints import sampled_joints
from depthscope.probes.session.session import Session


class AppliedConnections:
    """The parts of the connections of a model's first chain, forward by forward.

    ``session``: that stores every sequence of a forward.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.are_proven = (
            False  # whether the next states were recomputed from the parts of an unchanged forward
        )

    def of_last_forward(self) -> dict[int, Parts]:
        """The parts by the number of the connection, on the CPU; empty where the model has none.

        Raises ReconstructionError: Where those of the first forward do not give its states.
        """
        if not self._session.structure.connections:
            return {}
        sequences = sorted(self._session.reservoir.stored.values(), key=lambda sequence: sequence.index)
        joints = sampled_joints(self._session, sequences)
        if not self.are_proven:  # in the first forward alone: a changed one does not satisfy its own equation
            gather_evidence(joints)
            self.are_proven = True
        return {number: joint.parts for number, joint in enumerate(joints)}
