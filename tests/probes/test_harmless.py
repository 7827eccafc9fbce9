"""The user's run is the same with and without a probe, on every path."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import probes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(11), nn.Dropout(0.3))

    def forward(self, x):
        return x + self.inner(x)


class Residual(nn.Module):
    """Dropout, a batch norm and python state: everything that one more forward would change."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64)
        self.calls = 0
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids, fail=False):
        self.calls += 1
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if fail and number == 1:
                raise fail
        return self.head(x)


def hooks_of(model: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


def train(ids, *, probe: bool) -> tuple[list[torch.Tensor], torch.Tensor, Residual]:
    torch.manual_seed(0)
    model = Residual().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with probes.record(model, gradients=True) if probe else io.StringIO() as recorder:
        for _ in range(4):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            if probe:
                recorder.step(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return losses, torch.get_rng_state(), model


def test_training_is_bit_for_bit_the_same(ids):
    plain, plain_random, plain_model = train(ids, probe=False)
    probed, probed_random, probed_model = train(ids, probe=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert torch.equal(plain_random, probed_random)
    assert plain_model.calls == probed_model.calls
    for (name, a), b in zip(
        plain_model.state_dict().items(), probed_model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert hooks_of(plain_model) == hooks_of(probed_model)


def test_capture_leaves_everything_as_it_was(ids):
    torch.manual_seed(0)
    model = Residual().train()
    model(ids).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    random, hooks = torch.get_rng_state(), hooks_of(model)
    run = probes.capture(model, ids, gradients=True, loss=lambda output, batch: output.square().mean())
    assert np.abs(run.trace.gradient.values).max() > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks_of(model) == hooks
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_step_in_the_backward_is_not_run_by_capture(ids):
    """Optimisers that live in post-accumulate hooks must not be woken."""
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.data.add_(p.grad, alpha=-1.0))
    probes.capture(model, ids, gradients=True, loss=lambda output, batch: output.square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_in_the_users_forward_passes_and_the_hooks_are_gone(ids, error):
    model = Residual()
    hooks = hooks_of(model)
    recorder = probes.record(model)

    def loop():
        with recorder:
            model(ids)
            recorder.step()
            model(ids, fail=error)

    with pytest.raises(type(error)):
        loop()
    assert hooks_of(model) == hooks
    assert recorder.run.statistics.sizes["step"] == 1, "the whole step is kept, the broken one is dropped"


def test_hooks_leave_when_a_generator_is_closed(ids):
    model = Residual()
    hooks = hooks_of(model)

    def steps():
        with probes.record(model) as recorder:
            while True:
                yield model(ids)
                recorder.step()

    running = steps()
    next(running)
    running.close()
    assert hooks_of(model) == hooks


def test_an_error_in_a_hook_never_reaches_the_user(ids, monkeypatch):
    from probes.accumulate import Sums

    model = Residual().eval()
    expected = model(ids)

    def broken(*args):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Sums, "see_state", broken)
    with probes.record(model) as recorder:
        assert torch.equal(model(ids), expected)
        with pytest.warns(probes.ProbeWarning, match="a bug of ours"):
            recorder.step()
    with pytest.raises(probes.CaptureError, match="no measured step is whole: a bug of ours"):
        _ = recorder.run


def test_copies_and_pickles_of_a_probed_model_work_and_write_nothing_back(ids):
    model = Residual().eval()
    with probes.record(model) as recorder:
        model(ids)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        torch.save(model, io.BytesIO())
        assert list(model.state_dict()) == list(twin.state_dict())
        for other in (twin, again):
            assert torch.equal(other(ids), model(ids))
        recorder.step()
    assert int(recorder.run.statistics.sequence_count[0]) == 3 * 3, (
        "three forwards of the model, none of its copies"
    )


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_states_and_gradients(models, text_batch, reentrant):
    runs = []
    for checkpointed in (False, True):
        model = models["llama"]().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with probes.record(model, gradients=True) as recorder:
            for _ in range(2):
                model(**text_batch, use_cache=False).loss.backward()
                recorder.step()
        runs.append(recorder.run)
    plain, checkpointed = runs
    for name in ("residual", "gradient"):
        np.testing.assert_array_equal(plain.trace[name].values, checkpointed.trace[name].values, err_msg=name)
    np.testing.assert_array_equal(
        plain.statistics.gradient_square_norm_sum.values,
        checkpointed.statistics.gradient_square_norm_sum.values,
    )


def test_autocast_does_not_reach_the_statistics(models, text_batch):
    model = models["llama"]()
    with torch.autocast("cpu", dtype=torch.bfloat16), probes.record(model) as recorder:
        model(**text_batch)
        recorder.step()
    run = recorder.run
    x = run.trace.residual.values[..., 0, :].astype(np.float64)
    mask = run.trace.mask.values
    expected = (np.square(x).sum(-1) * mask).sum((1, 2))
    np.testing.assert_allclose(run.statistics.square_norm_sum.values[0, :, 0], expected, rtol=1e-6)


def test_a_compiled_model_is_captured_or_says_so(models, text_batch):
    model = torch.compile(models["llama"](), backend="eager")
    model(**text_batch)
    run = probes.capture(model, text_batch)
    expected = probes.capture(models["llama"](), text_batch)
    np.testing.assert_allclose(
        run.trace.residual.values, expected.trace.residual.values, rtol=1e-5, atol=1e-6
    )
