"""Which networks are in the zoo of `held_out`: healthy ones of many kinds, and ones with a fault that people make."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.verdicts.faults import ScaledGradient
from tests.verdicts.held_out import (
    LENGTH,
    WIDTH,
    ConvNet,
    Recipe,
    Shape,
    digits,
    prose,
    repeats,
    shifts,
)


def one_word(count: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ids": torch.full((count, LENGTH), 7)}


def few_words(count: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(3, (count, LENGTH), generator=rng)}


def same_sequences(count: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ids": prose(1, rng)["ids"].expand(count, -1).clone()}


two, three = partial(digits, classes=2), partial(digits, classes=3)


def of_pixels(classes: int, **more: Any) -> Shape:
    return Shape(classes=classes, causal=False, **more)


def half(model: Any) -> None:
    model.bfloat16()


def frozen(model: Any) -> None:
    for part in (model.embed, *model.blocks[:2]):
        part.requires_grad_(False)
    model.place.requires_grad_(False)


HEALTHY = [
    Recipe("text, pre-norm"),
    Recipe("text, pre-norm, twelve blocks", Shape(blocks=12), steps=60),
    Recipe("text, fresh", steps=0),
    Recipe("text, fresh, 24 blocks", Shape(blocks=24), steps=0),
    Recipe("text, 20 steps", steps=20),
    Recipe("text, post-norm", Shape(norm="post")),
    Recipe("text, sandwich norm", Shape(norm="sandwich")),
    Recipe("text, RMSNorm and gated, dropout", Shape(rms=True, gated=True, dropout=0.1)),
    Recipe("text, QK-norm", Shape(qk=True)),
    Recipe("text, parallel branches", Shape(parallel=True)),
    Recipe("text, LayerScale", Shape(scale=0.05), steps=200, rate=4e-3),
    Recipe("text, ReZero", Shape(norm="none", scale=0.0), steps=200, rate=4e-3),
    Recipe("text, tied head", Shape(tied=True, embedding=0.1)),
    Recipe("text, experts", Shape(experts=4)),
    Recipe("text, decay 1", decay=1.0),
    Recipe("text, SGD", optimizer="sgd", rate=0.1),
    Recipe("text, bfloat16", touch=half),
    Recipe("text, first blocks frozen", before=frozen),
    Recipe("text, recorded", record=60),
    Recipe("text, mHC, recorded", Shape(streams=4, blocks=3), record=40),
    Recipe("text, two sequences", sequences=2),
    Recipe("text, one repeated word", look=one_word),
    Recipe("text, three words", look=few_words),
    Recipe("text, the same sequence eight times", look=same_sequences),
    Recipe("text, mHC, one repeated word", Shape(streams=4, blocks=3), look=one_word),
    Recipe("induction, solved", Shape(blocks=4), data=repeats, steps=200, rate=3e-3),
    Recipe("plus three, solved", data=shifts),
    Recipe("plus three, mHC, solved", Shape(streams=4, blocks=4), data=shifts),
    Recipe("digits, ten classes, ViT", of_pixels(10, patch=8), data=digits),
    Recipe("digits, mixer", of_pixels(10, patch=8, mixer="tokens"), data=digits),
    Recipe("digits, ResNet", Shape(blocks=4, classes=10), data=digits, build=ConvNet, steps=80),
    Recipe("digits, two classes, ViT", of_pixels(2, patch=8), data=two),
    Recipe("digits, two classes, ResNet", Shape(blocks=4, classes=2), data=two, build=ConvNet, steps=60),
    Recipe("digits, three classes, one token", of_pixels(3, patch=64), data=three),
    Recipe("digits, stem of 4 pixels", of_pixels(10, patch=4), data=digits),
    Recipe("digits, mHC", of_pixels(10, patch=8, streams=4, blocks=4), data=digits),
    Recipe("text, mHC", Shape(streams=4, blocks=4)),
    Recipe("text, mHC, copies", Shape(streams=4, blocks=4, start="copies")),
    Recipe("text, mHC, fresh, deep", Shape(streams=4, blocks=20), steps=0),
    Recipe("text, HC", Shape(streams=4, blocks=4, mixing="hc")),
    Recipe("text, HC, two streams", Shape(streams=2, blocks=5, mixing="hc", start="copies")),
    Recipe("text, HC, fresh", Shape(streams=4, blocks=8, mixing="hc", start="copies"), steps=0),
]


# --- faults ---


def zero_last(model: Any, *blocks: int, by: float = 0.0) -> None:
    with torch.no_grad():
        for number in blocks:
            for last in (model.blocks[number].branches[0].out, model.blocks[number].branches[1].down):
                last.weight.mul_(by)
                last.bias.mul_(by)


def all_small(model: Any) -> None:
    zero_last(model, *range(len(model.blocks)), by=1e-3)


def without_skip(model: Any) -> None:
    for block in model.blocks:
        block.forward = lambda x, block=block: block.branch(0, x)


def after(change: Any, block: int = 2) -> Any:
    def touch(model: Any) -> None:
        model.blocks[block].after = change

    return touch


def everywhere(change: Any) -> Any:
    def touch(model: Any) -> None:
        for block in model.blocks:
            block.after = change

    return touch


def sharp(model: Any) -> None:
    for block in model.blocks:
        block.branches[0].temperature = 60.0


def looking_ahead(model: Any) -> None:
    for block in model.blocks:
        block.branches[0].causal = False


def edits(change: Any, only: int | None = None) -> Any:
    """Change the coefficients of every connection, or of one."""

    def touch(model: Any) -> None:
        mixings = [each for block in model.blocks for each in block.mixings]
        for number, mixing in enumerate(mixings):
            if only is None or number == only:
                mixing.edit = lambda weights: change(*weights)

    return touch


def gain(factor: float, only: int | None = None) -> Any:
    return edits(lambda pre, post, res: (pre, post, factor * res), only)


def towards_uniform(share: float, only: int | None = None) -> Any:
    return edits(lambda pre, post, res: (pre, post, torch.lerp(res, torch.full_like(res, 0.25), share)), only)


def factors(which: str, value: float, others: float = 1.0) -> Any:
    scale = torch.full((4,), others)
    scale[1] = value

    def change(pre, post, res):
        return (pre * scale, post, res) if which == "pre" else (pre, post * scale, res)

    return edits(change)


def held_at_identity(model: Any) -> None:
    for block in model.blocks:
        for mixing in block.mixings:
            mixing.res.data = 12.0 * torch.eye(4)
            mixing.scale.data.zero_()
            mixing.scale.requires_grad_(False)
            mixing.res.requires_grad_(False)


def held_as_copies(model: Any) -> None:
    model.offsets.requires_grad_(False)
    for block in model.blocks:
        for mixing in block.mixings:
            mixing.pre.data.zero_()
            mixing.post.data.zero_()
            mixing.res.data = 3.0 * torch.eye(4)
            mixing.scale.data.zero_()
            mixing.requires_grad_(False)


def one_round(model: Any) -> None:
    for block in model.blocks:
        for mixing in block.mixings:
            mixing.rounds = 1
            mixing.res.data.mul_(2).add_(torch.randn(4, 4))


def small_norms(model: Any) -> None:
    with torch.no_grad():
        for norm in model.blocks[2].norms:
            norm.weight.zero_()
            norm.bias.zero_()


def constant_step(model: Any) -> None:
    with torch.no_grad():
        for last in (model.blocks[2].branches[0].out, model.blocks[2].branches[1].down):
            last.weight.zero_()
            last.bias.normal_()


def starved_expert(model: Any) -> None:
    for block in model.blocks:
        block.branches[1].bias[0] = -1e9


def stale_norms(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def forgotten(model: Any) -> None:
    torch.manual_seed(99)
    model.blocks[2].before = lambda x: Network_position_only(x)


def Network_position_only(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand_as(x).clone()


def into_one_direction(x: torch.Tensor) -> torch.Tensor:
    u = torch.ones(WIDTH) / math.sqrt(WIDTH) * torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)
    return (x @ u).unsqueeze(-1) * u


def spiked(x: torch.Tensor) -> torch.Tensor:
    added = torch.zeros_like(x)
    added[:, ::3, 5] = 8000.0
    return x + added


STREAM = torch.tensor([1.0, 0.0, 1.0, 1.0])
silent = edits(lambda pre, post, res: (pre, STREAM * post, STREAM[:, None] * res))


def not_learning(model: Any) -> None:
    for p in model.blocks[2].parameters():
        p.requires_grad_(False)


def nan_token(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, 3] = torch.nan
    return x


class Probabilities(nn.Module):
    """A head that ends in a softmax, before a loss that takes another one."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x).softmax(-1)


