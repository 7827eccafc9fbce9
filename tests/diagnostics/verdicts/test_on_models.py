"""Every verdict speaks on a real network that is built to show its failure, at the right place, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import xarray as xr
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Severity, schema
from depthscope.diagnostics.verdicts import VERDICTS
from tests.models import stream_bugs
from tests.models.synthetic_run import synthetic_run
from tests.models.verdict_models import (
    CONNECTIONS,
    IDENTITY,
    NEAR,
    UNIFORM,
    WIDTH,
    Attention,
    Block,
    Connection,
    Constrained,
    Layer,
    Streams,
    captured,
    passing,
    plain,
    pre_norm,
    prediction,
    random_logits,
    streams,
    tokens,
)

torch.set_num_threads(1)

FAIL, WARN, INFO = Severity.FAIL, Severity.WARN, Severity.INFO


# --- plain networks with one failure ---


def step(function: Callable[..., torch.Tensor], *parts: nn.Module) -> Layer:
    return Layer(function, *parts)


def at(number: int, broken: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Blocks of a transformer, one of them another one."""
    return lambda i: broken() if i == number else Block()


def overflowing() -> nn.Module:
    block = Block()
    with torch.no_grad():
        block.mlp.branch[2].weight.fill_(3e38)
    return block


def idle() -> nn.Module:
    block = Block()
    for layer in (block.attention.branch.attend.out_proj, block.mlp.branch[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return block


def without_skip(
    number: int, *, gain: float, activation: Callable[[torch.Tensor], torch.Tensor]
) -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.normal_(linear.weight, std=gain / WIDTH**0.5)
    return step(lambda x, linear: activation(linear(x)), linear)


def choosing() -> nn.Module:
    """Queries and keys so large that every query attends to one token."""
    block = Block()
    with torch.no_grad():
        block.attention.branch.attend.in_proj_weight[: 2 * WIDTH] *= 60
    return block


def half() -> nn.Module:
    """A block that sets most of the features to zero."""
    return step(lambda x, block: block(x) * (torch.arange(WIDTH) < WIDTH // 3), Block())


def dead_relu() -> nn.Module:
    """A branch whose first bias lets no token pass."""
    up, down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    nn.init.constant_(up.bias, -50.0)
    return step(lambda x, up, down: x + down(up(x).relu()), up, down)


def spiked(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """A block that also adds a huge number to one feature of the first token."""
    spike = torch.zeros(x.shape[1:])
    spike[0, 7] = 3000.0
    return block(x) + spike


def shifted(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """A block that also adds the same vector to all tokens."""
    return block(x) + 40 * torch.linspace(-1, 1, WIDTH)


def only_a_bias() -> nn.Module:
    block = idle()
    nn.init.normal_(block.mlp.branch[2].bias)
    return block


def forgetful() -> nn.Module:
    """A block that gives every sequence the states of the first one."""
    return step(lambda x, block: block(x)[:1].repeat(len(x), 1, 1), Block())


def batch_norm() -> nn.Module:
    """Trained weights, and the statistics that it was made with."""
    norm = nn.BatchNorm1d(WIDTH)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return step(lambda x, norm: x + norm(x.mT).mT, norm.eval())


def next_token(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def sure_of_the_wrong() -> nn.Module:
    """A network with norms that were trained, and a head that is far too sure."""
    model = pre_norm()
    for block in model.blocks:
        nn.init.normal_(block.mlp.norm.weight, 1.0, 0.1)
    model.head.weight.data *= 30.0
    return model


def counting(seed: int = 100) -> torch.Tensor:
    """Sequences in which mostly the next number comes."""
    drawn = torch.Generator().manual_seed(seed)
    random = torch.randint(1, 16, (12, 24), generator=drawn)
    jumps = torch.rand(12, 24, generator=drawn) < 0.3
    rows = [random[:, 0]]
    for at in range(1, 24):
        rows.append(torch.where(jumps[:, at], random[:, at], rows[-1] % 15 + 1))
    return torch.stack(rows, 1)


def learned(factor: float) -> nn.Module:
    """A network that has learned to count, and a factor on its head since."""
    torch.manual_seed(0)
    model = pre_norm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(40):  # each batch is new, so that none is learned by heart
        batch = counting(number)
        optimizer.zero_grad()
        next_token(model(batch), batch).backward()
        optimizer.step()
    model.zero_grad()
    model.head.weight.data *= factor
    model.head.bias.data *= factor
    return model


def copied_block(number: int, first: int) -> nn.Module:
    """Blocks of which the one after ``first`` has its weights."""
    if number in (first, first + 1):
        torch.manual_seed(first)
    block = Block()
    nn.init.normal_(block.mlp.norm.weight, 1.0, 0.1)  # trained, as fresh blocks may be copies
    return block


class Uncausal(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention.branch.causal = False


def without_use() -> xr.DataTree:
    """A step of Adam of a network that multiplies what a module gives by zero."""
    model = plain(at(2, lambda: step(lambda x, block: x + 0.0 * block(x), Block())))
    return recorded_step(model, torch.optim.Adam(model.parameters(), lr=1e-3))


def recorded_step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> xr.DataTree:
    batch = tokens()
    with probes.record(model, gradients=True, weights=True) as recorder:
        for _ in range(steps):
            loss = prediction(model(batch), batch)
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    return recorder.run


def bottomless(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss whose gradient is infinite where it is zero."""
    return (output - output.detach()).abs().sqrt().sum()


def one_step(module: str, rate: float | None) -> xr.DataTree:
    """A step of Adam, with another learning rate for one module, or with that module frozen."""
    model = pre_norm()
    model.get_submodule(module).requires_grad_(rate is not None)
    special = list(model.get_submodule(module).parameters())
    others = [p for p in model.parameters() if all(p is not one for one in special)]
    optimizer = torch.optim.Adam([{"params": special, "lr": rate or 0.0}, {"params": others, "lr": 1e-3}])
    return recorded_step(model, optimizer)


def with_losses(*losses: float) -> xr.DataTree:
    """A recording of forwards with these losses."""
    model = pre_norm()
    with probes.record(model, gradients=False) as recorder:
        for loss in losses:
            model(tokens())
            recorder.step(torch.tensor(loss))
    return recorder.run


def with_attrs(run: xr.DataTree, **attrs: Any) -> xr.DataTree:
    run.attrs |= attrs
    return run


def hardly_moved() -> xr.DataTree:
    """Sixty steps at a learning rate that moves nothing, of a network that answers the same whatever comes."""
    model, batch = pre_norm(), tokens()
    nn.init.zeros_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    with probes.record(model, gradients=True, weights=True, every=60) as recorder:
        for _ in range(61):
            loss = next_token(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    return recorder.run


# --- streams with one failure ---


def vectors(*values: float) -> list[torch.Tensor]:
    """The same weights at every connection."""
    return [torch.tensor(values)] * CONNECTIONS


def with_one(number: int, other: torch.Tensor, rest: torch.Tensor = NEAR) -> list[torch.Tensor]:
    return [other if i == number else rest for i in range(CONNECTIONS)]


class Claiming(Constrained):
    """Claims Sinkhorn by its attributes, and applies its matrix as it stands."""

    mixing = Connection.mixing


def drifting() -> Streams:
    """Rows exact, every column within 1 %, and all errors favour the same stream, as in a long truncated Sinkhorn."""
    share = 0.0097 / 3
    drift = (1 - share) * IDENTITY + share * torch.tensor([1.0, 0.0, 0.0, 0.0])
    return streams([0.8 * IDENTITY + 0.2 * UNIFORM] + [drift] * 95, make=Claiming)


def with_writes(number: int, write: torch.Tensor) -> list[torch.Tensor]:
    drawn = [1 + 0.3 * torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(CONNECTIONS)]
    return [write if i == number else one for i, one in enumerate(drawn)]


def wired(bug: str, **more: Any) -> Case:
    """A network whose connections have one bug in their code."""
    severity, beside = more.pop("severity", WARN), more.pop("beside", ())
    wiring = stream_bugs.Wiring(bug=bug, **more)
    model = partial(stream_bugs.network, wiring)
    return Case(lambda: settled(model(), stream_bugs.tokens()), severity, beside=beside)


def settled(model: nn.Module, batch: torch.Tensor) -> xr.DataTree:
    return probes.settle(probes.capture(model, batch), model, batch)


def without_a_real_token() -> xr.DataTree:
    run = synthetic_run("residual")
    trace = run["trace"].to_dataset().load().copy(deep=True)
    trace["mask"].values[:] = False
    return schema.create_run(trace, attrs=run.attrs)


# --- the table ---


@dataclass(frozen=True)
class Case:
    """A network that shows one failure, where it lies, and what else it may bring."""

    build: Callable[[], xr.DataTree]
    severity: Severity
    axis: str = "run"
    first: int = -1
    last: int = -1
    stream: str | None = None
    beside: tuple[str, ...] = ()
    says: str = ""
    part: dict[str, list[str]] = field(default_factory=dict)  # of the analysis
    step: int = 0  # of the training, where the age of the network is part of the failure


def case(model: Callable[[], nn.Module], *expected: Any, batch: Any = None, **more: Any) -> Case:
    names = ("loss", "layers")
    options = {name: more.pop(name) for name in names if name in more}
    return Case(lambda: captured(model(), batch, **options), *expected, **more)


CASES: dict[str, Case] = {
    "same_representation": case(
        lambda: plain(lambda i: step(lambda x, block: x + 0.003 * (block(x) - x), Block()), 8), FAIL, "depth", 0, 8,
        says="All layers hold one representation", batch=tokens(4, 32), step=1000,
    ),
    "nothing_measured": Case(without_a_real_token, FAIL, says="the mask leaves no token"),
    "loss_not_finite": Case(lambda: with_losses(2.0, math.nan), FAIL, says="losses that are not finite is 1"),
    "diverged_loss": Case(
        lambda: with_losses(3.0, 2.0, 2.0, 2.0, 8.0, 8.0, 8.0), FAIL, says="relative to the start, is 3"
    ),
    "loss_spike": Case(
        lambda: with_losses(3.0, *[2.0] * 6, *[8.0] * 6, *[2.0] * 9), WARN, says="largest rise of the loss"
    ),
    "worse_than_constant": case(
        sure_of_the_wrong, FAIL, loss=next_token, batch=tokens(4, 32) % 6, says="how often each class comes", step=1000
    ),
    "surer_than_right": case(
        lambda: learned(2.0), FAIL, loss=next_token, batch=counting(), says="claim to know", beside=("off_minimum",)
    ),
    "off_minimum": case(
        lambda: learned(0.3), FAIL, loss=next_token, batch=counting(), says="With factors on what", step=1000
    ),
    "untrained_weights": Case(
        lambda: with_attrs(captured(pre_norm()), checkpoint="new"), WARN, says="checkpoint has its initial value"
    ),
    "equal_blocks": case(
        lambda: plain(lambda i: copied_block(i, 2)), FAIL, "depth", 3, 4, says="Blocks 2, 3",
        beside=("worse_than_constant",), step=1000
    ),
    "looks_ahead": case(
        lambda: plain(lambda i: Uncausal()), FAIL, loss=next_token, says="the outputs depend on later tokens"
    ),
    "residual_not_finite": case(
        lambda: plain(at(3, overflowing)), FAIL, "depth", 4, 6, says="after block 3 (depth 4)"
    ),
    "mixing_not_finite": case(
        lambda: streams(with_one(5, math.inf * IDENTITY)), FAIL, "connection", 5, 5, says="is 96 at connection 5"
    ),
    "dead_state": case(
        lambda: plain(at(3, lambda: step(lambda x: 0 * x))), FAIL, "depth", 4, 4, says="zero after block 3 (depth 4)",
        beside=("zero_input",),
    ),
    "exploding_state": Case(
        lambda: probes.capture(plain(partial(without_skip, gain=4.0, activation=torch.relu), 20), tokens()),
        FAIL, "depth", 9, 20, beside=("massive_activations", "common_vector"),
    ),
    "vanishing_state": Case(
        lambda: probes.capture(plain(partial(without_skip, gain=0.5, activation=torch.relu), 16), tokens()),
        WARN, "depth", 9, 16, beside=("common_vector"),
    ),
    "gradient_not_finite": case(pre_norm, FAIL, "depth", 0, 6, loss=bottomless),
    "cut_gradient": case(
        lambda: plain(at(3, lambda: step(lambda x, block: block(x.detach()), Block()))), FAIL, "depth", 0, 3,
        says="up to the one after block 2 (depth 3)",
    ),
    "gain_explosion": case(lambda: streams(2 * NEAR), FAIL, "connection", 3, 11, says="is 4096"),
    "attenuation": case(
        lambda: streams(
            with_one(4, torch.tensor([[0.1, 0.9, 0, 0], [0, 0.9, 0.1, 0], [0, 0.1, 0.8, 0.1], [0, 0, 0.1, 0.9]]))
        ),
        WARN, "connection", 4, 11, says="column sum",
    ),
    "exploding_gradient": case(
        lambda: plain(partial(without_skip, gain=3.0, activation=torch.tanh), 32), FAIL, "depth", 0, 20,
        beside=("worse_than_constant",),  # whether it is trained is not known
    ),
    "vanishing_gradient": case(
        lambda: plain(partial(without_skip, gain=1.0, activation=torch.sigmoid), 12),
        FAIL, "depth", 0, 10, beside=("rank_collapse", "common_vector", "worse_than_constant"),
    ),
    "discarded_mixing": wired("discarded"),
    "transposed_mixing": wired("transposed_once", beside=("copied_streams", "sinkhorn_not_converged")),
    "constant_mixing": wired("ones", severity=FAIL, beside=("copied_streams", "sinkhorn_not_converged")),
    "unlearnable_mixing": wired("detached", beside=("copied_streams", "sinkhorn_not_converged")),
    "swapped_weights": wired("swapped", severity=INFO, beside=("copied_streams", "sinkhorn_not_converged")),
    "foreign_coefficients": wired("first_state", beside=("copied_streams", "sinkhorn_not_converged")),
    "sinkhorn_not_converged": case(
        lambda: streams(random_logits(1.5), make=partial(Constrained, sinkhorn_steps=1)),
        WARN, "connection", 0, 11, says="column sum",
    ),
    "negative_mixing": case(
        lambda: streams(random_logits(0.5, 3.0), make=partial(Constrained, overshoot=1.12)), WARN, "connection", 0, 11
    ),
    "expansive_mixing": case(
        drifting, INFO, "connection", 62, 95, batch=tokens(2, 8), beside=("idle_layer",)
    ),
    "uniform_mixing": case(lambda: streams(0 * IDENTITY, make=Constrained), WARN, "connection", 0, 0),
    "stream_collapse": case(
        lambda: streams(0.5 * IDENTITY + 0.5 * UNIFORM), WARN, "connection", 6, 11, says="0.781 %"
    ),
    "stuck_at_identity": case(lambda: streams(10 * IDENTITY, make=Constrained), WARN),
    "saturated_logits": case(
        lambda: streams(8 * IDENTITY, make=Constrained), INFO, says="lets through less than", beside=("stuck_at_identity",)
    ),
    "unread_stream": case(lambda: streams(NEAR, reads=vectors(0.3, 0.3, 0.3, 0.005)), WARN, stream="3"),
    "unwritten_stream": case(lambda: streams(NEAR, writes=vectors(1, 0.5, 1, 0.01)), WARN, stream="3"),
    "dominant_stream": case(lambda: streams(NEAR, reads=vectors(0.02, 1, 0.02, 0.02)), WARN, stream="1"),
    "loud_stream": case(
        lambda: streams(0.99 * IDENTITY + 0.01 * UNIFORM, writes=vectors(9.0, 10.0, 1000.0, 11.0)), WARN, "depth", 1, 12,
        stream="2", beside=("unwritten_stream",),
    ),
    "silent_stream": case(
        lambda: streams(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])) @ NEAR, writes=vectors(1, 0.5, 0.7, 0)),
        WARN, "depth", 7, 12, stream="3", beside=("attenuation", "unwritten_stream"), says="exactly zero",
    ),
    "copied_streams": case(
        lambda: streams(NEAR, reads=vectors(*[0.25] * 4), writes=vectors(*[1.0] * 4), apart=0.0), WARN, "depth", 6, 12
    ),
    "passing_streams": case(passing, WARN),
    "wasted_layer": case(
        lambda: streams(NEAR, writes=with_writes(7, torch.zeros(4))), WARN, "connection", 7, 7, says="mlp of block 3"
    ),
    "rank_collapse": case(
        lambda: plain(lambda i: Attention(causal=False), 8), FAIL, "depth", 2, 8, says="where noise has",
        beside=("vanishing_gradient",),
    ),
    "lost_directions": case(
        lambda: plain(at(3, half)), WARN, "depth", 4, 4, batch=tokens(4, 32), says="The most are"
    ),
    "common_vector": case(lambda: plain(at(3, lambda: step(shifted, Block()))), FAIL, "depth", 4, 6),
    "idle_layer": case(lambda: plain(at(3, idle)), WARN, "depth", 4, 4),
    "constant_branch": case(lambda: plain(at(3, only_a_bias)), WARN, "depth", 4, 4),
    "equal_sequences": case(
        lambda: plain(at(3, forgetful)), FAIL, "depth", 4, 6, layers="blocks.{i}", says="between sequences"
    ),
    "stale_statistics": case(
        lambda: plain(at(3, batch_norm)).eval(), FAIL, says="have trained weights", beside=("worse_than_constant",)
    ),
    "zero_input": case(
        lambda: plain(at(3, dead_relu)), WARN, says="blocks.3.parts.1 gets hardly any number", beside=("constant_branch",)
    ),
    "attention_entropy_collapse": case(
        lambda: plain(at(3, choosing)), WARN, "depth", 4, 4, says="share of uniform attention", beside=("exploding_gradient",),
    ),
    "massive_activations": case(
        lambda: plain(at(2, lambda: step(spiked, Block()))), INFO, "depth", 3, 6, says="features 7; positions 0"
    ),
    "batch_without_differences": case(
        pre_norm, INFO, batch=torch.full((4, 24), 7), says="cannot show rank collapse"
    ),
    "few_tokens_for_cka": case(
        pre_norm, INFO, batch=tokens(1, 8), says="0.8", part={"estimator": ["biased"]}
    ),
    "small_sample": case(pre_norm, INFO, batch=tokens(1, 8), says="small for cka: 8 tokens"),
    "large_update": Case(lambda: one_step("blocks.3.mlp.branch.2", 1.0), FAIL, says="in blocks.3.mlp.branch.2"),
    "lost_update": Case(lambda: one_step("blocks.2.mlp.norm", 0.0), WARN, says="in blocks.2.mlp.norm"),
    "slow_updates": Case(hardly_moved, WARN, says="of that of a constant answer after 60 steps"),
    "frozen_module": Case(
        lambda: one_step("blocks.2.mlp.norm", None), WARN, says="No parameter of blocks.2.mlp.norm is trained"
    ),
    "silent_module": Case(without_use, WARN, says="exactly zero", beside=("lost_update", "idle_layer", "untrained_weights")),
    "unproven_reading": case(
        lambda: plain(partial(without_skip, gain=1.0, activation=torch.tanh), 4), INFO,
        says="This reading is unproven: ",
    ),
}  # fmt: skip


# The later ones rest on experiments that `capture` no longer makes, and are milder without them: see `depthscope.settle`.
@pytest.mark.parametrize("name", list(CASES)[:32])
def test_a_network_built_to_fail_is_found(name):
    expected, run = CASES[name], CASES[name].build()
    analysis = diagnostics.analyze(run).sel(expected.part)
    found = diagnostics.judge(analysis.assign_coords(step=[expected.step]) if expected.step else analysis)
    told = [finding for finding in found if finding.verdict == name]
    assert [finding.severity for finding in told] == [expected.severity]
    (finding,) = told
    assert not finding.because
    assert finding.stream == expected.stream
    if finding.axis != "weight":
        assert (finding.axis, finding.first, finding.last) == (expected.axis, expected.first, expected.last)
    assert expected.says in finding.sentence
    assert finding.source in finding.sentence
    assert finding.source == VERDICTS[name].limits.source
    loud = {other.verdict for other in found if other.severity > INFO}
    assert loud - {name} <= set(expected.beside)


def test_an_optimizer_that_has_copies_of_the_weights_moves_none():
    model = pre_norm()
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for weights, expected in ((copies, [WARN]), (model.parameters(), [])):
        run = recorded_step(model, torch.optim.Adam(weights, lr=1e-3), steps=5)
        lost = [each for each in diagnostics.judge(diagnostics.analyze(run)) if each.verdict == "lost_update"]
        assert [each.severity for each in lost] == expected
        assert all("No weight has changed in 5 measured steps" in each.sentence for each in lost)


@pytest.mark.parametrize(
    ("restored", "loss", "expected"), [(5, 3.0, [WARN]), (3, 1.0, [WARN]), (1, 3.0, []), (0, 3.0, [WARN])]
)
def test_blocks_that_were_not_restored(restored, loss, expected):
    """A few of them, or all but the final norm, in any network; others where the network has learned something."""
    model = pre_norm()
    if not restored:
        norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(norm.weight, 1.0, 0.1)
        model.head = nn.Sequential(norm, model.head)
    for block in model.blocks[:restored]:
        block.mlp.norm.weight.data += 0.1 * torch.randn(WIDTH)
    run = probes.capture(model, tokens())
    run.attrs["task"] = {"guessing": 3.0, "loss": loss}
    findings = diagnostics.judge(diagnostics.analyze(run))
    found = [each for each in findings if each.verdict == "untrained_weights"]
    assert [each.severity for each in found] == expected
    assert all((each.first, each.last) == (restored + 1, len(model.blocks)) for each in found)


def test_every_verdict_has_a_network_that_fails_it():
    assert list(CASES) == list(VERDICTS)
