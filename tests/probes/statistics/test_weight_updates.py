"""Norms of weights, of their gradients and of their updates equal those taken by hand, whatever the loop looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from depthscope import probes
from depthscope.probes.statistics import weight_updates


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 32, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, 32, (4, 4, 7), generator=torch.Generator().manual_seed(1)))


def fresh(**options) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())


def squares(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Squared norms by module, in numpy."""
    found: dict[str, float] = {}
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0]
        found[path] = found.get(path, 0.0) + float(tensor.detach().double().square().sum())
    return found


def by_hand(model: nn.Module, batches, optimizer) -> list[dict[str, dict[str, float]]]:
    """Norms of every step of a loop without probes: weights after it, their gradient, and their change."""
    rows = []
    for ids in batches:
        loss_of(model, ids).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        row = {"weight_gradient_square_norm": squares(gradients)}
        optimizer.step()
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        row |= {
            "weight_square_norm": squares(dict(model.named_parameters())),
            "weight_update_square_norm": squares(moved),
        }
        optimizer.zero_grad()
        rows.append(row)
    return rows


def assert_equal(run, name: str, expected: list[dict[str, float]], *, rtol: float = 1e-6) -> None:
    found = run.statistics[name]
    paths = found["weight"].values.tolist()
    np.testing.assert_allclose(
        found.values, [[row[path] for path in paths] for row in expected], rtol=rtol, err_msg=name
    )


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_a_row_is_the_step_that_ends_with_it(batches):
    """The optimizer runs, and forgets the gradients, before step()."""
    model, twin = fresh(), fresh()
    expected = by_hand(twin, batches, adam(twin))
    optimizer = adam(model)
    with probes.record(model, weights=True) as recorder:
        for ids in batches:
            loss_of(model, ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recorder.step()
    for name in weight_updates.VARIABLES:
        assert_equal(recorder.run, name, [row[name] for row in expected], rtol=1e-5)
    assert recorder.run.statistics.weight_count.sel(weight="blocks.1.up") == 8 * 16 + 16
    assert recorder.run.statistics.weight_layer.values.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]


def test_a_shared_weight_counts_once_with_the_gradient_of_both_uses(batches):
    model, twin = fresh(tied=True), fresh(tied=True)
    loss_of(twin, batches[0]).backward()
    with probes.record(model, weights=True) as recorder:
        loss_of(model, batches[0]).backward()
        recorder.step()
    statistics = recorder.run.statistics
    assert "head" not in statistics["weight"].values
    assert float(statistics.weight_count.sum()) == sum(p.numel() for p in twin.parameters())
    found = statistics.weight_gradient_square_norm.sel(weight="embed")
    np.testing.assert_allclose(found, [squares({"embed.weight": twin.embed.weight.grad})["embed"]])


def test_frozen_weights_have_a_norm_and_nothing_else(batches):
    model = fresh()
    model.embed.requires_grad_(False)
    model.blocks[0].up.weight.requires_grad_(False)
    optimizer = adam(model)
    with probes.record(model, weights=True) as recorder:
        loss_of(model, batches[0]).backward()
        bias = float(model.blocks[0].up.bias.grad.double().square().sum())
        optimizer.step()
        recorder.step()
    of = recorder.run.statistics.isel(step=0).sel(weight="embed")
    assert float(of.weight_square_norm) == pytest.approx(squares({"e.w": model.embed.weight})["e"])
    assert np.isnan([of.weight_gradient_square_norm, of.weight_update_square_norm]).all()
    half = recorder.run.statistics.isel(step=0).sel(weight="blocks.0.up")
    assert float(half.weight_gradient_square_norm) == pytest.approx(bias)
    assert float(half.weight_count) == 8 * 16 + 16