def twice(model: Any) -> None:
    model.head = Probabilities(model.head)


MHC = dict(streams=4, blocks=4)
FAULTY = [
    Recipe("NaN in a block", touch=after(nan_token), found_by=("residual_not_finite",)),
    Recipe("state times zero", touch=after(lambda x: 0 * x), found_by=("dead_state",)),
    Recipe("skip added twice", Shape(blocks=20), steps=0, touch=everywhere(lambda x: 2 * x), found_by=("exploding_state",)),
    Recipe("tokens become equal", touch=after(lambda x: x.mean(1, keepdim=True) + 1e-3 * (x - x.mean(1, keepdim=True))),
           found_by=("rank_collapse",)),
    Recipe("attention without skips", Shape(blocks=8, causal=False, norm="none"), steps=0, touch=without_skip,
           found_by=("rank_collapse", "equal_sequences", "common_vector")),
    Recipe("one direction", touch=after(into_one_direction), found_by=("one_direction", "dimensional_collapse")),
    Recipe("a common vector", touch=after(lambda x: x + 60.0), found_by=("common_vector", "rank_collapse")),
    Recipe("massive third of the tokens", touch=after(spiked), found_by=("massive_activations",)),
    Recipe("idle block, trained", before=lambda m: zero_last(m, 2), touch=lambda m: zero_last(m, 2), found_by=("idle_layer",)),
    Recipe("all branches a thousandth", Shape(blocks=6), touch=all_small, found_by=("same_representation", "idle_layer")),
    Recipe("last half idle", Shape(blocks=8), touch=lambda m: zero_last(m, 4, 5, 6, 7, by=1e-3),
           found_by=("same_representation", "curse_of_depth", "idle_layer")),
    Recipe("constant step", touch=constant_step, found_by=("constant_branch",)),
    Recipe("norm gains of zero", touch=small_norms, found_by=("idle_layer", "constant_branch")),
    Recipe("attention 60 times as sharp", touch=sharp, found_by=("attention_entropy_collapse",)),
    Recipe("no causal mask", before=looking_ahead, found_by=("looks_ahead",)),
    Recipe("no causal mask, untrained", before=looking_ahead, steps=0, found_by=("looks_ahead",)),
    Recipe("sequences equal", touch=forgotten, found_by=("equal_sequences",)),
    Recipe("gradient times 1e-5", touch=lambda m: setattr(m.blocks[2], "before", lambda x: ScaledGradient.apply(x, 1e-5)),
           found_by=("vanishing_gradient",)),
    Recipe("gradient times 1e5", touch=lambda m: setattr(m.blocks[2], "before", lambda x: ScaledGradient.apply(x, 1e5)),
           found_by=("exploding_gradient",)),
    Recipe("detached block", touch=lambda m: setattr(m.blocks[2], "before", torch.detach), found_by=("cut_gradient",)),
    Recipe("diverging, recorded", record=60, rate=1.0,
           found_by=("diverged_loss", "loss_not_finite", "loss_spike", "large_update", "residual_not_finite")),
    Recipe("frozen block, recorded", record=30, touch=not_learning, found_by=("frozen_module", "lost_update")),
    Recipe("starved expert, recorded", Shape(experts=4), record=30, touch=starved_expert,
           found_by=("silent_module", "lost_update")),
    Recipe("softmax twice", before=twice, found_by=("softmax_twice",)),
    Recipe("statistics never updated", Shape(blocks=4, classes=10), data=digits, build=ConvNet, steps=80, touch=stale_norms,
           found_by=("stale_statistics",)),
    Recipe("mixing amplifies", Shape(**MHC), touch=gain(2.5), found_by=("gain_explosion",)),
    Recipe("HC amplifies, trained so", Shape(mixing="hc", **MHC), before=gain(2.2), found_by=("gain_explosion",)),
    Recipe("one connection 300 times", Shape(**MHC), touch=gain(300.0, 3),
           found_by=("single_gain_explosion", "gain_explosion")),
    Recipe("one connection uniform", Shape(**MHC), touch=towards_uniform(1.0, 3),
           found_by=("uniform_mixing", "stream_collapse")),
    Recipe("streams collapse over depth", Shape(streams=4, blocks=6), touch=towards_uniform(0.5),
           found_by=("stream_collapse",)),
    Recipe("held at the identity", Shape(**MHC), before=held_at_identity, found_by=("stuck_at_identity",)),
    Recipe("streams stay copies", Shape(start="copies", **MHC), before=held_as_copies, found_by=("copied_streams",)),
    Recipe("a stream never read", Shape(**MHC), before=factors("pre", 1e-4), found_by=("unread_stream",)),
    Recipe("a stream never written", Shape(**MHC), before=factors("post", 1e-4), found_by=("unwritten_stream",)),
    Recipe("one stream read alone", Shape(**MHC), touch=factors("pre", 1.0, 1e-3), found_by=("dominant_stream",)),
    Recipe("a silent stream", Shape(**MHC), before=silent, found_by=("silent_stream", "unread_stream", "loud_stream")),
    Recipe("one round of Sinkhorn", Shape(**MHC), touch=one_round, found_by=("sinkhorn_not_converged", "one_sided_mixing")),
    Recipe("Sinkhorn in bfloat16", Shape(**MHC), touch=edits(lambda a, b, c: (a, b, c.bfloat16().float())),
           found_by=("rounded_mixing", "rounded_coefficients")),
]  # fmt: skip
