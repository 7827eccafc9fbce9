"""The learned numbers of the connections whose values are stored with every step of a recording: their biases and gates."""

from __future__ import annotations

import torch
from torch import nn

from depthscope.probes.statistics.weight_updates import unreadable
from depthscope.probes.structure.model_structure import Structure


class ConnectionParameters:
    """The biases and gates of the connections.

    These are the parameters that the coefficients are computed from, with no more elements than the n² + 2n coefficients and
    no axis as wide as a state: static logits and biases, and the scalars α that scale what depends on the token.

    ``model``: the user's model; its parameters are only read.
    ``structure``: what it was found to be.
    ``cells``: for each connection that has some, the parameter that each element of `values` belongs to.
    """

    def __init__(self, model: nn.Module, structure: Structure):
        self._model, self._structure = model, structure
        self._names: dict[int, tuple[str, ...]] = {}
        self.cells: dict[int, tuple[str, ...]] = {}
        own, listed = dict(model.named_parameters(remove_duplicate=False)), set[str]()
        for number, connection in enumerate(structure.connections):
            names = [name for name in connection.parameters if name in own and name not in listed]
            chosen = {name: own[name] for name in names if self._is_small(own[name])}
            listed.update(chosen)  # what several connections share is listed once
            if chosen:
                self._names[number] = tuple(chosen)
                self.cells[number] = tuple([name for name, of in chosen.items() for _ in range(of.numel())])

    def _is_small(self, parameter: nn.Parameter) -> bool:
        n = self._structure.num_streams
        width = self._structure.chains[0].shapes[0][-1]  # streams may be a part of it
        widths = {width, width // n, width * n}
        return (
            not unreadable(parameter)
            and parameter.numel() <= n * (n + 2)
            and not widths & set(parameter.shape)
        )

    def values(self, number: int) -> torch.Tensor | None:
        """The present values of a connection's biases and gates, one after another; None where it has none.

        Returns: A copy in float32, as long as its `cells`.
        """
        names = self._names.get(number, ())
        # By name, since an optimizer or a loader may have put others in their place.
        parameters = [self._model.get_parameter(name) for name in names]
        if not parameters or sum(each.numel() for each in parameters) != len(self.cells[number]):
            return None
        return torch.cat([each.detach().flatten().float() for each in parameters])
