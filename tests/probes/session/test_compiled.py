"""A compiled model trains to the same weights with a recorder, and its states are those of its forward as it is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from depthscope import probes
from tests.probes.session.hooks_left import alive, hooks_on_model

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, dropout: float, checkpointing: bool | None):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Dropout(dropout))
        self.checkpointing = checkpointing

    def forward(self, x):
        if self.checkpointing is None:
            return x + self.inner(x)
        return x + checkpoint(self.inner, x, use_reentrant=self.checkpointing)


class Residual(nn.Module):
    """Dropout, a batch norm and attributes: all that one more forward would change."""

    def __init__(self, dropout: float = 0.3, checkpointing: bool | None = None):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(Block(dropout, checkpointing) for _ in range(2))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 64)
        self.calls, self.seen = 0, []

    def forward(self, ids):
        self.calls += 1
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x.flatten(0, 1)).view_as(x)), "state": x}


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return loss_of(self.model(ids), ids)


def loss_of(output, ids):
    return nn.functional.cross_entropy(output["logits"].flatten(0, 1), ids.flatten())


def loss_of_both(output, ids):
    return loss_of(output, ids) + output["state"].square().mean()


def compiled_loss(output, ids):
    return torch.compile(loss_of, backend="eager")(output, ids)


def other_masks(graph, inputs):
    """A compiler whose code draws other dropout masks than the uncompiled code, as torch's own does."""

    def run(*args):
        torch.rand(1)
        return graph(*args)

    return run


def whole(model, **how):
    return torch.compile(model, **how)


def in_place(model, **how):
    model.compile(**how)
    return model


def blocks_in_place(model, **how):
    for block in model.blocks:
        block.compile(**how)
    return model


def wrapped_blocks(model, **how):
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, **how)
    return model


def around_data_parallel(model, **how):
    return torch.compile(DistributedDataParallel(model), **how)


def inside_of_data_parallel(model, **how):
    return DistributedDataParallel(torch.compile(model, **how))


def compiled_forward(model, **how):
    model.forward = torch.compile(model.forward, **how)
    return model


def same(model, **how):
    return model


def train(
    build: Callable[..., nn.Module],
    probe: dict | None,
    *,
    dropout: float = 0.3,
    checkpointing: bool | None = None,
    micro_batches: int = 1,
    validate: bool = False,
    loss: Callable[..., torch.Tensor] = loss_of,
    steps: int = 4,
    autocast: bool = False,
    **how,
) -> tuple[list[torch.Tensor], probes.training.recorder.Recorder | None]:
    """All numbers that a training leaves behind, with a probe of some settings or without one; and its recorder."""
    torch.compiler.reset()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    inner = Residual(dropout, checkpointing).train()
    model = build(inner, **({"backend": other_masks} | how))
    probed = model if isinstance(model, nn.Module) else inner
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    losses = []
    with nullcontext() if probe is None else probes.record(probed, **probe) as recorder:
        for step in range(steps):
            for part in range(micro_batches):
                ids = IDS.roll(step + part, 1)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    value = loss(model(ids), ids)
                value.backward()
                losses.append(value.detach())
            if validate:
                with torch.no_grad():
                    losses.append(model(IDS)["logits"].sum())
            if recorder is not None:
                recorder.step(value)
            optimizer.step()
            optimizer.zero_grad()
    numbers = [*losses, *inner.state_dict().values(), torch.get_rng_state(), torch.tensor(random.random())]
    return [*numbers, torch.tensor(inner.calls), torch.tensor(np.random.rand())], recorder  # noqa: NPY002


def step_at_once(parameter: nn.Parameter) -> None:
    """An optimizer's step, through ``.data``: autograd counts no write."""
    parameter.data.sub_(parameter.grad)
    parameter.grad = None


