"""The user's run is the same with and without a probe, on every path."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from depthscope import probes
from depthscope.probes.statistics.weight_updates import WeightUpdates
from tests.probes.session.hooks_left import MODULE_HOOKS, hooks_on_model


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


PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def hooks_of(model: nn.Module) -> list[int]:
    of_modules = [getattr(module, name) for module in model.modules() for name in MODULE_HOOKS]
    of_parameters = [getattr(p, name) for p in model.parameters() for name in PARAMETER_HOOKS]
    return [len(hooks or ()) for hooks in of_modules + of_parameters]


def flags_of(model: nn.Module) -> list[bool]:
    modes = [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()]
    return modes + [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]


def train(ids, *, probe: dict | None, scaled: bool = False) -> dict[str, object]:
    """All that a training leaves behind, with a probe of some settings or without one."""
    torch.manual_seed(0)
    model = Residual().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=scaled)
    losses, gradients = [], []
    if probe is not None and scaled:
        probe = probe | {"scaler": scaler}
    with nullcontext() if probe is None else probes.record(model, **probe) as recorder:
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            scaler.scale(loss).backward()
            if recorder is not None:
                recorder.step(loss)
            gradients += [p.grad.clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return {
        "numbers": [
            *losses,
            *gradients,
            *model.state_dict().values(),
            *(value for state in optimizer.state_dict()["state"].values() for value in state.values()),
            torch.get_rng_state(),
        ],
        "names": list(model.state_dict()),
        "calls": model.calls,
        "scale": scaler.get_scale(),
        "hooks": hooks_of(model),
        "flags": flags_of(model),
    }


@pytest.mark.parametrize(
    ("probe", "scaled"),
    [({"gradients": True}, True), ({"gradients": True, "weights": True, "every": 2}, False)],
)
def test_training_is_bit_for_bit_the_same(ids, probe, scaled):
    plain, probed = train(ids, probe=None, scaled=scaled), train(ids, probe=probe, scaled=scaled)
    pairs = zip(plain.pop("numbers"), probed.pop("numbers"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert plain == probed


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
    """Optimizers that live in post-accumulate hooks must not be woken."""
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.data.add_(p.grad, alpha=-1.0))
    probes.capture(model, ids, gradients=True, loss=lambda output, batch: output.square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


class Explosive(torch.autograd.Function):
    """The identity, whose backward raises; it makes the error only then, since an error holds its frames' tensors."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error("mine")


ALL = {"gradients": True, "weights": True}


@pytest.mark.parametrize(("probe", "error"), [({}, KeyboardInterrupt()), (ALL, ValueError("mine"))])
def test_an_error_in_the_users_forward_passes_and_the_hooks_are_gone(ids, error, probe):
    model = Residual()
    hooks, flags = hooks_of(model), flags_of(model)
    recorder = probes.record(model, **probe)

    def loop():
        with recorder:
            model(ids).square().mean().backward()
            recorder.step()
            model(ids, fail=error)

    with pytest.raises(type(error)) as caught:
        loop()
    assert caught.value is error
    assert (hooks_of(model), flags_of(model)) == (hooks, flags)
    assert recorder.run.statistics.sizes["step"] == 1, "the whole step is kept, the broken one is dropped"


@pytest.mark.parametrize(("probe", "error"), [(ALL, KeyboardInterrupt), ({"weights": True}, ValueError)])
def test_an_error_in_the_users_backward_passes_and_no_half_gradient_is_kept(ids, error, probe):
    model = Residual()
    hooks, flags = hooks_of(model), flags_of(model)
    recorder = probes.record(model, **probe)

    def explode(module, args):
        return (Explosive.apply(args[0], error),)

    def loop():
        with recorder:
            model(ids).square().mean().backward()
            recorder.step()
            mine = model.blocks[1].register_forward_pre_hook(explode)
            output = model(ids)
            mine.remove()
            output.square().mean().backward()  # reaches the last block's states and weights, and no other

    with pytest.raises(error, match="mine"):
        loop()
    assert (hooks_of(model), flags_of(model)) == (hooks, flags)
    statistics = recorder.run.statistics
    assert statistics.sizes["step"] == (1 if probe is ALL else 2), "a whole forward is a row of states"
    known = statistics.weight_gradient_square_norm.notnull().all("weight")
    assert known.values.tolist() == [True, False][: statistics.sizes["step"]]
    assert not any(np.isnan(statistics.weight_count))
    assert recorder.errors == []


