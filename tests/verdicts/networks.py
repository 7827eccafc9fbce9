"""What networks is the zoo made of? Small models whose norms, skips, scales and connections are what a plan says.

Shapes: B batch, T token, n stream, D feature. A fault is planted from outside: blocks apply `before` and `after` to the
state, connections `change` to their weights, so that a faulty network differs from a healthy one in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.verdicts.parts import branches, preserve_variance
from tests.verdicts.plans import Plan

State = torch.Tensor


def unchanged(x: Any) -> Any:
    return x


# --- plain blocks ---


@dataclass(frozen=True)
class Form:
    """How a plain block puts its branches on the skip."""

    # "pre": x + F(norm x); "post": norm(x + F x); "sandwich": x + norm F(norm x); "none": x + F x
    norm: str = "pre"
    # keys of `parts.MIXERS` and `parts.TRANSFORMS`; without a mixer tokens do not see one another
    mixer: str = "attention"
    transform: str = "mlp"
    # where a learned scale of every branch begins: LayerScale, or ReZero where it is 0
    scale: float | None = None
    parallel: bool = False  # whether attention and MLP read the same state
    # whether a gate that is computed from the state decides between the skip and the branch
    gated: bool = False
    deep: bool = False  # DeepNorm: a post-norm block whose skip is (2 L)^¼ and whose branches begin small
    rms: bool = False  # whether its norms are RMSNorm


class Block(nn.Module):
    """One plain block."""

    def __init__(self, plan: Plan, form: Form):
        super().__init__()
        self.form = form
        self.branches = nn.ModuleList(branches(plan, form.mixer, form.transform))
        count = len(self.branches)
        normed = form.norm != "none"
        norm = nn.RMSNorm if form.rms else nn.LayerNorm
        self.norms = nn.ModuleList(norm(plan.width) if normed else nn.Identity() for _ in range(count))
        if form.norm == "sandwich":
            self.outer = nn.ModuleList(nn.LayerNorm(plan.width) for _ in range(count))
        if form.scale is not None:
            self.scales = nn.ParameterList(torch.full((plan.width,), form.scale) for _ in range(count))
        # What is not normalised has weights of variance-preserving size, and is kept small by the depth alone.
        if not normed:
            preserve_variance(self.branches)
        self.fixed = 1 / math.sqrt(2 * plan.blocks) if not normed and form.scale is None else 1.0
        self.skip = 1.0
        if form.deep:
            self.skip, self.fixed = (2 * plan.blocks) ** 0.25, (8 * plan.blocks) ** -0.25
        if form.gated:
            self.gates = nn.ModuleList(nn.Linear(plan.width, plan.width) for _ in range(count))
        self.before, self.after = unchanged, unchanged

    def forward(self, x):
        x = self.before(x)
        source = x
        for number in range(len(self.branches)):
            x = self.step(number, x, source if self.form.parallel else x)
        return self.after(x)

    def step(self, number: int, x: State, source: State) -> State:
        if self.form.norm == "post":
            return self.norms[number](self.skip * x + self.written(number, source))
        if self.form.gated:
            share = (self.gates[number](x) - 2.0).sigmoid()
            return self.skip * (1.0 - share) * x + share * self.written(number, self.norms[number](source))
        return self.skip * x + self.written(number, self.norms[number](source))

    def written(self, number: int, x: State) -> State:
        out = self.branches[number](x)
        if self.form.norm == "sandwich":
            out = self.outer[number](out)
        return self.fixed * out if self.form.scale is None else self.scales[number] * out


class Network(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, plan: Plan, make: Callable[[int], nn.Module]):
        super().__init__()
        self.embed = nn.Embedding(plan.vocabulary, plan.width)
        nn.init.normal_(self.embed.weight, std=plan.embedding)
        self.place = nn.Parameter(0.1 * plan.embedding * torch.randn(64, plan.width))
        self.blocks = nn.ModuleList(make(number) for number in range(plan.blocks))
        self.norm, self.head = nn.LayerNorm(plan.width), nn.Linear(plan.width, plan.vocabulary)

    def forward(self, input_ids, attention_mask=None):
        # Padding is on the right, where a causal token does not look: the mask is for whoever measures.
        return self.head(self.norm(self.trunk(self.embedded(input_ids))))

    def embedded(self, ids):
        return self.embed(ids) + self.place[: ids.shape[1]]

    def trunk(self, x: State) -> State:
        for block in self.blocks:
            x = block(x)
        return x


def plain(form: Form) -> Callable[[Plan], nn.Module]:
    return lambda plan: Network(plan, lambda number: Block(plan, form))


def looped(plan: Plan) -> nn.Module:
    """A universal transformer: one block, as often as there would be blocks."""
    block = Block(plan, Form())
    return Network(plan, lambda number: block)


class VisionNetwork(Network):
    """Patches of an image as tokens, with or without a class token that is read out."""

    def __init__(self, plan: Plan, form: Form, *, token: bool):
        super().__init__(plan, lambda number: Block(plan, form))
        del self.embed
        self.patches = nn.Conv2d(3, plan.width, 4, stride=4)
        self.token = nn.Parameter(0.1 * torch.randn(plan.width)) if token else None
        self.head = nn.Linear(plan.width, 8)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        x = self.norm(self.trunk(x + self.place[: x.shape[1]]))
        return self.head(x.mean(1) if self.token is None else x[:, 0])


# --- connections over depth ---


class DenseFormer(Network):
    """After each block a weighted average of all states so far; it starts at the last one (arXiv 2402.02622)."""

    def __init__(self, plan: Plan):
        super().__init__(plan, lambda number: Block(plan, Form()))
        self.average = nn.ParameterList(torch.eye(n + 2)[n + 1] for n in range(plan.blocks))

    def trunk(self, x):
        states = [x]
        for block, weights in zip(self.blocks, self.average, strict=True):
            states.append(block(x))
            x = sum(weight * state for weight, state in zip(weights, states, strict=True))
        return x


class DepthQuery(nn.Module):
    """Σ softmax(q · norm(v_i)) v_i over earlier outputs; a query of zero is their mean."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.norm = nn.LayerNorm(plan.width, elementwise_affine=False)
        self.query = nn.Linear(plan.width, 1, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, values):
        stacked = torch.stack(values)
        weights = torch.einsum("d,jbtd->jbt", self.query.weight[0], self.norm(stacked)).softmax(0)
        return torch.einsum("jbt,jbtd->btd", weights, stacked)


