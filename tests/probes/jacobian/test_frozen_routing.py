"""Frozen routing where all weights of a connection are parts of one fused tensor, or are taken from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian as dense_jacobian

from depthscope import probes
from depthscope.probes.jacobian import jacobian

N, D, T = 3, 8, 4


def split(fused):
    return torch.split(fused, [N, N, N * N], dim=-1)


def chunked(fused):
    pre, post, *rows = fused.chunk(N + 2, dim=-1)
    return pre, post, torch.cat(rows, dim=-1)


def sliced(fused):
    return fused[..., :N], fused[..., N : 2 * N], fused[..., 2 * N :]


def unbound(fused):
    pre, post, *rows = fused.unflatten(-1, (N + 2, N)).unbind(-2)
    return pre, post, torch.stack(rows, dim=-2)


def viewed(fused):
    rows = fused.view(*fused.shape[:-1], N + 2, N)
    return rows[..., 0, :], rows[..., 1, :], rows[..., 2:, :]


PIECES = {"split": split, "chunk": chunked, "slices": sliced, "unbind": unbound, "view": viewed}


class Fused(nn.Module):
    """One linear map gives H_pre, H_post and H_res; the matrix by Sinkhorn on it (mHC) or as it is (HC)."""

    def __init__(self, pieces: str, constrained: bool):
        super().__init__()
        self.pieces = PIECES[pieces]
        self.linear = nn.Linear(N * D, 2 * N + N * N)
        self.sinkhorn_rounds = 5 if constrained else 0
        self.last = None

    def weights(self, x):
        pre, post, mix = self.pieces(self.linear(x.flatten(-2)))
        mix = mix.reshape(*mix.shape[:2], N, N)
        for _ in range(self.sinkhorn_rounds):
            mix = mix - mix.logsumexp(-1, keepdim=True)
            mix = mix - mix.logsumexp(-2, keepdim=True)
        return pre.sigmoid(), 2 * post.sigmoid(), mix.exp() if self.sinkhorn_rounds else mix

    def forward(self, x):
        self.last = pre, post, mix = self.weights(x)
        return torch.einsum("btn,btnd->btd", pre, x), post, mix


class FusedSinkhorn(Fused):
    """All weights pass through one fused function; what is returned are views of its result."""

    def weights(self, x):
        fused = self.linear(x.flatten(-2)).unflatten(-1, (N + 2, N))
        for _ in range(5):
            fused = fused - fused.logsumexp(-1, keepdim=True)
            fused = fused - fused.logsumexp(-2, keepdim=True)
        fused = fused.exp()
        return fused[..., 0, :], fused[..., 1, :], fused[..., 2:, :]


class FusedPair(Fused):
    """The same as two methods, as lucidrains' connections have them."""

    num_residual_streams = N

    def width_connection(self, x):
        self.last = pre, post, mix = self.weights(x)
        alpha = torch.cat([pre.unsqueeze(-1), mix.mT], dim=-1)  # sources by (view, destinations)
        branch_in, *mixed = torch.einsum("btsv,btsd->btvd", alpha, x).split([1, N], dim=-2)
        return branch_in.squeeze(-2), mixed[0], {"beta": post}

    def depth_connection(self, branch_out, residuals, *, beta):
        return residuals + beta.unsqueeze(-1) * branch_out.unsqueeze(-2)


class Block(nn.Module):
    """X' = H_res X + H_post ⊗ F(H_pre X); ``takes`` says which tensors the block takes for the weights."""

    def __init__(self, connection: nn.Module, takes: str):
        super().__init__()
        self.connect, self.takes = connection, takes
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, x, shared=None):
        if isinstance(self.connect, FusedPair):
            return self.pair(x)
        branch_in, post, mix = self.connect(x)
        if self.takes == "computed again":
            _, post, mix = self.connect.weights(x)
        elif self.takes == "matrix from the attribute":
            mix = self.connect.last[2]
        elif self.takes == "write weights from the attribute":
            post = self.connect.last[1]
        elif self.takes == "read again":
            branch_in = torch.einsum("btn,btnd->btd", self.connect.last[0], x)
        elif self.takes == "write weights rescaled":
            post = post * (self.connect.last[1] / post)
        return mix @ x + post.unsqueeze(-1) * self.mlp(branch_in).unsqueeze(-2)

    def pair(self, x):
        branch_in, mixed, weights = self.connect.width_connection(x)
        if self.takes == "write weights from the attribute":
            weights = {"beta": self.connect.last[1]}
        elif self.takes == "matrix from the attribute":
            mixed = self.connect.last[2] @ x
        return self.connect.depth_connection(self.mlp(branch_in), mixed, **weights)


class Model(nn.Module):
    def __init__(self, connection, takes: str = "returned"):
        super().__init__()
        self.embed = nn.Embedding(16, N * D)
        self.blocks = nn.ModuleList(Block(connection(), takes) for _ in range(3))

    def forward(self, ids):
        x = self.embed(ids).unflatten(-1, (N, D))
        for block in self.blocks:
            x = block(x)
        return x.mean(2)