def test_a_loop_may_go_on_after_an_error_of_its_own(ids):
    """Some loops skip a batch that fails; what came before and after it is measured, and nothing of it is kept."""
    model = Residual()
    states: list[weakref.ref[torch.Tensor]] = []
    model.embed.register_forward_hook(lambda module, args, output: states.append(weakref.ref(output)))
    with probes.record(model, **ALL) as recorder:
        for fail in (False, True, False):
            try:
                model(ids, fail=RuntimeError("bad batch") if fail else False).square().mean().backward()
            except RuntimeError:
                continue
            recorder.step()
        gc.collect()
        assert [state() for state in states] == [None] * 3
    assert recorder.run.statistics.step.values.tolist() == [0, 1]
    assert recorder.run.statistics.sequence_count.values.tolist() == [3.0, 3.0]


@pytest.mark.filterwarnings("ignore:steps .* for the same reason:depthscope.probes.ProbeWarning")
def test_no_bug_of_ours_changes_a_training(ids, monkeypatch):
    """One in what weights do; of what hooks do, `test_faults` tries them at any place."""
    plain = train(ids, probe=None)

    def broken(*args, **kwargs):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(WeightUpdates, "_copy", broken)
    with pytest.warns(probes.ProbeWarning, match="a bug of ours"):
        probed = train(ids, probe=ALL)
    pairs = zip(plain.pop("numbers"), probed.pop("numbers"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert plain == probed


def test_copies_and_pickles_of_a_probed_model_work_and_write_nothing_back(ids):
    model = Residual().eval()
    names = list(model.state_dict())
    with probes.record(model, weights=True) as recorder:
        model(ids).square().mean().backward()
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        torch.save(model, file := io.BytesIO())
        assert b"depthscope" not in file.getvalue(), "the file opens without this package"
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        state = copy.deepcopy(model.state_dict())
        assert list(state) == names
        # A deep copy has nothing of ours, and so has one of a part, or of what contains the model.
        for copied in (
            twin,
            copy.deepcopy(nn.ModuleList([model, model]))[1],
            copy.deepcopy(list(model.children())),
        ):
            assert hooks_on_model(nn.ModuleList(copied) if isinstance(copied, list) else copied) == 0
        for other in (twin, again, loaded):
            assert not any(len(p._post_accumulate_grad_hooks or ()) for p in other.parameters())
            assert torch.equal(other(ids), model(ids))
            other(ids).square().mean().backward()
            other.load_state_dict(state)
        recorder.step()
    statistics = recorder.run.statistics
    assert int(statistics.sequence_count[0]) == 4 * 3, "four forwards of the model, none of its copies"
    own = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    assert float(statistics.weight_gradient_square_norm.sum()) == pytest.approx(own)


@pytest.mark.parametrize(("probe", "ending"), [({}, "forward"), (ALL, "backward")])
def test_nothing_of_a_forward_outlives_the_block(ids, probe, ending):
    model = Residual()
    alive: list[weakref.ref[torch.Tensor]] = []

    def follow(module, args, output):
        alive.extend(map(weakref.ref, (*args, output)))
        if output.requires_grad:
            output.register_hook(lambda gradient: alive.append(weakref.ref(gradient)))

    def tensors() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    def loop(recorder: probes.Recorder) -> None:
        with recorder:
            for _ in range(2):
                model(ids.clone()).square().mean().backward()
                recorder.step()
            output = model(ids.clone(), fail=ValueError("mine") if ending == "forward" else False)
            Explosive.apply(output, ValueError).sum().backward()

    for module in model.modules():
        module.register_forward_hook(follow)
    before = tensors()
    recorder = probes.record(model, **probe)
    with pytest.raises(ValueError, match="mine"):
        loop(recorder)
    gc.collect()
    assert len(alive) > 50
    assert [ref() for ref in alive if ref() is not None] == []
    whole = 3 if ending == "backward" and not probe else 2  # states alone need no backward
    assert recorder.run.statistics.sizes["step"] == whole
    model.zero_grad()
    del recorder
    assert tensors() <= before, "fewer where another test's tensors went meanwhile"
