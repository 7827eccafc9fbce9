"""A tuned lens in forty lines: one affine map a depth, trained so that the head reads the output from an earlier state.

python docs/examples/lens.py
"""

import torch
from torch import nn

import depthscope as ds
from depthscope.app.demo.small_lm import Size, build
from depthscope.app.demo.training import Recipe, corpus, train

size = Size(layers=4, width=48, heads=2)
model = build("residual", size=size)
train(model, Recipe(steps=200, size=size))
model.eval().requires_grad_(False)

ids = corpus()[1][: 16 * 64].reshape(16, 64)
print("logit lens, KL to the output by depth:")
print(ds.lens(model, {"input_ids": ids}).kl.sel(stream="all").values.round(3))

run = ds.capture(model, ids, max_sequences=16)
states = torch.from_numpy(run.trace.residual.values[:, :, :, 0])  # depth, sample, token, feature
target = model(ids).logits.log_softmax(-1)


def read(state: torch.Tensor) -> torch.Tensor:
    """What the head says of a state: the final norm and the unembedding."""
    return model.head(model.norm(state)).log_softmax(-1)


first, second = slice(0, 8), slice(8, 16)  # trained on one half, measured on the other
for depth, state in enumerate(states):
    affine = nn.Linear(48, 48)
    nn.init.eye_(affine.weight)
    nn.init.zeros_(affine.bias)
    optimizer = torch.optim.Adam(affine.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.kl_div(
            read(affine(state[first])), target[first], log_target=True, reduction="none"
        )
        loss.sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        kl = nn.functional.kl_div(
            read(affine(state[second])), target[second], log_target=True, reduction="none"
        )
    print(f"tuned lens, depth {depth}: KL {float(kl.sum(-1).mean()):.3f}")
