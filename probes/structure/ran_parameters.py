"""Which parameters did a forward use? Those of embeddings and of heads that predict a vocabulary are left out."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from depthscope.probes.model.modules import all_modules, own_parameters
from depthscope.probes.structure.tape import Tape


class RanParameters:
    """The parameters of the modules that ran, without embeddings and the heads that predict their vocabulary.

    In a small model with a large vocabulary these are most of all parameters. A tower that was not called is no part of what
    the forward did.

    Parameters
    ----------
    tape : Tape
        The calls of a forward.
    model : Module
        The model.

    Attributes
    ----------
    sizes : dict of int to int
        By the identity of a parameter, its number of elements; 0 for those of embeddings and heads.
    total : int
        The sum of all sizes.
    """

    def __init__(self, tape: Tape, model: nn.Module):
        # A head that is tied to the embedding shares its parameter; one that is not has as many outputs.
        modules = all_modules(model)
        vocabularies = {module.num_embeddings for module in modules if isinstance(module, nn.Embedding)}
        heads = (
            module
            for module in modules
            if isinstance(module, nn.Embedding)
            or (isinstance(module, nn.Linear) and module.out_features in vocabularies)
        )
        outside = set(map(id, own_parameters(heads)))
        called = {id(call.module): call.module for call in tape.calls}
        ran: list[nn.Module] = []
        for module in called.values():
            # A module of which no part was called may use the weights of its parts all the same, as torch's attention does.
            parts_ran = any(id(child) in called for child in module._modules.values())
            ran += [module] if parts_ran or not module._modules else all_modules(module)
        self.sizes = {id(p): 0 if id(p) in outside else p.numel() for p in own_parameters(ran)}
        self.total = sum(self.sizes.values())

    def within(self, module: nn.Module) -> set[int]:
        """Identities of the parameters of a module and its parts that were used."""
        return {id(p) for p in own_parameters(all_modules(module)) if id(p) in self.sizes}

    def own(self, modules: Iterable[nn.Module]) -> set[int]:
        """Identities of the parameters that some modules have themselves, and that were used."""
        return {id(p) for p in own_parameters(modules) if id(p) in self.sizes}

    def share(self, parameters: Iterable[int]) -> float:
        """What some parameters are of all that were used, between 0 and 1."""
        return sum(self.sizes[parameter] for parameter in parameters) / (self.total or 1)


def ran_parameters(tape: Tape, model: nn.Module) -> RanParameters:
    """The parameters that the forward of a tape used; counted once a tape, after the forward."""
    if tape.ran is None:
        tape.ran = RanParameters(tape, model)
    return tape.ran