class Sublayer(nn.Module):
    """A branch after its norm."""

    def __init__(self, plan: Plan, branch: nn.Module):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(plan.width), branch

    def forward(self, x):
        return self.branch(self.norm(x))


class AttentionResidual(Network):
    """Every sublayer reads a softmax over the outputs of all earlier ones (arXiv 2603.15031)."""

    def __init__(self, plan: Plan):
        super().__init__(plan, lambda number: Sublayer(plan, branches(plan)[number % 2]))
        self.queries = nn.ModuleList(DepthQuery(plan) for _ in range(plan.blocks + 1))

    def trunk(self, x):
        values = [x]
        for block, query in zip(self.blocks, self.queries, strict=False):
            values.append(block(query(values)))
        return self.queries[-1](values)


# --- streams ---


def sinkhorn(logits: torch.Tensor, rounds: int = 20) -> torch.Tensor:
    """Columns, then rows, in logarithms."""
    for _ in range(rounds):
        logits = logits.log_softmax(-2).log_softmax(-1)
    return logits.exp()


def of_permutations(logits: torch.Tensor, n: int) -> torch.Tensor:
    """A mixture of permutation matrices (Birkhoff); of more than three streams, of the cyclic and transposing ones."""
    orders = list(permutations(range(n))) if n <= 3 else _some_orders(n)
    matrices = torch.stack([torch.eye(n)[list(order)] for order in orders])
    return torch.einsum("...p,pij->...ij", logits.softmax(-1), matrices)


def _some_orders(n: int) -> list[tuple[int, ...]]:
    cyclic = [tuple((i + shift) % n for i in range(n)) for shift in range(n)]
    swapped = []
    for first in range(n - 1):
        order = list(range(n))
        order[first], order[first + 1] = order[first + 1], order[first]
        swapped.append(tuple(order))
    return cyclic + swapped