def require_same(plain: list[torch.Tensor], probed: list[torch.Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(plain, probed, strict=True)] == [True] * len(plain)


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (wrapped_blocks, {}),
        (blocks_in_place, {"micro_batches": 2, "validate": True}),
        (whole, {"autocast": True, "fullgraph": True, "loss": compiled_loss, "dynamic": True}),
    ],
)
def test_a_compiled_training_is_bit_for_bit_the_same_whatever_it_does(build, setting):
    plain, _ = train(build, None, **setting)
    uncompiled, _ = train(same, None, **setting)
    assert not torch.equal(plain[0], uncompiled[0])  # else this test could not fail
    probed, recorder = train(build, {"gradients": True, "weights": True, "every": 2}, **setting)
    require_same(plain, probed)
    assert recorder.errors == []
    assert recorder.run.statistics.sizes["step"] == 2
    assert (recorder.run.trace.gradient.values != 0).any()


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (whole, {"backend": "aot_eager", "loss": loss_of_both}),
        (in_place, {"checkpointing": False}),
        (compiled_forward, {}),
    ],
)
def test_without_dropout_states_and_gradients_are_those_of_the_uncompiled_model(build, setting):
    found = []
    for way in (same, build):
        _, recorder = train(way, {"gradients": True, "max_sequences": 64}, dropout=0.0, steps=2, **setting)
        assert recorder.errors == []
        found.append(recorder.run)
    plain, compiled = found
    assert np.abs(plain.trace.gradient.values).max() > 0
    for variable in ("residual", "gradient"):
        np.testing.assert_allclose(
            compiled.trace[variable].values,
            plain.trace[variable].values,
            rtol=1e-4,
            atol=1e-7,
            err_msg=variable,
        )
    np.testing.assert_allclose(
        compiled.statistics.gradient_square_norm_sum.values,
        plain.statistics.gradient_square_norm_sum.values,
        rtol=1e-4,
    )


@pytest.fixture
def one_process():
    """A group of this process alone, in which DistributedDataParallel runs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "build", [around_data_parallel, inside_of_data_parallel], ids=lambda build: build.__name__
)
def test_so_it_is_around_and_inside_of_data_parallelism(build, one_process):
    plain, _ = train(build, None, steps=3)
    probed, recorder = train(build, {"gradients": True, "every": 2}, steps=3)
    require_same(plain, probed)
    assert recorder.errors == []
    assert (recorder.run.trace.gradient.values != 0).any()
    assert recorder.run.trace.module.values[-1] == "blocks.1"  # as without a wrapper


@pytest.mark.filterwarnings("ignore:step:depthscope.probes.ProbeWarning")
@pytest.mark.parametrize(
    ("build", "loss", "reason"),
    [
        (blocks_in_place, loss_of_both, "the loss reads two outputs"),
        (
            lambda model, **how: torch.compile(lambda ids: model(ids), **how),
            loss_of,
            "inside of code that was compiled",
        ),
    ],
    ids=["two outputs", "function"],
)
def test_what_cannot_be_followed_is_said_and_the_training_is_the_same(build, loss, reason):
    plain, _ = train(build, None, loss=loss)
    probed, recorder = train(build, {"gradients": True}, loss=loss)
    require_same(plain, probed)
    assert len(recorder.errors) == 3  # of four steps: the same reason is said three times at most
    assert reason in str(recorder.errors[0])


def test_nothing_is_left_of_a_compiled_step():
    torch.compiler.reset()
    model = whole(Residual(), backend=other_masks)
    with probes.record(model, gradients=True) as recorder:
        for _ in range(2):
            loss_of(model(IDS), IDS).backward()
            recorder.step()
            assert hooks_on_model(model) <= 4  # one before and one after the calls of the next step
    assert hooks_on_model(model) == 0
    assert alive() == []


def test_arguments_that_the_forward_writes_into_are_copied():
    class Writing(Residual):
        def forward(self, ids, cache=None):
            ids.add_(1)
            cache.append(ids.sum())
            return super().forward(ids)

    torch.compiler.reset()
    model = Writing(dropout=0.0)
    model.blocks[0].compile(backend=other_masks)
    ids, cache = IDS.clone() % 60, []
    expected = ids + 1
    with probes.record(model) as recorder:
        model(ids, cache=cache)
        recorder.step()
    assert torch.equal(ids, expected)
    assert len(cache) == 1
    assert recorder.errors == []


@pytest.mark.filterwarnings("ignore:step:depthscope.probes.ProbeWarning")
@pytest.mark.parametrize(
    ("loss", "backend"),
    [(loss_of, other_masks), (loss_of_both, "aot_eager")],
    ids=["one output", "two outputs"],
)
def test_an_optimizer_inside_of_the_backward_never_mixes_two_sets_of_weights(loss, backend):
    found = []
    for build in (same, whole):
        torch.compiler.reset()
        torch.manual_seed(0)
        inner = Residual(dropout=0.0).train()
        for parameter in inner.parameters():
            parameter.register_post_accumulate_grad_hook(step_at_once)
        model = build(inner, backend=backend)
        with probes.record(model, gradients=True) as recorder:
            loss(model(IDS), IDS).backward()
            recorder.step()
        found.append(recorder)
    plain, compiled = found
    if loss is loss_of_both:
        assert "weights change before the backward" in str(compiled.errors[0])
    else:
        assert compiled.errors == []
        np.testing.assert_allclose(
            compiled.run.trace.gradient.values, plain.run.trace.gradient.values, rtol=1e-4, atol=1e-8
        )
