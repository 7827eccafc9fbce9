"""Jacobian operators against dense Jacobians; the model is as it was; what cannot be had is refused."""

from __future__ import annotations

import copy
import doctest
import importlib
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.autograd.functional import jacobian as dense_jacobian

from depthscope.probes.connections.coefficients import StreamConnectionError
from depthscope.probes.jacobian.differentiable_forward import JacobianError
from depthscope.probes.jacobian.operator import block_jacobians, jacobian
from tests.probes.jacobian.dense import dense, own_blocks


class Block(nn.Module):
    def __init__(self, width: int, *, inplace: bool = False, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, width)
        )
        self.inplace = inplace

    def forward(self, x):
        y = self.net(x.clone())  # so that writing into x leaves what the backward needs
        return x.add_(y) if self.inplace else x + y


class Stack(nn.Module):
    """A residual MLP; with ``outer`` the skips are outside the blocks, with ``source`` the first state comes back later."""

    def __init__(
        self, *, outer: bool = False, source: bool = False, width: int = 5, layers: int = 3, **options
    ):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, **options) for _ in range(layers))
        self.outer, self.source = outer, source

    def trunk(self, x, first=0, last=None):
        start = x
        for block in self.blocks[first:last]:
            x = x + block(x) if self.outer else block(x)
            x = x + 0.5 * start if self.source and block is self.blocks[-2] else x
        return x

    def forward(self, x):
        return self.trunk(self.embed(x)).sum(-1)


def stack(**options) -> Stack:
    torch.manual_seed(0)
    return Stack(**options).double().eval()


@pytest.fixture
def points() -> torch.Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- plain residual chains ---


def test_a_linear_residual_stack_has_the_product_of_its_matrices():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    matrices = [layer.weight.detach() for layer in model]
    op = jacobian(model, torch.randn(1, 4, dtype=torch.float64), start=1, stop=4)
    torch.testing.assert_close(dense(op), matrices[3] @ matrices[2] @ matrices[1])


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_mlp_against_autograd(points, start, stop, inplace):
    model = stack(inplace=inplace)
    state = model.trunk(model.embed(points), 0, start).detach()
    rows = [dense_jacobian(lambda x: model.trunk(x.clone()[None], start, stop)[0], row) for row in state]
    op = jacobian(model, points, start=start, stop=stop)
    assert op.shape == (10, 10)
    torch.testing.assert_close(dense(op), torch.block_diag(*rows))


def test_skips_outside_the_named_blocks_count(points):
    model = stack(outer=True)
    op = jacobian(model, points[:1], layers=[f"blocks.{i}" for i in range(3)], start=0, stop=2)
    state = model.embed(points[:1]).detach()[0]
    torch.testing.assert_close(dense(op), dense_jacobian(lambda x: model.trunk(x, 0, 2), state))


def test_a_first_state_that_comes_back_later_counts(points):
    model = stack(source=True)
    # The sum that the last block reads comes after what the block before gave.
    op = jacobian(model, points[:1], layers=[f"blocks.{i}" for i in range(3)], start=0, stop=3)
    state = model.embed(points[:1]).detach()[0]
    torch.testing.assert_close(dense(op), dense_jacobian(lambda x: model.trunk(x, 0, 2), state))


def test_a_block_called_again_and_again(points):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(5)

        def forward(self, x):
            for _ in range(3):
                x = self.block(x)
            return x

    torch.manual_seed(0)
    model = Loop().double()
    op = jacobian(model, points[:1], layers="block", start=1, stop=3)
    state = model.block(points[0]).detach()
    torch.testing.assert_close(
        dense(op), dense_jacobian(lambda x: model.block(model.block(x)), state), atol=1e-9, rtol=1e-7
    )


def test_images(points):
    class Convolve(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU())

        def forward(self, x):
            return x + self.net(x)

    torch.manual_seed(0)
    model = nn.Sequential(Convolve(), Convolve()).double().eval()
    image = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    op = jacobian(model, image, tokens="all")
    expected = dense_jacobian(model, image).reshape(3, 4, 3, 4).permute(1, 0, 3, 2).reshape(12, 12)
    torch.testing.assert_close(dense(op), expected)
    torch.testing.assert_close(dense(jacobian(model, image)), own_blocks(expected, 3))
    model.train()
    with pytest.raises(JacobianError, match=r"batch norm '0\.net\.1' is in training mode"):
        jacobian(model, image)
    before = copy.deepcopy(model.state_dict())
    trained = dense(jacobian(model, image, tokens="all"))  # the buffers of the graph are its own
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    expected = dense_jacobian(model, image).reshape(3, 4, 3, 4).permute(1, 0, 3, 2).reshape(12, 12)
    torch.testing.assert_close(trained, expected)