def of_kronecker_factors(logits: torch.Tensor) -> torch.Tensor:
    """A ⊗ B ⊗ … of doubly stochastic 2 × 2 factors."""
    result = torch.ones(*logits.shape[:-1], 1, 1)
    for share in logits.sigmoid().unbind(-1):
        factor = torch.stack([torch.stack([share, 1 - share], -1), torch.stack([1 - share, share], -1)], -2)
        size = 2 * result.shape[-1]
        result = torch.einsum("...ij,...kl->...ikjl", result, factor).reshape(*share.shape, size, size)
    return result


def of_shifts(logits: torch.Tensor, n: int) -> torch.Tensor:
    """Circulant: a mixture of cyclic shifts."""
    matrices = torch.stack([torch.eye(n).roll(shift, 0) for shift in range(n)])
    return torch.einsum("...p,pij->...ij", logits.softmax(-1), matrices)


def by_cayley(logits: torch.Tensor) -> torch.Tensor:
    """Orthogonal: (I + A)⁻¹ (I − A) of a skew A."""
    skew = logits - logits.mT
    eye = torch.eye(logits.shape[-1])
    return torch.linalg.solve(eye + skew, eye - skew)


def _diagonal_logits(n: int, strength: float, spread: float) -> torch.Tensor:
    return strength * torch.eye(n) + spread * torch.randn(n, n)


def _first_logits(count: int, strength: float, spread: float) -> torch.Tensor:
    logits = spread * torch.randn(count)
    logits[0] += strength  # the identity is the first of the permutations and shifts
    return logits


@dataclass(frozen=True)
class Mixing:
    """How H_res is made of its logits, and where these begin."""

    matrix: Callable[[torch.Tensor, int], torch.Tensor]
    logits: Callable[[int, float, float], torch.Tensor]


MIXINGS: dict[str, Mixing] = {
    "HC": Mixing(
        lambda logits, n: logits, lambda n, strength, spread: torch.eye(n) + 0.02 * spread * torch.randn(n, n)
    ),
    "mHC": Mixing(lambda logits, n: sinkhorn(logits), _diagonal_logits),
    "mHC-lite": Mixing(
        of_permutations,
        lambda n, strength, spread: _first_logits(
            math.factorial(n) if n <= 3 else 2 * n - 1, strength, spread
        ),
    ),
    "KromHC": Mixing(
        lambda logits, n: of_kronecker_factors(logits),
        lambda n, strength, spread: strength + spread * torch.randn(round(math.log2(n))),
    ),
    "circulant": Mixing(of_shifts, lambda n, strength, spread: _first_logits(n, strength, spread)),
    "orthogonal": Mixing(
        lambda logits, n: by_cayley(logits), lambda n, strength, spread: 0.2 * spread * torch.randn(n, n)
    ),
    "independent": Mixing(lambda logits, n: torch.eye(n).expand(*logits.shape[:-1], n, n), lambda n, *_: torch.zeros(1)),
}  # fmt: skip


class Connection(nn.Module):
    """H_pre, H_res and H_post of one sublayer: static ones and a part that depends on the streams.

    HC begins as in its paper: reads one stream in turn, writes 1 to all, mixes by the identity, and the dynamic part is
    zero. The others read and write by sigmoids around an equal share, and begin near the identity.
    """

    def __init__(
        self, plan: Plan, mixing: str, number: int, *, strength: float, spread: float, dynamic: float = 0.01
    ):
        super().__init__()
        n = plan.streams
        self.n, self.free, self.mixing = n, mixing in ("HC", "orthogonal"), MIXINGS[mixing]
        self.logits = nn.Parameter(self.mixing.logits(n, strength, spread))
        if self.free:
            self.read, self.write = nn.Parameter(torch.eye(n)[number % n]), nn.Parameter(torch.ones(n))
        else:
            share = math.log(1 / (n - 0.99))  # the sigmoid of it is about 1 / n
            self.read = nn.Parameter(share + spread * torch.randn(n))
            self.write = nn.Parameter(spread * torch.randn(n))
        self.norm = nn.LayerNorm(plan.width)
        sizes = (n, self.logits.numel(), n)
        self.project = nn.ModuleList(nn.Linear(n * plan.width, size, bias=False) for size in sizes)
        for linear in self.project:
            if self.free:
                nn.init.zeros_(linear.weight)
        self.scale = nn.Parameter(torch.full((3,), dynamic))
        self.change = unchanged
        self.change_logits = unchanged

    def forward(self, x):
        flat = self.norm(x).flatten(2)
        dynamic = [linear(flat) for linear in self.project]
        if self.free:
            dynamic = [each.tanh() for each in dynamic]
        read = self.read + self.scale[0] * dynamic[0]
        logits = self.logits + self.scale[1] * dynamic[1].unflatten(-1, self.logits.shape)
        write = self.write + self.scale[2] * dynamic[2]
        mix = self.mixing.matrix(self.change_logits(logits), self.n)
        if not self.free:
            read, write = read.sigmoid(), 2 * write.sigmoid()
        return self.change((write, mix, read))


