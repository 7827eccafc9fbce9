"""Which faults are planted, how, and where must they be found?

Each is a mechanism and not a symptom: a function that changes one thing in a healthy network of its hosts and returns the
place. `says` are the verdicts that name the mechanism; what follows from it (an explosion after a gain) does not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import nn

from depthscope import probes
from depthscope.diagnostics import Severity
from tests.models import stream_bugs
from tests.verdicts import measuring
from tests.verdicts.networks import PLAIN, Connection, Mixing, sinkhorn
from tests.verdicts.parts import last_layer
from tests.verdicts.places import Place
from tests.verdicts.plans import Plan

WARN, FAIL, INFO = Severity.WARN, Severity.FAIL, Severity.INFO


@dataclass(frozen=True)
class Network:
    """A host with its plan, to be spoilt."""

    model: Any
    plan: Plan
    rng: random.Random

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.blocks)

    @property
    def connections(self) -> list[Connection]:
        return [module for module in self.model.modules() if isinstance(module, Connection)]

    def block(self, first: int = 0) -> int:
        """A block that is neither before `first` nor the last."""
        return self.rng.randrange(first, len(self.blocks) - 1)

    def connection(self) -> int:
        """A connection after which there are others."""
        return self.rng.randrange(1, len(self.connections) - 2)

    def after(self, number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Place:
        """Change the state behind a plain block: everything from there on may show it."""
        self.blocks[number].after = change
        return Place(number + 1, len(self.blocks), begins=True)

    def everywhere_after(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Place:
        for block in self.blocks:
            block.after = change
        return Place(1, len(self.blocks), ends=True)

    def mixes(self, change: Callable[[torch.Tensor], torch.Tensor], only: int | None = None) -> Place:
        """Change H_res, at all connections or at one."""
        return self.weights(lambda write, mix, read: (write, change(mix), read), only)

    def weights(self, change: Callable[..., tuple], only: int | None = None) -> Place:
        for number, connection in enumerate(self.connections):
            if only is None or number == only:
                connection.change = lambda weights: change(*weights)
        count = len(self.connections)
        return Place(1, count, ends=True) if only is None else Place(only + 1, count, begins=True)


@dataclass(frozen=True)
class Fault:
    """One mechanism."""

    title: str  # for the table
    severity: Severity  # the least that it must be told with
    says: tuple[str, ...]  # verdicts that name it
    hosts: tuple[str, ...]  # families that it is planted in
    plant: Callable[[Network], Place]  # changes the network and returns the place
    age: str = "either"  # "fresh", "trained", or "either"
    early: bool = False  # whether it is planted before training
    streams: tuple[int, ...] = (2, 3, 4)  # of hosts with streams
    # makes the run, where it is no capture of the planted network
    measure: Callable[[Network, Place], xr.DataTree] | None = None
    plan: tuple[tuple[str, Any], ...] = ()  # what the plan must have
    # whether it is harmful though the loss cannot show it: training is cut off, or what is there is not used
    fact: bool = False


FAULTS: list[Fault] = []

# What is normal at the start and a fault later is planted in networks that are past the start beyond doubt.
GROWN = (("steps", 100), ("rate", 3e-3), ("blocks", 4))


def fault(
    title: str, severity: Severity, *says: str, hosts: tuple[str, ...], **more: Any
) -> Callable[..., Any]:
    """Declare a mechanism."""

    def declare(plant: Callable[[Network], Place]) -> Callable[[Network], Place]:
        FAULTS.append(Fault(title, severity, says, hosts, plant, **more))
        return plant

    return declare


ANY = tuple(PLAIN)
WITH_SKIP = (
    "pre-norm transformer", "sandwich-norm transformer", "parallel branches", "pre-norm MLP", "RMSNorm and SwiGLU",
    "mixture of experts", "recurrent network",
)  # fmt: skip
VISION = ("ViT", "MLP-Mixer")
DIFFERENTIABLE = (*WITH_SKIP, *VISION, "mHC", "HC", "mHC-lite, dynamic")
FREE_OF_NORMS = ("transformer without norms", "MLP without norms")
ATTENDING = tuple(name for name in PLAIN if "MLP" not in name and name != "recurrent network")
MIXED = ("HC", "mHC", "mHC-lite", "circulant", "orthogonal", "mHC, dynamic")
STOCHASTIC = ("mHC", "mHC-lite", "circulant", "mHC-lite, dynamic")

# --- size and numbers ---


@fault("NaN of one token at a block", FAIL, "not_finite", hosts=ANY)
def _(net):
    place = net.rng.randrange(net.plan.length)

    def spoil(x):
        x = x.clone()
        x[0, place] = torch.nan
        return x

    return net.after(net.block(), spoil)


@fault("overflow in a branch", FAIL, "not_finite", hosts=ATTENDING[:4])
def _(net):
    number = net.block()
    with torch.no_grad():
        net.blocks[number].branches[-1][2].weight.fill_(3e38)
    return Place(number + 1, len(net.blocks), begins=True)


@fault("a block multiplies the state by zero", FAIL, "dead_state", hosts=ANY)
def _(net):
    # Where branches begin at zero, nothing ever fills the state again.
    return net.after(net.block(), lambda x: 0 * x)


@fault("the state grows by a factor in every block", WARN, "exploding_state", hosts=(*WITH_SKIP, *FREE_OF_NORMS))  # fmt: skip
def _(net):
    factor = 10 ** (net.rng.uniform(6, 10) / len(net.blocks))
    return net.everywhere_after(lambda x: factor * x)


@fault("one block multiplies the state by 1e5 or more", WARN, "exploding_state", hosts=(*WITH_SKIP, *FREE_OF_NORMS,
       *VISION))  # fmt: skip
def _(net):
    factor = 10 ** net.rng.uniform(5, 7)
    return net.after(net.block(), lambda x: factor * x)


@fault("the state shrinks by a factor in every block", WARN, "vanishing_state", hosts=FREE_OF_NORMS)
def _(net):
    factor = 10 ** (-net.rng.uniform(6, 10) / len(net.blocks))
    for module in net.model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)  # a bias alone keeps a state alive
    return net.everywhere_after(lambda x: factor * x)


@fault("a ResNet without norms grows through its stages", WARN, "exploding_state",
       hosts=("ResNet without norms",))  # fmt: skip
def _(net):
    # A factor of 1e6 in all, and of a hundred within each of the three stages.
    factor = 10 ** (net.rng.uniform(6, 8) / len(net.blocks))
    net.everywhere_after(lambda x: factor * x)
    return Place()


# --- gradients ---


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


def _scale_gradient(net: Network, factor: float) -> Place:
    number = net.block(1)
    net.blocks[number].before = lambda x: ScaledGradient.apply(x, factor)
    return Place(0, (2 if net.plan.streams > 1 else 1) * number, ends=True)


def _scale_every_gradient(net: Network, factor: float) -> Place:
    for block in net.blocks:
        block.before = lambda x: ScaledGradient.apply(x, factor ** (1 / len(net.blocks)))
    return Place()


for _title, _says, _plant, _sign in (
    ("the gradient is multiplied behind a block", "exploding_gradient", _scale_gradient, 1),
    ("the gradient is scaled down behind a block", "vanishing_gradient", _scale_gradient, -1),
    ("the gradient is NaN behind a block", "not_finite", _scale_gradient, float("nan")),
    ("the gradient grows in every block", "exploding_gradient", _scale_every_gradient, 1),
    ("the gradient shrinks in every block", "vanishing_gradient", _scale_every_gradient, -1),
):
    fault(_title, FAIL if _sign != _sign else WARN, _says, hosts=DIFFERENTIABLE, fact=_sign != _sign)(
        lambda net, plant=_plant, sign=_sign: plant(net, 10 ** (sign * net.rng.uniform(3, 6)))
    )


@fault("branches without norms begin three times too large", WARN, "exploding_state", "exploding_gradient",
       hosts=("MLP without norms",), age="fresh", plan=(("blocks", 10),))  # fmt: skip
def _(net):
    for block in net.blocks:
        block.fixed = 3.0
    return Place(ends=True)


@fault("layers without skips shrink state and gradient", WARN, "vanishing_gradient", "vanishing_state",
       hosts=("MLP without norms",), age="fresh", plan=(("blocks", 16),))  # fmt: skip
def _(net):
    for block in net.blocks:
        block.skip, block.fixed = 0.0, 0.3
    return Place()


@fault(
    "a block detaches its input", WARN, "cut_gradient",
    hosts=(*WITH_SKIP, *FREE_OF_NORMS, *VISION, "post-norm transformer", "mHC"), fact=True)  # fmt: skip
def _(net):
    number = net.block(1)
    net.blocks[number].before = torch.detach
    return Place(0, (2 if net.plan.streams > 1 else 1) * number, ends=True)


# --- representations ---


@fault("tokens become equal at a block", WARN, "rank_collapse", hosts=(*WITH_SKIP, *VISION))
def _(net):
    return net.after(net.block(), lambda x: torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, 1e-3))


@fault("attention without skips", WARN, "rank_collapse", hosts=("transformer without norms",), age="fresh",
       plan=(("blocks", 8),))  # fmt: skip
def _(net):
    for block in net.blocks:
        block.skip, block.branches[0].causal = 0.0, False
        block.branches, block.fixed = block.branches[:1], 1.0
    return Place(1, len(net.blocks), ends=True)


def _direction(net: Network) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(net.plan.width), dim=0)


@fault("a bottleneck of one direction", WARN, "lost_directions", hosts=(*WITH_SKIP, *VISION))
def _(net):
    u = _direction(net)
    return net.after(net.block(), lambda x: (x @ u).unsqueeze(-1) * u)


@fault("one common vector in all tokens", WARN, "common_vector", "rank_collapse",
       hosts=WITH_SKIP)  # fmt: skip
def _(net):
    u, strength = _direction(net), net.rng.uniform(15, 40)
    return net.after(net.block(), lambda x: x + strength * x.detach().norm(dim=-1).mean() * u)


@fault("massive activations of a third of the tokens", WARN, "massive_activations", hosts=WITH_SKIP)
def _(net):
    feature = net.rng.randrange(net.plan.width)

    def spike(x):
        added = torch.zeros_like(x)
        added[:, ::3, feature] = 5000 * x.detach().abs().mean() + 500
        return x + added

    return net.after(net.block(), spike)


@fault("an idle block between active ones", WARN, "idle_layer", hosts=("pre-norm transformer", "pre-norm MLP",
       "parallel branches"), age="trained", fact=True)  # fmt: skip
def _(net):
    number = net.block()
    for branch in net.blocks[number].branches:
        nn.init.zeros_(last_layer(branch).weight)
        nn.init.zeros_(last_layer(branch).bias)
    return Place(number + 1, number + 1, begins=True, ends=True)


SAME = ("same_representation",)
# Whose branches end in one linear layer, `parts.last_layer`.
LINEAR_ENDS = ("pre-norm transformer", "parallel branches", "pre-norm MLP")


@fault("one representation in all layers, constructed", FAIL, *SAME, hosts=LINEAR_ENDS, age="trained",
       plan=(*GROWN, ("blocks", 6)), fact=True)  # fmt: skip
def _(net):
    with torch.no_grad():
        for block in net.blocks:
            for branch in block.branches:
                last_layer(branch).weight.mul_(1e-3)
                last_layer(branch).bias.mul_(1e-3)
    return Place()


@fault("one representation in all layers, trained so", FAIL, *SAME, age="trained", early=True,
       hosts=("pre-norm transformer", "pre-norm MLP", "mHC"), plan=(*GROWN, ("blocks", 6)), fact=True)  # fmt: skip
def _(net):
    # Branches that see a normalised state write less and less of one that begins so large.
    with torch.no_grad():
        for parameter in (net.model.embed.weight, net.model.place):
            parameter.mul_(1000)
        if net.plan.streams > 1:
            net.model.offsets.mul_(0)
    return Place()


@fault("attention attends to single tokens", WARN, "attention_entropy_collapse", hosts=ATTENDING)  # fmt: skip
def _(net):
    number = net.block()
    with torch.no_grad():
        net.blocks[number].branches[0].qkv.weight[: 2 * net.plan.width].mul_(60)
    return Place(number + 1, number + 1, begins=True, ends=True)


# --- training ---


def _updated(rate: float | None) -> Callable[[Network, Place], xr.DataTree]:
    """A run of two steps in which one module has another learning rate, or is not known to the optimizer."""

    def measure(net: Network, place: Place) -> xr.DataTree:
        special = list(net.model.get_submodule(place.module).parameters())
        others = [p for p in net.model.parameters() if all(p is not one for one in special)]
        groups = [{"params": others, "lr": 1e-3}]
        groups += [{"params": special, "lr": rate}] if rate is not None else []
        return measuring.recorded(net.model, net.plan, torch.optim.Adam(groups))

    return measure


def _of_one_block(net: Network) -> Place:
    return Place(module=f"blocks.{net.block()}")


fault("the optimizer does not have a module", WARN, "untrained_module", hosts=WITH_SKIP, age="fresh",
      measure=_updated(None))(_of_one_block)  # fmt: skip
fault("a learning rate of 1 for a module", WARN, "large_update", hosts=WITH_SKIP, age="fresh",
      measure=_updated(1.0))(_of_one_block)  # fmt: skip


@fault("a module frozen in training", WARN, "untrained_module", hosts=WITH_SKIP, age="fresh",
       measure=_updated(None))  # fmt: skip
def _(net):
    place = Place(module=f"blocks.{net.block(1)}")
    net.model.get_submodule(place.module).requires_grad_(False)
    return place


@fault("the optimizer does not have a connection", WARN, "untrained_module", hosts=("mHC", "HC"), age="fresh",
       measure=_updated(None))  # fmt: skip
def _(net):
    return Place(module=f"blocks.{net.block()}.connections.{net.rng.randrange(2)}")


# --- mixing ---


@fault("every mixing matrix amplifies", FAIL, "gain_explosion", hosts=MIXED)
def _(net):
    factor = 10 ** (net.rng.uniform(2.5, 4) / len(net.connections))
    return net.mixes(lambda mix: factor * mix)


@fault("one mixing matrix amplifies", FAIL, "gain_explosion", hosts=MIXED)
def _(net):
    factor = net.rng.uniform(200, 1000)
    return net.mixes(lambda mix: factor * mix, net.connection())


@fault("one connection amplifies 400 × for one token in 256", WARN, "gain_explosion",
       hosts=MIXED, plan=(("sequences", 8), ("length", 32)))  # fmt: skip
def _(net):
    sequence, place = net.rng.randrange(8), net.rng.randrange(32)

    def amplify(mix):
        factor = torch.ones(mix.shape[:2])
        if mix.shape[:2] == (8, 32):  # the task's own batches are smaller
            factor[sequence, place] = 400.0
        return factor[..., None, None] * mix

    return net.mixes(amplify, net.connection())


def _centred(n: int) -> torch.Tensor:
    return torch.eye(n) - torch.full((n, n), 1 / n)


@fault("differences between streams grow while sums stay 1", WARN, "gain_explosion",
       hosts=("HC", "orthogonal"),
       plan=(("start", "apart"),))  # fmt: skip
def _(net):
    centred, factor = _centred(net.plan.streams), 10 ** (net.rng.uniform(2.5, 4) / len(net.connections))
    # Exactly 1 in every sum, which the free matrices of a host are not.
    return net.mixes(lambda mix: 1 / net.plan.streams + factor * centred @ mix @ centred)


@fault("the mixing is stuck at the identity after training", WARN, hosts=("HC", *STOCHASTIC),
       age="trained", plan=(("start", "apart"), *GROWN))  # fmt: skip
def _(net):
    net.mixes(lambda mix: torch.lerp(torch.eye(net.plan.streams).expand_as(mix), mix, 1e-4))
    return Place()


@fault("one connection mixes uniformly", WARN, "stream_collapse", hosts=("HC", *STOCHASTIC), plan=(("start",
       "apart"),))  # fmt: skip
def _(net):
    return net.mixes(lambda mix: torch.full_like(mix, 1 / net.plan.streams), net.connection())


# Published networks of streams begin so.
@fault("mixing makes the streams equal over depth", WARN, "stream_collapse", hosts=("HC", *STOCHASTIC), age="trained",
       plan=(("start", "apart"), ("blocks", 6)))  # fmt: skip
def _(net):
    share, n = net.rng.uniform(0.45, 0.7), net.plan.streams
    return net.mixes(lambda mix: torch.lerp(mix, torch.full_like(mix, 1 / n), share))


@fault("a stream is no longer fed", WARN, "attenuation", hosts=MIXED)
def _(net):
    stream = net.rng.randrange(net.plan.streams)

    def starve(mix):
        factor = torch.ones(net.plan.streams)
        factor[stream] = 0.01
        return factor[:, None] * mix

    return net.mixes(starve, net.connection())


@fault("Sinkhorn of one round", WARN, "sinkhorn_not_converged", hosts=("mHC",), streams=(3, 4))
def _(net):
    for connection in net.connections:
        connection.mixing = Mixing(lambda logits, n: sinkhorn(logits, 1), connection.mixing.logits)
        with torch.no_grad():
            connection.logits.copy_(2 * torch.randn_like(connection.logits))
    return Place()


@fault("negative entries in what should be doubly stochastic", WARN, "negative_mixing", hosts=STOCHASTIC)
def _(net):
    n, over = net.plan.streams, net.rng.uniform(1.2, 1.4)
    return replace(net.mixes(lambda mix: torch.lerp(torch.full_like(mix, 1 / n), mix, over)), ends=False)


@fault("NaN in a mixing matrix", FAIL, "not_finite", hosts=MIXED)
def _(net):
    return net.mixes(lambda mix: mix * torch.nan, net.connection())


@fault("the mixing's logits are detached", WARN, "unlearnable_mixing", hosts=STOCHASTIC, plan=(("start",
       "apart"),), fact=True)  # fmt: skip
def _(net):
    for connection in net.connections:
        connection.change_logits = torch.detach
    return Place()


# --- streams ---


def _scaled(net: Network, factors: torch.Tensor, which: str) -> Place:
    """Multiply read or write weights of the streams at every connection."""

    def change(write, mix, read):
        return (write * factors, mix, read) if which == "write" else (write, mix, read * factors)

    return net.weights(change)


def _one(net: Network, value: float, others: float = 1.0) -> tuple[torch.Tensor, str]:
    stream = net.rng.randrange(net.plan.streams)
    factors = torch.full((net.plan.streams,), others)
    factors[stream] = value
    return factors, str(stream)


# Not in HC: a connection that reads one stream alone reads it all the same after its norm, however small the weight.
@fault("a stream is never read", WARN, "unused_stream", hosts=STOCHASTIC, streams=(3, 4))
def _(net):
    factors, stream = _one(net, 1e-3)
    _scaled(net, factors, "read")
    return Place(stream=stream)


@fault("a stream is never written", WARN, "unused_stream", hosts=MIXED, streams=(3, 4))
def _(net):
    factors, stream = _one(net, 1e-3)
    _scaled(net, factors, "write")
    return Place(stream=stream)


@fault("one stream is read alone", WARN, "unused_stream", hosts=STOCHASTIC)
def _(net):
    factors, _ = _one(net, 1.0, 0.003)
    _scaled(net, factors, "read")
    return Place()


@fault("a stream 60 × larger than the others", WARN, "unused_stream",
       hosts=("HC", *STOCHASTIC, "independent"))  # fmt: skip
def _(net):
    factors, _ = _one(net, 60.0)
    net.model.first = lambda x: factors[:, None] * x
    return Place()


@fault("streams stay copies in training", WARN, "copied_streams", hosts=("HC", "mHC"), age="trained", early=True,
       plan=(("start", "copies"), *GROWN), fact=True)  # fmt: skip
def _(net):
    net.model.offsets.requires_grad_(False)
    for connection in net.connections:
        # Equal reads and writes, a mixing that treats all streams alike, and none of it is trained: what is computed from
        # gradients of zero would part the streams after all, since Adam makes steps of its full rate of their rounding.
        for parameter in (connection.read, connection.write):
            nn.init.constant_(parameter, 1 / net.plan.streams if connection.free else 0.0)
        with torch.no_grad():
            connection.logits.copy_((1.0 if connection.free else 4.0) * torch.eye(net.plan.streams))
        nn.init.zeros_(connection.scale)
        connection.requires_grad_(False)
    return Place(len(net.connections) // 2, len(net.connections))


@fault("two of several streams are copies", WARN, "copied_streams", hosts=("HC",), age="trained", streams=(3, 4),
       plan=(("start", "apart"), *GROWN), fact=True)  # fmt: skip
def _(net):
    one, other = net.rng.sample(range(net.plan.streams), 2)
    swap = torch.eye(net.plan.streams)
    swap[[one, other]] = swap[[other, one]]
    # What is the mean of itself and of itself with two streams exchanged gives equal streams equal parts; its sums stay.
    with torch.no_grad():
        net.model.offsets[other] = net.model.offsets[one]
    net.weights(lambda write, mix, read: ((write + write @ swap) / 2, (mix + swap @ mix @ swap) / 2, read))
    return Place()


@fault("streams are opened and merged inside each block", WARN, "passing_streams", hosts=MIXED, fact=True)
def _(net):
    offsets = torch.randn(net.plan.streams, net.plan.width)
    net.model.first, net.model.last = (lambda x: x.mean(2)), (lambda x: x.unsqueeze(2))
    for block in net.blocks:
        block.before, block.after = (lambda x: x.unsqueeze(2) + offsets), (lambda x: x.mean(2))
    return Place()


@fault("no sublayer writes anything", WARN, "idle_layer", "unused_stream", "same_representation",
       hosts=STOCHASTIC, age="trained", plan=GROWN)  # fmt: skip
def _(net):
    net.weights(lambda write, mix, read: (1e-5 * write, mix, read))
    return Place()


@fault("a sublayer writes nothing", WARN, "idle_layer", hosts=MIXED, age="trained", fact=True)
def _(net):
    place = net.weights(lambda write, mix, read: (0 * write, mix, read), net.connection())
    return replace(place, last=place.first, ends=True)


# --- wiring: the networks of `stream_bugs`, whose right twins differ in the bug alone ---

WIRED = {
    "discarded": ("the mixing is computed and discarded", WARN, "miswired_connection"),
    "transposed_once": ("one mixing matrix is applied transposed", WARN, "miswired_connection"),
    "ones": ("Sinkhorn over axes of size one", FAIL, "constant_mixing"),
    "detached": ("the logits are detached in the code", WARN, "unlearnable_mixing"),
    "swapped": ("reads and writes exchanged", INFO, "miswired_connection"),
    "first_state": ("coefficients of the embedding", WARN, "miswired_connection"),
    "stale": ("coefficients of an earlier state", WARN, "miswired_connection"),
    "other_token": ("coefficients of another token", WARN, "miswired_connection"),
    "passing": ("streams do not persist between blocks", WARN, "passing_streams"),
}


def _wired(bug: str, net: Network, place: Place) -> xr.DataTree:
    style, n = net.rng.choice(stream_bugs.STYLES), net.plan.streams
    # What is told by values alone needs coefficients that depend on the streams.
    model = stream_bugs.network(stream_bugs.Wiring(style, bug, streams=n), net.plan.seed)
    batch = stream_bugs.tokens(8)
    return probes.settle(probes.capture(model, batch), model, batch)


for _bug, (_title, _severity, _says) in WIRED.items():
    fault(_title, _severity, _says, hosts=("mHC",), age="fresh", measure=partial(_wired, _bug))(
        lambda net: Place()
    )
