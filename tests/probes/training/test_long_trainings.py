"""Do long trainings, and those with several optimisers or recorders, stay what they are, and their recorders small?"""

from __future__ import annotations

import gc
import tracemalloc
import warnings

import numpy as np
import torch
from torch import nn

import depthscope as ds
from depthscope import ProbeWarning
from tests.models.plain_stack import Block
from tests.models.small_models import Feedforward

KIB = 1024


class Tower(nn.Module):
    """Blocks over tokens (B, T, width), from and to other widths."""

    def __init__(self, width_in: int, width_out: int, layers: int = 3, width: int = 16):
        super().__init__()
        self.begin = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(Block(width, Feedforward(width)) for _ in range(layers))
        self.norm, self.end = nn.LayerNorm(width), nn.Linear(width, width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return self.end(self.norm(x))


def tower(*sizes: int, seed: int = 0, **more: int) -> Tower:
    torch.manual_seed(seed)
    return Tower(*sizes, **more)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_further_step_takes_little_more_than_its_numbers():
    model, x = tower(8, 4), noise(2, 8, 8, seed=1)
    optimizer, taken, steps = torch.optim.SGD(model.parameters(), lr=1e-3), [], (10, 35)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return tracemalloc.get_traced_memory()[0], len(tensors)

    tracemalloc.start()
    try:
        with ds.record(model, gradients=True, metrics="live") as recorder:
            for step in range(steps[1] + 1):
                loss = model(x).square().mean()
                loss.backward()
                recorder.step(loss)
                optimizer.step()
                optimizer.zero_grad()
                if step in steps:
                    taken.append(held())
    finally:
        tracemalloc.stop()
    count = steps[1] - steps[0]
    rows = recorder.run["metrics"].to_dataset()
    numbers = sum(of.nbytes for of in rows.data_vars.values() if "step" in of.dims) / rows.sizes["step"]
    assert (taken[1][0] - taken[0][0]) / count < 1.5 * numbers + 2 * KIB
    assert (taken[1][1] - taken[0][1]) / count < 2
    assert statistics_of(recorder)["norm_sum"].shape[0] == steps[1] + 1


def statistics_of(recorder):
    return recorder.run["statistics"].to_dataset()


def trained_gan(recorded: bool) -> tuple[list[torch.Tensor], list[ds.Recorder]]:
    """Two networks, an optimiser each: the weights afterwards, and the recorders."""
    generator, critic = tower(4, 6, seed=2), tower(6, 1, seed=3)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    recorders = (
        [ds.record(net, gradients=True, metrics="live") for net in (generator, critic)] if recorded else []
    )
    for recorder in recorders:
        recorder.__enter__()
    for step in range(4):
        real, z = noise(3, 5, 6, seed=step), noise(3, 5, 4, seed=100 + step)
        with torch.no_grad():
            fake = generator(z)
        loss = nn.functional.softplus(critic(fake)).mean() + nn.functional.softplus(-critic(real)).mean()
        loss.backward()
        of_critic.step()
        for recorder in recorders[1:]:
            recorder.step(loss)
        loss = nn.functional.softplus(-critic(generator(z))).mean()
        loss.backward()
        of_generator.step()
        of_generator.zero_grad()
        of_critic.zero_grad()  # gradients that the generator's loss left there
        for recorder in recorders[:1]:
            recorder.step(loss)
        with torch.no_grad():  # an evaluation in between
            generator.eval()
            generator(noise(7, 5, 4, seed=5))
            generator.train()
    for recorder in recorders:
        recorder.close()
    return [p.detach().clone() for net in (generator, critic) for p in net.parameters()], recorders


def test_two_networks_with_an_optimiser_each():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProbeWarning)
        weights, recorders = trained_gan(recorded=True)
    plain, _ = trained_gan(recorded=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    of_generator, of_critic = map(statistics_of, recorders)
    # Neither the forward without a graph nor the evaluation counts.
    assert of_generator["token_count"].values.tolist() == [15] * 4
    # The critic's steps have the forwards since the last one: of its own loss, and before that of the generator's; the last
    # of these is a step that the end of the block ends.
    assert of_critic["token_count"].values.tolist() == [30, 45, 45, 45, 15]
    for found in (of_generator, of_critic):
        assert np.isfinite(found["gradient_square_norm_sum"].values).all()