class ReturnedConnection(nn.Module):
    """A connection that returns its weights and what the branch reads."""

    def __init__(self, connection: Connection):
        super().__init__()
        self.weights = connection

    def forward(self, x):
        write, mix, read = self.weights(x)
        return write, mix, torch.einsum("btn,btnd->btd", read, x)


class StreamBlock(nn.Module):
    """Attention and MLP, each within a connection."""

    def __init__(self, plan: Plan, mixing: str, number: int, **start: float):
        super().__init__()
        self.style = plan.style
        self.sublayers = nn.ModuleList(Sublayer(plan, branch) for branch in branches(plan))
        self.connections = nn.ModuleList(Connection(plan, mixing, 2 * number + i, **start) for i in range(2))
        if self.style == "returned":
            self.connections = nn.ModuleList(ReturnedConnection(each) for each in self.connections)
        self.before, self.after = unchanged, unchanged

    def forward(self, x):
        x = self.before(x)
        for connection, branch in zip(self.connections, self.sublayers, strict=True):
            x = (
                self.returned(connection, branch, x)
                if self.style == "returned"
                else self.local(connection, branch, x)
            )
        return self.after(x)

    def returned(self, connection: nn.Module, branch: nn.Module, x: State) -> State:
        write, mix, read = connection(x)
        return mix @ x + write.unsqueeze(-1) * branch(read).unsqueeze(2)

    def local(self, connection: nn.Module, branch: nn.Module, x: State) -> State:
        # The method and not the module: no hook sees what it returns.
        write, mix, read = connection.forward(x)
        out = branch(torch.einsum("btn,btnd->btd", read, x))
        return torch.einsum("btij,btjd->btid", mix, x) + torch.einsum("btn,btd->btnd", write, out)


class StreamNetwork(Network):
    """Streams begin as copies of the embedding, or each shifted by a vector of its own, and end in their mean."""

    def __init__(self, plan: Plan, make: Callable[[int], nn.Module]):
        super().__init__(plan, make)
        apart = 0.5 * plan.embedding if plan.start == "apart" else 0.0
        self.offsets = nn.Parameter(apart * torch.randn(plan.streams, plan.width))
        self.first, self.last = unchanged, unchanged

    def trunk(self, x):
        return self.last(super().trunk(self.first(x.unsqueeze(2) + self.offsets))).mean(2)


def streamed(
    mixing: str, *, strength: float = 4.0, spread: float = 0.3, dynamic: float = 0.01
) -> Callable[[Plan], nn.Module]:
    """A network of streams.

    `strength` is how near to the identity the mixing begins, `spread` how unequal its logits are, and `dynamic` the scale of
    their part that depends on the token.
    """
    start = {"strength": strength, "spread": spread, "dynamic": dynamic}

    def build(plan: Plan) -> nn.Module:
        return StreamNetwork(plan, lambda number: StreamBlock(plan, mixing, number, **start))

    return build


# --- images ---


class ConvBlock(nn.Module):
    """x + conv(relu(conv(x))), with norms or without."""

    def __init__(self, width: int, normed: bool, scale: float):
        super().__init__()
        norm = (lambda: nn.BatchNorm2d(width)) if normed else nn.Identity
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), norm()
        )  # fmt: skip
        preserve_variance(self)
        self.scale, self.normed, self.skip = scale, normed, 1.0
        self.before, self.after = unchanged, unchanged

    def forward(self, x):
        x = self.before(x)
        x = self.skip * x + self.scale * self.net(x)
        return self.after(x.relu() if self.normed else x)


