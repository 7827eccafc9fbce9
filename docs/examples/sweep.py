"""Widths and learning rates: does the best rate stay where it is when the model grows? One run a cell, compared by depthscope.

python docs/examples/sweep.py && depthscope compare sweep/ --by width
"""

import torch

import depthscope as ds
from depthscope.app.demo.small_lm import Size, build
from depthscope.app.demo.training import Recipe, corpus, held_out_loss, train

held_out = corpus()[1][: 4 * 64].reshape(4, 64)
batch = {"input_ids": held_out, "labels": held_out}

for width in (32, 64, 128):
    for rate in (1e-3, 3e-3, 1e-2):
        size = Size(layers=4, width=width, heads=2)
        model = build("residual", size=size)
        train(model, Recipe(steps=100, learning_rate=rate, size=size))
        model.eval()
        run = ds.capture(
            model,
            batch,
            gradients=True,
            attrs={"model": f"width {width}, rate {rate:g}", "width": width, "learning_rate": rate},
        )
        ds.save_run(run, f"sweep/w{width}-r{rate:g}.zarr", force=True)
        norms = ds.analyze(run, ["residual_norm"]).residual_norm.isel(step=-1).sel(stream="mean").values
        loss = held_out_loss(model, length=64, windows=16)
        print(f"width {width:3} rate {rate:g}: loss {loss:.3f}, last state {norms[-1]:.2f}")
        assert torch.isfinite(torch.tensor(loss))