def llama_states(model, batch, start, stop, row):
    """The layers by hand, on one sequence, from and to their states; independent of any hook."""
    inner = model.model
    ids, mask = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
    rope = inner.rotary_emb(inner.embed_tokens(ids), torch.arange(ids.shape[1])[None])
    lower = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & mask.bool()
    lower |= torch.eye(ids.shape[1]).bool()  # a padded token may look at itself, so that no softmax is empty
    bias = torch.zeros(lower.shape).masked_fill(~lower, torch.finfo(torch.float32).min).double()[None, None]

    def through(x):
        for layer in inner.layers[start:stop]:
            x = layer(x, attention_mask=bias, position_embeddings=rope)
        return x

    def before(x):
        for layer in inner.layers[:start]:
            x = layer(x, attention_mask=bias, position_embeddings=rope)
        return x

    return through, before(inner.embed_tokens(ids)).detach(), mask[0].bool()


def test_llama_against_autograd(models, text_batch):
    model = models["llama"](attn_implementation="sdpa").double()
    batch = {name: value[:2, 3:9] for name, value in text_batch.items()}  # one padded token left, one right
    blocks = []
    for row in range(2):
        through, state, real = llama_states(model, batch, 1, 3, row)
        full = dense_jacobian(through, state)[0, real][:, :, 0][:, :, real]
        blocks.append(full.flatten(2).flatten(0, 1))
    op = jacobian(model, batch, start=1, stop=3, tokens="all")
    assert op.num_tokens == int(batch["attention_mask"].sum()) < 12
    torch.testing.assert_close(dense(op), torch.block_diag(*blocks), atol=1e-7, rtol=1e-5)
    own = torch.block_diag(*(own_blocks(block, 32) for block in blocks))
    op = jacobian(model, batch, start=1, stop=3)
    probe = torch.randn(op.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(op.matvec(probe), own @ probe, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(op.rmatvec(probe), own.mT @ probe, atol=1e-7, rtol=1e-5)


def test_positions_cut_rows_and_columns(models, ids):
    model = models["llama"]().double()
    whole = jacobian(model, {"input_ids": ids[:1, :5]}, start=2, tokens="all")
    part = jacobian(model, {"input_ids": ids[:1, :5]}, start=2, tokens="all", positions=[1, 3])
    wanted = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])
    torch.testing.assert_close(dense(part), dense(whole)[wanted][:, wanted])


def test_blocks_multiply_to_the_end_to_end_jacobian(models, ids):
    model = models["llama"]().double()
    batch = {"input_ids": ids}
    blocks = block_jacobians(model, batch, tokens="all")
    whole = jacobian(model, batch, tokens="all")
    v = torch.randn(whole.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = v
    for op in blocks:
        step = op.matvec(step)
    torch.testing.assert_close(step, whole.matvec(v))


# --- the operator ---


def test_a_plain_chain_has_nothing_to_freeze(points):
    full, frozen = (jacobian(stack(), points, routing=routing) for routing in ("full", "frozen"))
    assert torch.equal(dense(full), dense(frozen))


def test_scipy_finds_the_same_singular_values(points):
    op = jacobian(stack(), points)
    linear = op.as_linear_operator()
    found = scipy.sparse.linalg.svds(linear, k=3, return_singular_vectors=False, random_state=0)
    expected = np.linalg.svd(dense(op).numpy(), compute_uv=False)[:3]
    np.testing.assert_allclose(np.sort(found)[::-1], expected, rtol=1e-6)


def test_vectors_keep_their_precision_and_the_graph_its_use(points):
    op = jacobian(stack(), points)
    v = torch.ones(10)
    assert op.matvec(v).dtype == torch.float32
    assert op.matvec(v.double()).dtype == op.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(op.matvec(v), op.matvec(v))
    assert "0 → 3" in repr(op)


def hooks_of(model: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, name)) for module in model.modules() for name in names]


@pytest.mark.parametrize("name", ["deepseek", "hc"])
@pytest.mark.parametrize("routing", ["full", "frozen"])
def test_the_model_is_as_it_was(models, ids, name, routing):
    model = (models["deepseek"]() if name == "deepseek" else models["lucidrains"]("hc")).train()
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, buffers = copy.deepcopy(model.state_dict()), [id(b) for b in model.buffers()]
    random, hooks = torch.get_rng_state(), hooks_of(model)
    op = jacobian(model, ids, stop=2, tokens="all", routing=routing)
    op.matvec(op.rmatvec(torch.ones(op.shape[0])))
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks_of(model) == hooks
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [id(b) for b in model.buffers()] == buffers
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_dropout_draws_what_the_users_next_forward_draws(points):
    model = stack(dropout=0.5).train()
    model.embed = nn.Identity()
    torch.manual_seed(7)
    matrices = [dense(jacobian(model, points)) for _ in range(2)]
    assert torch.equal(*matrices)
    u = torch.ones(10, dtype=torch.float64)
    x = points.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.trunk(x).sum(), x)
    torch.testing.assert_close(matrices[0].mT @ u, expected.flatten())