def test_half_precision_is_added_up_in_full(batches):
    model = fresh(width=64).to(torch.float16)
    with torch.no_grad():
        model.head.weight.fill_(250.0)  # their squares alone are beyond the largest float16
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    with probes.record(model, weights=True) as recorder:
        loss_of(model, batches[0]).backward()
        gradients = squares({name: p.grad for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.0625)
        recorder.step()
    moved = {name: p.detach().double() - before[name] for name, p in model.named_parameters()}
    assert_equal(recorder.run, "weight_gradient_square_norm", [gradients], rtol=1e-12)
    assert_equal(recorder.run, "weight_update_square_norm", [squares(moved)], rtol=1e-12)


class Offloaded(Model):
    """Blocks whose weights lie elsewhere, or are integers, as offloading and quantisation leave them."""

    def __init__(self):
        super().__init__()
        self.elsewhere = nn.Linear(8, 8, device="meta")
        self.quantised = nn.Module()
        self.quantised.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.quantised.scales = nn.Parameter(torch.ones(4))


def test_what_cannot_be_read_is_nan_and_counted(batches):
    torch.manual_seed(0)
    model = Offloaded()
    with probes.record(model, weights=True) as recorder:
        loss_of(model, batches[0]).backward()
        recorder.step()
    run = recorder.run
    assert run.attrs["weights_skipped"] == {
        "on the meta device, offloaded": 2,
        "not floating point, quantised": 1,
    }
    for path in ("elsewhere", "quantised"):
        assert run.statistics.weight_square_norm.sel(weight=path).isnull().all()
    assert run.statistics.weight_gradient_square_norm.sel(weight="head").notnull().all()


def test_an_optimizer_inside_the_backward_takes_its_gradients_along(batches):
    model, twin = fresh(), fresh()

    def step(parameter):
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for each in (model, twin):
        for parameter in each.parameters():
            parameter.register_post_accumulate_grad_hook(step)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    loss_of(twin, batches[0]).backward()
    with probes.record(model, weights=True) as recorder:
        loss_of(model, batches[0]).backward()
        recorder.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert recorder.run.statistics.weight_gradient_square_norm.isnull().all()
    (reason,) = recorder.run.attrs["weights_skipped"]
    assert "gradient freed inside the backward" in reason
    moved = {name: p.detach() - before[name] for name, p in twin.named_parameters()}
    assert_equal(recorder.run, "weight_update_square_norm", [squares(moved)], rtol=1e-5)


# --- which chain and which block ---


def test_every_module_is_in_the_chain_of_its_block_and_the_others_in_the_first():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.arange(1, 9).repeat(2, 1)
    with probes.record(model, weights=True) as recorder, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :5])
        recorder.step()
    found = {name: group.to_dataset() for name, group in recorder.run["statistics"].children.items()}
    assert list(found) == ["encoder", "decoder"]
    paths = {name: group["weight"].values.tolist() for name, group in found.items()}
    assert all(path.startswith("decoder.block.") for path in paths["decoder"])
    assert "shared" in paths["encoder"]
    assert "decoder.final_layer_norm" in paths["encoder"]
    layers = {int(path.split(".")[2]) for path in paths["decoder"]}
    assert layers == set(found["decoder"]["weight_layer"].values.tolist()) == {0, 1, 2}
    total = sum(float(group["weight_count"].sum()) for group in found.values())
    assert total == sum(p.numel() for p in model.parameters())


# --- a scaled loss ---


def scaled_loop(model, batches, scaler, *, unscale: bool = False, factor: float = 1.0) -> probes.Recorder:
    """A loop as the guide of torch.amp writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.record(model, weights=True, gradients=True, scaler=scaler) as recorder:
        for ids in batches:
            scaler.scale(factor * loss_of(model, ids)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            recorder.step()
    return recorder


@pytest.mark.parametrize("unscale", [False, True])
def test_gradients_are_those_of_the_loss_and_not_of_the_scaled_loss(batches, unscale):
    model, twin, plain = fresh(), fresh(), fresh()
    expected = by_hand(twin, batches, torch.optim.SGD(twin.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with probes.record(plain, gradients=True) as bare:
        for ids in batches:
            loss_of(plain, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            bare.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    run = scaled_loop(model, batches, scaler, unscale=unscale).run
    for name in weight_updates.VARIABLES:
        assert_equal(run, name, [row[name] for row in expected], rtol=1e-4)
    assert run.statistics.loss_scale.values.tolist() == [1024.0, 1024.0, 2048.0, 2048.0]
    name = "gradient_square_norm_sum"
    np.testing.assert_allclose(run.statistics[name], bare.run.statistics[name], rtol=1e-4)
    np.testing.assert_allclose(run.trace.gradient, bare.run.trace.gradient, rtol=1e-3, atol=1e-9)


def test_a_step_that_overflows_is_reported_and_its_gradients_are_undefined(batches):
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-36)
    with pytest.warns(probes.ProbeWarning, match=r"gradients of step 0 overflowed at a loss scale of 1e\+38"):
        recorder = scaled_loop(fresh(), batches[:2], scaler, factor=1e4)
    statistics = recorder.run.statistics
    assert recorder.run.attrs["overflowed_steps"] == [0]
    assert recorder.errors == []
    for name in ("weight_gradient_square_norm", "gradient_square_norm_sum", "weight_update_square_norm"):
        assert statistics[name][0].isnull().all(), name
        assert statistics[name][1].notnull().all(), name
    assert statistics.norm_sum.notnull().all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scaler is a float; expected the torch\.amp\.GradScaler"):
        probes.record(fresh(), scaler=1024.0)
    with pytest.raises(ValueError, match="loss_reduction is 'average'; expected one of 'mean', 'sum'"):
        probes.record(fresh(), loss_reduction="average")
