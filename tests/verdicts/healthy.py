"""Which networks must be blamed for nothing? Families as they are published, fresh and trained, on ordinary batches.

Healthy is a network that a reviewer would let pass: it starts as its paper says, or it was trained on its task and lowers its
loss. A warning or a failure that is not explained by another one is a false alarm; notes (INFO) are none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from depthscope.app.demo import small_lm
from tests.verdicts.networks import FAMILIES, STREAMED, built
from tests.verdicts.plans import Plan, drawn_plan, short


@dataclass(frozen=True)
class Kind:
    """One kind of healthy network."""

    title: str  # for the table
    draw: Callable[[random.Random], Plan]  # draws a plan
    build: Callable[[Plan], nn.Module] = built  # makes the network of a plan, before training
    # changes the network after training
    touch: Callable[[nn.Module, random.Random], Any] = lambda model, rng: None
    slow: bool = False  # whether it needs transformers, or seconds


def streams_for(family: str, rng: random.Random) -> int:
    """A number of streams that the family can have."""
    if family not in STREAMED:
        return 1
    if family == "near identity":
        return 2
    return rng.choice((2, 4, 8) if family == "KromHC" else (2, 3, 4))


def of(family: str, trained: bool) -> Callable[[random.Random], Plan]:
    def draw(rng: random.Random) -> Plan:
        plan = drawn_plan(rng, family, trained=trained, streams=streams_for(family, rng))
        # Scales that begin at zero take longer, and a higher rate, until the layers do anything: before that the network
        # does hold one representation.
        slow_start = trained and family == "ReZero transformer"
        return replace(plan, blocks=min(plan.blocks, 5), steps=100, rate=1e-2) if slow_start else plan

    return draw


def on_short_batches(family: str, *, padded: bool) -> Callable[[random.Random], Plan]:
    def draw(rng: random.Random) -> Plan:
        plan = of(family, rng.random() < 0.5)(rng)
        return replace(plan, padded=True) if padded else short(plan, rng)

    return draw


def with_a_sink(model: nn.Module, rng: random.Random) -> None:
    """One token a sequence gets a massive activation, as the first token of trained language models."""
    feature, size = rng.randrange(model.embed.embedding_dim), rng.uniform(2000, 5000)

    def sink(x):
        added = torch.zeros_like(x)
        added[:, 0, feature] = size
        return x + added

    model.blocks[1].after = sink
    # The last block takes it out again, as trained models do, so that the head does not see it.
    model.blocks[-1].after = lambda x: x - (sink(x) - x)


def frozen_below(model: nn.Module, rng: random.Random) -> None:
    """Fine-tuning: the embedding and some first blocks do not learn."""
    for part in (model.embed, *model.blocks[: rng.randrange(1, len(model.blocks) - 1)]):
        part.requires_grad_(False)
    model.place.requires_grad_(False)


def small_embedding(trained: bool) -> Callable[[random.Random], Plan]:
    return lambda rng: replace(of("pre-norm transformer", trained)(rng), embedding=0.02)


def of_the_study(kind: str) -> Callable[[Plan], nn.Module]:
    """The product's own small language model; its head begins at zero, so it is trained."""

    def build(plan: Plan) -> nn.Module:
        size = small_lm.Size(
            layers=plan.blocks, width=plan.width, heads=plan.heads, streams=max(plan.streams, 1)
        )
        return WithLogits(small_lm.build(kind, size=size, seed=plan.seed))

    return build


class WithLogits(nn.Module):
    """A model that returns its logits, as the zoo's own models do; one that has none gets a head."""

    def __init__(self, model: nn.Module, width: int = 0, vocabulary: int = 0):
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, vocabulary) if width else None

    def forward(self, input_ids):
        output = self.model(input_ids)
        return output.logits if self.head is None else self.head(output.last_hidden_state)


# Tiny models of transformers, by their names in the catalogue of families.
PUBLISHED = (
    "llama",
    "gpt2",
    "gpt_neox",
    "bert",
    "deepseek_v4",
    "gemma3n",
    "qwen3",
    "gemma3",
    "opt",
    "mixtral",
    "mamba",
)


def published(name: str) -> Callable[[Plan], nn.Module]:
    """As the package starts it; the connections of deepseek_v4 near the identity, since the package leaves them at zero."""

    def build(plan: Plan) -> nn.Module:
        # Here, since these imports take seconds.
        from tests.models import stream_models
        from tests.models.families import FAMILIES, VOCABULARY

        torch.manual_seed(plan.seed)
        if name == "gemma3n":
            return WithLogits(stream_models.gemma3n(4), 64, VOCABULARY)
        if name == "deepseek_v4":
            return WithLogits(near_identity(stream_models.deepseek_v4(3)))
        family = next(each for each in FAMILIES if (each.name, each.package) == (name, "transformers"))
        model = family.build()
        if name == "bert":  # trained to predict the next token, it must not look at later ones
            model.config.is_decoder = True
            model = type(model)(model.config)
        return WithLogits(model, 32 if name == "bert" else 0, VOCABULARY)

    return build


def near_identity(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, base in model.named_parameters():
            if name.endswith("_hc.base"):
                base[4:8].normal_()
                base[8:] = 4 * torch.eye(4).flatten()
    return model


def for_published(name: str, trained: bool) -> Callable[[random.Random], Plan]:
    """Their sizes are those of the catalogue."""
    return lambda rng: replace(
        drawn_plan(rng, "pre-norm transformer", trained=trained),
        family=name,
        blocks=3,
        vocabulary=64,
        rate=1e-3,
    )


def _kinds() -> list[Kind]:
    kinds = [
        Kind(f"{family}, {'trained' if trained else 'fresh'}", of(family, trained))
        for family in FAMILIES
        for trained in (False, True)
    ]
    for family in ("pre-norm transformer", "mHC"):
        kinds.append(Kind(f"{family}, padded batch", on_short_batches(family, padded=True)))
        kinds.append(Kind(f"{family}, short batch", on_short_batches(family, padded=False)))
    sink = on_short_batches("pre-norm transformer", padded=False)
    kinds.append(Kind("a sink token, short batch", sink, touch=with_a_sink))
    padded = on_short_batches("pre-norm transformer", padded=True)
    kinds.append(Kind("a sink token, padded batch", padded, touch=with_a_sink))
    kinds.append(Kind("small embedding, fresh", small_embedding(False)))
    kinds.append(Kind("small embedding, trained", small_embedding(True)))
    for family in ("pre-norm transformer", "mHC"):
        half = Kind(f"{family} in bfloat16", of(family, True), touch=lambda model, rng: model.bfloat16())
        kinds.append(half)
    kinds.append(Kind("eight streams", lambda rng: replace(of("mHC", rng.random() < 0.5)(rng), streams=8)))
    kinds.append(Kind("first blocks frozen", of("pre-norm transformer", True), touch=frozen_below))
    for kind, streams in (("residual", 1), ("hc", 4), ("mhc", 4)):
        family = {"residual": "pre-norm transformer", "hc": "HC", "mhc": "mHC"}[kind]

        def draw(rng: random.Random, family: str = family, streams: int = streams) -> Plan:
            return drawn_plan(rng, family, trained=True, streams=streams)

        kinds.append(Kind(f"the study's {kind}, trained", draw, of_the_study(kind)))
    kinds += [
        Kind(f"{name} of transformers, {'trained' if trained else 'fresh'}", for_published(name, trained),
             published(name), slow=True)
        for name in PUBLISHED
        for trained in (False, True)
    ]  # fmt: skip
    return kinds


KINDS = _kinds()
