"""What is true of the unseen layouts? The blocks' own states and parameters, in the words of `designs.truth`."""

from __future__ import annotations

import torch

from tests.models.designs import truth as notes
from tests.models.unseen import BATCH, STREAMS, TOKENS, WIDTH, Unseen, opened

HELD = ("b t (n d)", "b t (d n)", "b (n t) d", "b (t n) d", "(b n) t d", "(n b) t d", "n b t d", "b t n d", "b n t d",
        "t b n d", "b t d n", "n t b d", "t n b d", "b d n t", "tuple", "list")  # fmt: skip
OPTIONS = tuple(
    {"inlined": inlined, "dynamic": dynamic, "apart": apart}
    for inlined in (False, True)
    for dynamic in (False, True)
    for apart in (False, True)
)


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))


def truth_of(model: Unseen) -> notes.Truth:
    """The states between blocks, and what joins those within one: the state after the attention is computed anew."""
    chain = notes.Chain()

    def note(state: torch.Tensor, layer: int, site: str) -> None:
        chain.states.append(notes.State(layer, (site,), state, f"{layer} {site}"))

    def enter(block, args):
        state = opened(args[0], model.held)
        if not chain.states:
            note(state, -1, "embed")
        read = torch.einsum("n,btnd->btd", block.read[0], state)
        out = block.attention(block.norms[0](read))
        write = block.write[0][:, None]
        if block.whole is not None:
            write = write + block.weights(block.whole(state.flatten(-2)))[..., None]
        middle = torch.einsum("mn,btnd->btmd", block.mix[0], state) + write * out[:, :, None]
        note(middle, len(chain.states) // 2, "mid")

    def leave(block, args, output):
        note(opened(output, model.held), (len(chain.states) - 2) // 2, "post")

    hooks = [
        hook
        for block in model.blocks
        for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    with torch.no_grad():
        model(ids())
    for hook in hooks:
        hook.remove()
    chain.connections += [
        _joined(block, number, 2 * at + number)
        for at, block in enumerate(model.blocks)
        for number in range(2)
    ]
    assert chain.states[0].value.shape == (BATCH, TOKENS, STREAMS, WIDTH)
    return {"": chain}


def _joined(block, number: int, at: int) -> notes.Connection:
    parts = {"h_res": block.mix[number], "h_pre": block.read[number]}
    if block.whole is None:
        parts["h_post"] = block.write[number]
    values = {name: of.detach().expand(BATCH, TOKENS, *of.shape) for name, of in parts.items()}
    return notes.Connection(at, at + 1, values)