class DepthwiseBlock(nn.Module):
    """ConvNeXt's: x + γ MLP(norm(depthwise convolution of x)), channels last within."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.1))
        self.before, self.after = unchanged, unchanged

    def forward(self, x):
        x = self.before(x)
        out = self.scale * self.net(self.norm(self.depthwise(x).movedim(1, -1)))
        return self.after(x + out.movedim(-1, 1))


class StagedNetwork(nn.Module):
    """Stages of convolutional blocks: each halves the image and doubles the width."""

    def __init__(self, plan: Plan, make: Callable[[int], nn.Module]):
        super().__init__()
        widths = [plan.width // 2 * 2**stage for stage in range(3)]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        per_stage = max(2, plan.blocks // 3)
        self.stages = nn.ModuleList(
            nn.Sequential(*(make(width) for _ in range(per_stage))) for width in widths
        )
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], 8)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage]

    def forward(self, images):
        x = self.stem(images)
        for number, stage in enumerate(self.stages):
            x = self.down[number - 1](x) if number else x
            x = stage(x)
        return self.head(x.mean((2, 3)))


def residual_net(*, normed: bool) -> Callable[[Plan], nn.Module]:
    def build(plan: Plan) -> nn.Module:
        scale = 1.0 if normed else 1 / math.sqrt(plan.blocks)
        return StagedNetwork(plan, lambda width: ConvBlock(width, normed, scale))

    return build


# Name of a family → how it is built of a plan.
PLAIN: dict[str, Callable[[Plan], nn.Module]] = {
    "pre-norm transformer": plain(Form()),
    "post-norm transformer": plain(Form("post")),
    "sandwich-norm transformer": plain(Form("sandwich")),
    "transformer without norms": plain(Form("none")),
    "parallel branches": plain(Form(parallel=True)),
    "LayerScale transformer": plain(Form(scale=0.1)),
    "ReZero transformer": plain(Form("none", scale=0.0)),
    "pre-norm MLP": plain(Form(mixer="")),
    "post-norm MLP": plain(Form("post", mixer="")),
    "MLP without norms": plain(Form("none", mixer="")),
    "RMSNorm and SwiGLU": plain(Form(transform="gated", rms=True)),
    "mixture of experts": plain(Form(transform="experts")),
    "recurrent network": plain(Form(mixer="recurrence")),
    "gated transformer": plain(Form(gated=True)),
    "DeepNorm transformer": plain(Form("post", deep=True)),
}
LOOPED: dict[str, Callable[[Plan], nn.Module]] = {"universal transformer": looped}
PATCHED: dict[str, Callable[[Plan], nn.Module]] = {
    "ViT": lambda plan: VisionNetwork(plan, Form(mixer="attention of all"), token=True),
    "MLP-Mixer": lambda plan: VisionNetwork(plan, Form(mixer="tokens"), token=False),
}
DEPTH: dict[str, Callable[[Plan], nn.Module]] = {
    "DenseFormer": DenseFormer,
    "attention residuals": AttentionResidual,
}
STAGED: dict[str, Callable[[Plan], nn.Module]] = {
    "ResNet": residual_net(normed=True),
    "ResNet without norms": residual_net(normed=False),
    "ConvNeXt": lambda plan: StagedNetwork(plan, DepthwiseBlock),
}
STREAMED: dict[str, Callable[[Plan], nn.Module]] = {
    "HC": streamed("HC"),
    "mHC": streamed("mHC"),
    "mHC-lite": streamed("mHC-lite"),
    "KromHC": streamed("KromHC"),
    "circulant": streamed("circulant"),
    "orthogonal": streamed("orthogonal"),
    "independent": streamed("independent"),
    # 1 − σ(3.6 …) of another stream at each connection: little, and a third over a dozen of them.
    "near identity": streamed("mHC", strength=3.6, spread=0.2),
    "mHC, dynamic": streamed("mHC", dynamic=1.0),
    "mHC-lite, dynamic": streamed("mHC-lite", dynamic=1.0),
}
IMAGES = STAGED | PATCHED
FAMILIES = PLAIN | LOOPED | DEPTH | IMAGES | STREAMED


def built(plan: Plan) -> nn.Module:
    """The network of a plan, with the same weights each time."""
    torch.manual_seed(plan.seed)
    return FAMILIES[plan.family](plan)


def functional_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Cross entropy of each next token, without padding."""
    following = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), ignore_index=-100)