def test_the_users_batch_stays_his(points):
    model = stack()
    model.embed = nn.Identity()
    op = jacobian(model, points)
    assert not points.requires_grad
    torch.testing.assert_close(dense(op)[:5, :5], dense_jacobian(model.trunk, points[0]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_the_user_wants_no_gradients(points, context):
    model = stack()
    with context():
        op = jacobian(model, points)
        inside = op.matvec(torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(inside, op.matvec(torch.ones(10, dtype=torch.float64)))


def test_an_error_in_the_users_forward_passes_and_everything_is_back(points):
    model = stack()
    calls = []

    class Wrong(nn.Module):
        def forward(self, x):
            calls.append(1)
            if len(calls) > 1:  # the first forward finds the chain, the second one is measured
                raise KeyboardInterrupt
            return x

    model.blocks[2].net.append(Wrong())
    hooks = hooks_of(model)
    with pytest.raises(KeyboardInterrupt):
        jacobian(model, points)
    assert hooks_of(model) == hooks
    assert all(p.requires_grad for p in model.parameters())


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 2, "stop": 2}, "expected start < stop"),
        ({"start": 3}, "start is 3 and stop is 3"),
        ({"stop": 4}, r"stop is 4; the chain has depths 0 \(embedding\) … 3"),
        ({"start": -1}, "start is -1"),
        ({"tokens": "each"}, "tokens is 'each'; expected 'own' or 'all'"),
        ({"routing": "half"}, "routing is 'half'"),
        ({"chain": "decoder"}, "no chain 'decoder'"),
        ({"positions": [1]}, "positions has 1; the states have token positions 0 … 0"),
        ({"mask": torch.zeros(2, 1, dtype=torch.bool)}, "no real token"),
    ],
)
def test_what_cannot_be_asked(points, options, message):
    with pytest.raises(JacobianError, match=message):
        jacobian(stack(), points, **options)


def test_what_cannot_be_multiplied(points):
    op = jacobian(stack(), points)
    with pytest.raises(JacobianError, match=r"shape \(3,\); expected \(10,\)"):
        op.matvec(torch.ones(3))
    with pytest.raises(JacobianError, match="one mapping, tensor or tuple"):
        jacobian(stack(), [points])


def test_a_block_without_gradients(points):
    model = stack()
    model.blocks[1].forward = torch.no_grad()(model.blocks[1].forward)
    with pytest.raises(JacobianError, match="depth 2 carries no gradient from depth 0"):
        jacobian(model, points)


def test_weights_that_moved_since(points):
    model = stack()
    op = jacobian(model, points)
    with torch.no_grad():
        model.blocks[1].net[0].weight.add_(1.0)
    with pytest.raises(JacobianError, match="take the Jacobian again"):
        op.rmatvec(torch.ones(10))


def test_a_kernel_without_second_derivative_still_pulls(points):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient

    class Twice(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    model = stack()
    model.blocks[1].net.append(Twice())
    op = jacobian(model, points)
    assert op.rmatvec(torch.ones(10)).abs().max() > 0
    with pytest.raises(JacobianError, match="backward has no derivative of its own"):
        op.matvec(torch.ones(10))


def test_a_skip_in_place_outside_the_blocks(points):
    model = stack(outer=True)

    def trunk(x):
        for block in model.blocks:
            x += block(x)
        return x

    model.trunk = trunk
    with pytest.raises(JacobianError, match="in place outside its blocks"):
        jacobian(model, points, layers=[f"blocks.{i}" for i in range(3)], stop=2)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_refused(points, reentrant):
    model = stack()
    for block in model.blocks:
        block.forward = lambda x, f=block.forward: torch.utils.checkpoint.checkpoint(
            f, x, use_reentrant=reentrant
        )
    with pytest.raises(JacobianError, match="checkpoint"):
        jacobian(model, points)


def test_a_checkpointed_transformer_is_refused_in_training_mode_only(models, ids):
    model = models["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5, but not in 4
        model.gradient_checkpointing_enable()
    batch = {"input_ids": ids, "use_cache": False}
    assert jacobian(model, batch, tokens="all").shape == (1056, 1056)
    with pytest.raises(JacobianError, match="gradient_checkpointing_disable"):
        jacobian(model.train(), batch, tokens="all")


def test_streams_without_a_known_connection_cannot_be_frozen(points):
    model = stack()
    with pytest.raises(StreamConnectionError, match="take routing='full'"):
        jacobian(
            model, points.reshape(1, 2, 5), layout="B N D", layers="blocks.{i}", streams=2, routing="frozen"
        )


@pytest.mark.parametrize("name", ["operator", "by_depth", "estimators", "lyapunov"])
def test_the_examples_in_the_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"depthscope.probes.jacobian.{name}"))
    assert results.attempted > 2
    assert results.failed == 0
