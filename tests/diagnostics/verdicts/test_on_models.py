"""Every verdict speaks on a real network that is built to show its failure, at the right place, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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
    WIDTH,
    Attention,
    Block,
    Constrained,
    Layer,
    captured,
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


def spiked(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """A block that also adds a huge number to one feature of the first token."""
    spike = torch.zeros(x.shape[1:])
    spike[0, 7] = 3000.0
    return block(x) + spike


def shifted(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """A block that also adds the same vector to all tokens."""
    return block(x) + 40 * torch.linspace(-1, 1, WIDTH)


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


@cache
def counter() -> nn.Module:
    """A network that has learned to count."""
    torch.manual_seed(0)
    model = pre_norm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(40):  # each batch is new, so that none is learned by heart
        batch = counting(number)
        optimizer.zero_grad()
        next_token(model(batch), batch).backward()
        optimizer.step()
    model.zero_grad()
    return model


def learned(factor: float) -> nn.Module:
    """The same, and a factor on its head since."""
    model = copy.deepcopy(counter())
    for parameter in model.head.parameters():
        parameter.data *= factor
    return model


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


# --- streams with one failure ---


def vectors(*values: float) -> list[torch.Tensor]:
    """The same weights at every connection."""
    return [torch.tensor(values)] * CONNECTIONS


def with_one(number: int, other: torch.Tensor, rest: torch.Tensor = NEAR) -> list[torch.Tensor]:
    return [other if i == number else rest for i in range(CONNECTIONS)]


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
    step: int = 0  # of the training, where the age of the network is part of the failure


def case(model: Callable[[], nn.Module], *expected: Any, batch: Any = None, **more: Any) -> Case:
    names = ("loss", "layers", "settle")
    options = {name: more.pop(name) for name in names if name in more}
    return Case(lambda: captured(model(), batch, **options), *expected, **more)


CASES: dict[str, Case] = {
    "same_representation": case(
        lambda: plain(lambda i: step(lambda x, block: x + 0.003 * (block(x) - x), Block()), 8), WARN, "depth", 0, 8,
        says="All layers hold one representation", batch=tokens(4, 32), step=1000,
    ),
    "nothing_measured": Case(without_a_real_token, FAIL, says="the mask leaves no token"),
    "diverged_loss": Case(
        lambda: with_losses(3.0, 2.0, 2.0, 2.0, 8.0, 8.0, 8.0), FAIL, says="relative to the start, is 3"
    ),
    "worse_than_constant": case(
        sure_of_the_wrong, FAIL, loss=next_token, batch=tokens(4, 32) % 6, says="how often each class comes", step=1000
    ),
    "surer_than_right": case(
        lambda: learned(2.0), FAIL, loss=next_token, batch=counting(), says="claim to know", beside=("off_minimum",), step=1000
    ),
    "off_minimum": case(
        lambda: learned(0.3), FAIL, loss=next_token, batch=counting(), settle=60, step=1000,
        says="Multiplying what head gives by 4 lowers the loss",
    ),
    "untrained_weights": Case(
        lambda: with_attrs(captured(pre_norm(), settle=0), checkpoint="new"), WARN, says="checkpoint has its initial value"
    ),
    "looks_ahead": case(
        lambda: plain(lambda i: Uncausal()), FAIL, loss=next_token, says="the outputs depend on later tokens"
    ),
    "not_finite": case(
        lambda: plain(at(3, overflowing)), FAIL, "depth", 4, 6, says="after block 3 (depth 4)"
    ),
    "dead_state": case(
        lambda: plain(at(3, lambda: step(lambda x: 0 * x))), FAIL, "depth", 4, 4, says="zero after block 3 (depth 4)",
    ),
    "exploding_state": Case(
        lambda: probes.capture(plain(partial(without_skip, gain=4.0, activation=torch.relu), 20), tokens()),
        FAIL, "depth", 9, 20, beside=("massive_activations", "common_vector"),
    ),
    "vanishing_state": Case(
        lambda: probes.capture(plain(partial(without_skip, gain=0.5, activation=torch.relu), 16), tokens()),
        WARN, "depth", 9, 16, beside=("common_vector"),
    ),
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
    "miswired_connection: discarded": wired("discarded"),
    "constant_mixing": wired("ones", severity=FAIL, beside=("copied_streams", "sinkhorn_not_converged")),
    "unlearnable_mixing": wired("detached", beside=("copied_streams", "sinkhorn_not_converged")),
    "miswired_connection: swapped": wired("swapped", severity=INFO, beside=("copied_streams", "sinkhorn_not_converged")),
    "sinkhorn_not_converged": case(
        lambda: streams(random_logits(1.5), make=partial(Constrained, sinkhorn_steps=1)),
        WARN, "connection", 0, 11, says="column sum",
    ),
    "negative_mixing": case(
        lambda: streams(random_logits(0.5, 3.0), make=partial(Constrained, overshoot=1.12)), WARN, "connection", 0, 11
    ),
    "stream_collapse": case(
        lambda: streams(0 * IDENTITY, make=Constrained), WARN, "connection", 0, 11, beside=("copied_streams",)
    ),
    "unused_stream": case(lambda: streams(NEAR, reads=vectors(0.3, 0.3, 0.3, 0.005)), WARN, stream="3"),
    "copied_streams": case(
        lambda: streams(NEAR, reads=vectors(*[0.25] * 4), writes=vectors(*[1.0] * 4), apart=0.0),
        WARN, "depth", 6, 12, step=1000,
    ),
    "passing_streams": wired("passing"),
    "rank_collapse": case(
        lambda: plain(lambda i: Attention(causal=False), 8), FAIL, "depth", 2, 8, says="where noise has",
        beside=("vanishing_gradient",),
    ),
    "lost_directions": case(
        lambda: plain(at(3, half)), WARN, "depth", 4, 4, batch=tokens(4, 32), says="The most are"
    ),
    "common_vector": case(lambda: plain(at(3, lambda: step(shifted, Block()))), FAIL, "depth", 4, 6),
    "idle_layer": case(lambda: plain(at(3, idle)), INFO, "depth", 4, 4),
    "equal_sequences": case(
        lambda: plain(at(3, forgetful)), FAIL, "depth", 4, 6, layers="blocks.{i}", says="between sequences"
    ),
    "stale_statistics": case(
        lambda: plain(at(3, batch_norm)).eval(), FAIL, says="have trained weights", beside=("worse_than_constant",)
    ),
    "attention_entropy_collapse": case(
        lambda: plain(at(3, choosing)), WARN, "depth", 4, 4, says="share of uniform attention", beside=("exploding_gradient",),
    ),
    "massive_activations": case(
        lambda: plain(at(2, lambda: step(spiked, Block()))), INFO, "depth", 3, 6, says="features 7; positions 0"
    ),
    "small_sample": case(pre_norm, INFO, batch=tokens(1, 8), says="small for cka: 8 tokens"),
    "large_update": Case(lambda: one_step("blocks.3.mlp.branch.2", 1.0), FAIL, says="in blocks.3.mlp.branch.2"),
    "untrained_module: moved by nothing": Case(lambda: one_step("blocks.2.mlp.norm", 0.0), WARN, says="in blocks.2.mlp.norm"),
    "untrained_module: without use": Case(without_use, WARN, says="exactly zero", beside=("idle_layer", "untrained_weights")),
    "unproven_reading": case(
        lambda: plain(partial(without_skip, gain=1.0, activation=torch.tanh), 4), INFO,
        says="This reading is unproven: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_network_built_to_fail_is_found(name):
    expected, run = CASES[name], CASES[name].build()
    name = name.partition(":")[0]
    analysis = diagnostics.analyze(run)
    # What is built for the test is fresh, unless it has trained for some steps.
    if not expected.step:
        analysis = analysis.assign_attrs(untouched=analysis.attrs.get("untouched", True))
    found = diagnostics.judge(analysis.assign_coords(step=[expected.step]) if expected.step else analysis)
    told = [finding for finding in found if finding.verdict == name]
    assert [finding.severity for finding in told] == [expected.severity]
    (finding,) = told
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
        lost = [
            each for each in diagnostics.judge(diagnostics.analyze(run)) if each.verdict == "untrained_module"
        ]
        assert [each.severity for each in lost] == expected
        assert all("No weight has changed in 5 measured steps" in each.sentence for each in lost)


@pytest.mark.parametrize(
    ("restored", "loss", "expected"), [(5, 3.0, [WARN]), (3, 1.0, [WARN]), (1, 3.0, []), (0, 3.0, [])]
)
def test_blocks_that_were_not_restored(restored, loss, expected):
    """A few of them in any network; others where the network has learned something."""
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
    assert {name.partition(":")[0] for name in CASES} == set(VERDICTS)