def built(connection, takes: str = "returned") -> Model:
    torch.manual_seed(0)
    model = Model(connection, takes).eval()
    for name, parameter in model.named_parameters():
        if "connect" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 16, (2, T), generator=torch.Generator().manual_seed(0))


def frozen_reference(model: Model, ids: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
    """The Jacobian of all blocks, with the weights that they have at these states as constants."""
    x = model.embed(ids).unflatten(-1, (N, D)).detach() if x is None else x
    weights, state = [], x
    for block in model.blocks:
        weights.append([w.detach() for w in block.connect.weights(state)])
        state = block(state).detach()

    return constant_jacobian(model, weights, x)


def constant_jacobian(model: Model, weights: list[list[torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """The Jacobian of all blocks at a state, with given weights of theirs."""

    def frozen(state):
        for block, (pre, post, mix) in zip(model.blocks, weights, strict=True):
            branch = block.mlp(torch.einsum("btn,btnd->btd", pre, state))
            state = mix @ state + post.unsqueeze(-1) * branch.unsqueeze(-2)
        return state

    return dense_jacobian(frozen, x).reshape(x.numel(), x.numel()).double()


def error_of(model: Model, ids: torch.Tensor, routing: str = "frozen") -> float:
    """Relative error of the operator against the reference."""
    expected = frozen_reference(model, ids)
    op = jacobian(model, ids, tokens="all", routing=routing)
    rows = torch.stack([op.rmatvec(u) for u in torch.eye(op.shape[0], dtype=torch.float64)])
    column = op.matvec(torch.ones(op.shape[1], dtype=torch.float64))
    torch.testing.assert_close(rows.sum(1), column, atol=1e-4, rtol=1e-3)
    return float((rows - expected).norm() / expected.norm())


FROZEN = {
    **{f"mhc, {name}": (lambda name=name: Fused(name, True)) for name in PIECES},
    **{f"hc, {name}": (lambda name=name: Fused(name, False)) for name in PIECES},
    "views after one fused sinkhorn": lambda: FusedSinkhorn("split", True),
    **{f"two methods, {name}": (lambda name=name: FusedPair(name, True)) for name in PIECES},
}


@pytest.mark.parametrize("name", FROZEN)
def test_weights_from_one_fused_tensor_are_frozen_rightly(name, ids):
    model = built(FROZEN[name])
    assert probes.capture(model, ids).attrs["reconstruction_error"] < 1e-6
    assert error_of(model, ids) < 1e-5
    assert error_of(model, ids, "full") > 1e-2, "the routing has a derivative, so freezing it shows"


TAKEN = [
    "computed again",
    "matrix from the attribute",
    "write weights from the attribute",
    "read again",
    "write weights rescaled",
]


@pytest.mark.parametrize("takes", TAKEN)
@pytest.mark.parametrize("constrained", [True, False], ids=["mhc", "hc"])
def test_weights_that_the_block_takes_elsewhere_are_frozen_where_they_are_applied(constrained, takes, ids):
    model = built(lambda: Fused("split", constrained), takes)
    assert probes.capture(model, ids).attrs["reconstruction_error"] < 1e-6, "the values agree"
    assert error_of(model, ids) < 1e-5
    assert error_of(model, ids, "full") > 1e-2


@pytest.mark.parametrize("takes", ["matrix from the attribute", "write weights from the attribute"])
def test_two_methods_may_hand_weights_on_as_attributes(takes, ids):
    model = built(lambda: FusedPair("split", True), takes)
    assert probes.capture(model, ids).attrs["reconstruction_error"] < 1e-6
    assert error_of(model, ids) < 1e-5


class Packed(Fused):
    """Returns the fused tensor, which the block slices, after the write weights."""

    def forward(self, x):
        pre, post, mix = self.weights(x)
        return torch.einsum("btn,btnd->btd", pre, x), post, torch.cat([pre, post, mix.flatten(-2)], dim=-1)


class PackedBlock(Block):
    def forward(self, x):
        branch_in, _, fused = self.connect(x)
        _, post, mix = split(fused)
        mix = mix.unflatten(-1, (N, N))
        return mix @ x + post.unsqueeze(-1) * self.mlp(branch_in).unsqueeze(-2)


def test_a_fused_tensor_that_the_block_slices(ids):
    """H_res is no output of the connection."""
    model = built(lambda: Fused("split", False))
    for number in range(3):
        torch.manual_seed(number)
        model.blocks[number] = PackedBlock(Packed("split", False), "")
    assert error_of(model, ids) < 1e-5


class Lagged(Model):
    """Each block mixes and writes by weights that the state before the previous block gave."""

    def forward(self, ids):
        x = self.embed(ids).unflatten(-1, (N, D))
        lag = None
        for block in self.blocks:
            block.connect.lag, lag = lag, x
            x = block(x)
        return x.mean(2)


class LaggedConnection(Fused):
    lag = None

    def weights(self, x):
        return super().weights(x if self.lag is None else self.lag)


@pytest.mark.parametrize("takes", ["matrix from the attribute", "write weights from the attribute"])
def test_weights_of_an_earlier_depth_are_frozen_too(takes, ids):
    torch.manual_seed(0)
    model = Lagged(lambda: LaggedConnection("split", True), takes).eval()
    model.blocks[0].takes = "returned"  # the first block has no earlier state
    for name, parameter in model.named_parameters():
        if "connect" in name:
            nn.init.normal_(parameter, std=0.3)
    assert probes.capture(model, ids).attrs["reconstruction_error"] < 1e-6
    first = state = model.embed(ids).unflatten(-1, (N, D)).detach()
    weights, lag = [], None
    for block in model.blocks:
        block.connect.lag, lag = lag, state
        weights.append([w.detach() for w in block.connect.weights(state)])
        state = block(state).detach()

    expected = constant_jacobian(model, weights, first)
    op = jacobian(model, ids, tokens="all", routing="frozen")
    rows = torch.stack([op.rmatvec(u) for u in torch.eye(op.shape[0], dtype=torch.float64)])
    assert (rows - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_is_not_refused(dtype, ids):
    model = built(lambda: Fused("split", True)).to(dtype)
    op = jacobian(model, ids, tokens="all", routing="frozen")
    assert op.dtype == dtype


class Copies(Model):
    """Streams that begin as copies of the embedding, as nearly all models have them."""

    def forward(self, ids):
        x = self.embed(ids)[..., :D].unsqueeze(-2).repeat(1, 1, N, 1)
        for block in self.blocks:
            x = block(x)
        return x.mean(2)


class Normalised(Fused):
    """H_pre and H_post both sum to one, so that on copies either of them gives the branch input."""

    def weights(self, x):
        pre, post, mix = split(self.linear(x.flatten(-2)))
        mix = mix.unflatten(-1, (N, N)).softmax(-1)
        return pre.softmax(-1), post.softmax(-1), mix


class NormalisedPair(Normalised, FusedPair):
    """The same as two methods; other matrices of the same shape pass before and after the one that is applied."""

    def width_connection(self, x):
        pre, post, mix = self.weights(x)
        alpha = torch.cat([pre.unsqueeze(-1), mix.mT], dim=-1)
        branch_in, *mixed = torch.einsum("btsv,btsd->btvd", alpha, x).split([1, N], dim=-2)
        decoy = torch.full_like(alpha, 1 / N) * 1.0
        return branch_in.squeeze(-2), mixed[0] + 0 * decoy.sum(), {"beta": post}


@pytest.mark.parametrize("connection", [Normalised, NormalisedPair])
def test_copied_streams_are_frozen_by_the_weights_that_are_applied(connection, ids):
    torch.manual_seed(0)
    model = Copies(lambda: connection("split", False)).eval()
    for name, parameter in model.named_parameters():
        if "connect" in name:
            nn.init.normal_(parameter, std=0.5)
    x = model.embed(ids)[..., :D].unsqueeze(-2).repeat(1, 1, N, 1).detach()
    expected = frozen_reference(model, ids, x)
    op = jacobian(model, ids, tokens="all", routing="frozen")
    rows = torch.stack([op.rmatvec(u) for u in torch.eye(op.shape[0], dtype=torch.float64)])
    assert (rows - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("seed", [0, 6, 11])
def test_a_capture_of_copied_streams_tells_read_from_write_weights(seed, ids):
    """In bfloat16 the write weights of two of these models explain the branch input better than its own ones."""
    torch.manual_seed(seed)
    model = Copies(lambda: Normalised("split", False)).eval()
    for name, parameter in model.named_parameters():
        if "connect" in name:
            nn.init.normal_(parameter, std=0.5)
    trace = probes.capture(model.bfloat16(), ids).trace
    x = torch.from_numpy(trace.residual.values[0]).bfloat16()
    pre = model.blocks[0].connect.weights(x)[0].detach().float().numpy()
    np.testing.assert_allclose(trace.h_pre.values[0], pre, atol=1e-6)


class OwnMix(torch.autograd.Function):
    """H_res X as a kernel of its own computes it, with the derivative of its weights."""

    @staticmethod
    def forward(ctx, mix, x):
        ctx.save_for_backward(mix, x)
        return (mix.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2)

    @staticmethod
    def backward(ctx, gradient):
        mix, x = ctx.saved_tensors
        return gradient @ x.mT, mix.mT @ gradient


class Kernel(Block):
    """Mixes by a function of its own, through which autograd sees no weights but those that it took."""

    def forward(self, x):
        branch_in, post, mix = self.connect(x)
        return OwnMix.apply(mix, x) + post.unsqueeze(-1) * self.mlp(branch_in).unsqueeze(-2)


def test_weights_that_a_kernel_of_its_own_applies_are_refused(ids):
    model = built(lambda: Fused("split", True))
    for number in range(3):
        model.blocks[number] = Kernel(model.blocks[number].connect, "")
    with pytest.raises(probes.StreamConnectionError, match=r"differs from that of .*take routing='full'"):
        jacobian(model, ids, tokens="all", routing="frozen")
    jacobian(model, ids, tokens="all", routing="full")
