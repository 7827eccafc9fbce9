"""Every change is compared with a model that is written the other way by hand; a change of nothing is nothing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from depthscope.probes.interventions import InterventionError, ModelUnderTest, ablate, plan
from depthscope.probes.interventions.changes import changes
from depthscope.probes.interventions.state_operations import same_values
from tests.models import families
from tests.models.designs.catalogue import DESIGNS
from tests.models.families import built
from tests.models.small_models import deepseek, llama, lucidrains
from tests.probes.interventions.local_streams import STREAMS, LocalStreams, ids

NAMES = (
    "t5", "nn.TransformerEncoder, pre-norm, token first", "mHC", "undeclared streams in the batch axis",
)  # fmt: skip
FAMILIES = [family for family in families.FAMILIES if family.name in NAMES]


def only(model: ModelUnderTest, kind: str, **places):
    """The output with one change."""
    (change,) = changes(plan(kind, **places), model)
    return model.forward(change.edits).output


def test_a_step_of_a_network_that_reads_sums_over_depth_cannot_be_left_out():
    design = next(design for design in DESIGNS if design.name == "DenseFormer")
    with pytest.raises(
        InterventionError, match="bypass: blocks of this model read sums over all earlier depths"
    ):
        ablate(design.build(3), design.batch(1), "bypass")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_state_set_to_itself_changes_no_bit_and_leaves_the_model_as_it_was(family):
    model = built(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    under_test = ModelUnderTest(model, family.batch())
    same = {depth: lambda state, seen: state.clone() for depth in range(len(under_test.chain.points))}
    passed = under_test.forward(same)
    assert same_values(passed.output, under_test.base.output)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    now = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    # transformers puts hooks of its own on at the first call, for good.
    assert family.package == "transformers" or now == hooks


def test_a_state_decides_everything_after_it():
    """With the states of other sequences at one depth, all later ones are those of the other sequences."""
    family = next(family for family in FAMILIES if family.name == "mHC")
    model = ModelUnderTest(built(family), family.batch())
    last = len(model.chain.points) - 1
    passed = model.forward({1: lambda state, seen: state.roll(1, 0)})
    expected = model.base.states[last].roll(1, 0)
    error = torch.linalg.vector_norm(passed.states[last] - expected) / torch.linalg.vector_norm(expected)
    assert error < 1e-5


# --- blocks


def test_a_skipped_block_is_a_model_without_it():
    model, batch = llama(), {"input_ids": torch.arange(30).reshape(2, 15)}
    without = copy.deepcopy(model)
    del without.model.layers[1]
    found = only(ModelUnderTest(model, batch), "skip", blocks=1)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, without(**batch, use_cache=False).logits, rtol=0, atol=1e-6)


def image_model(name):
    return next(f for f in families.IMAGES if (f.name, f.package) == (name, "torchvision"))


def test_what_joins_two_stages_belongs_to_no_block():
    family = image_model("convnext")
    found = ablate(built(family), family.batch(), "skip")
    assert found.sizes["experiment"] == 6
    assert not found.attrs["left_out"]


def test_a_block_that_changes_the_width_is_left_out_with_a_sentence():
    family = image_model("resnet18")
    found = ablate(built(family), family.batch(), "skip")
    assert found.sizes["experiment"] == 5
    assert len(found.attrs["left_out"]) == 3
    assert all("a block that changes the shape cannot be skipped" in line for line in found.attrs["left_out"])
    # It predicts no next token, so that only the change of its output is known.
    assert bool(found.loss_change.isnull().all())
    assert float(found.output_change.min()) > 0


# --- mixing


@pytest.mark.parametrize(
    ("rule", "matrix"),
    [("identity", torch.eye(STREAMS)), ("uniform", torch.full((STREAMS, STREAMS), 1 / STREAMS))],
)
def test_another_mixing_in_a_connection_is_a_model_with_that_mixing(rule, matrix):
    under_test = ModelUnderTest(LocalStreams().eval(), ids())
    moved = []
    for at in range(len(under_test.chain.connections)):
        found = only(under_test, rule, connections=at)
        with torch.no_grad():
            expected = LocalStreams(replace=lambda n, h, at=at: matrix.expand_as(h) if n == at else h).eval()(
                ids()
            )
        moved.append(float((expected - under_test.base.output).abs().max()))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert (
        max(moved) > 1e-1
    )  # some do nothing: copies before the first one, and a head that takes the mean after the last


@pytest.mark.parametrize(
    "build", [lambda: lucidrains("mhc", closure=True, layers=1), lambda: deepseek(layers=1)]
)
def test_mixing_replaced_by_itself_is_nothing_and_by_the_identity_is_the_equation(build):
    """X' = X + (X_next − H_res X) at the place where the next state is made, in packages' own modules."""
    model = build()
    batch = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": batch} if hasattr(model, "config") else batch
    under_test = ModelUnderTest(model, batch)
    link = under_test.chain.connections[0]
    (change,) = changes(plan("identity", connections=0), under_test)
    passed = under_test.forward(change.edits)
    x, after = (under_test.base.states[d].double() for d in (link.depth_in, link.depth_out))
    expected = x + after - under_test.base.mixing[0] @ x
    torch.testing.assert_close(passed.states[link.depth_out].double(), expected, rtol=0, atol=1e-5)
    assert not same_values(passed.output, under_test.base.output)


def test_plain_models_have_no_mixing():
    with pytest.raises(InterventionError, match="needs several residual streams"):
        ablate(llama(), {"input_ids": torch.arange(30).reshape(2, 15)}, "identity")


# --- states


def test_a_dropped_stream_is_zero_from_its_operation_on():
    under_test = ModelUnderTest(LocalStreams().eval(), ids())
    (change,) = changes(plan("drop_stream", depths=1, streams=2), under_test)
    passed = under_test.forward(change.edits)
    assert float(passed.states[1][:, :, 2].abs().max()) == 0
    assert torch.equal(passed.states[1][:, :, :2], under_test.base.states[1][:, :, :2])


# --- what must not be left behind


def test_nothing_is_left_behind_when_a_change_raises():
    model = nn.Sequential(nn.BatchNorm1d(6), *(families.Feedforward(6) for _ in range(3)))

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layers, self.drop = model[0], nn.ModuleList(model[1:]), nn.Dropout(0.5)

        def forward(self, x):
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
            for layer in self.layers:
                x = x + self.drop(layer(x))
            return x

    residual = Residual().train()
    residual(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradients = [parameter.grad.clone() for parameter in residual.parameters()]
    before = {name: value.clone() for name, value in residual.state_dict().items()}
    batch = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    kept, random = batch.clone(), torch.get_rng_state()
    under_test = ModelUnderTest(residual, batch)

    def fail(state, seen):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        under_test.forward({2: fail})
    assert all(torch.equal(value, before[name]) for name, value in residual.state_dict().items())
    assert all(map(torch.equal, (parameter.grad for parameter in residual.parameters()), gradients))
    assert torch.equal(batch, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert residual.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in residual.modules())
    assert not any("forward" in vars(m) for m in residual.modules())
    # And it works as before.
    assert same_values(under_test.forward({}).output, under_test.base.output)


def test_a_model_that_does_not_repeat_itself_is_refused():
    calls = itertools.count(1)  # no attribute, which would be put back before each forward

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(families.Feedforward(6) for _ in range(2))

        def forward(self, x):
            factor = next(calls)
            for layer in self.layers:
                x = x + factor * layer(x)
            return x

    with pytest.raises(InterventionError, match="two forwards of the same batch gave different outputs"):
        ModelUnderTest(Counting(), torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)))


def test_a_state_that_no_operation_makes_is_refused():
    class Learned(nn.Module):
        """Slots that are a parameter, as it is."""

        def __init__(self):
            super().__init__()
            self.start = nn.Parameter(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)))
            self.layers = nn.ModuleList(nn.Sequential(families.Feedforward(6)) for _ in range(3))

        def forward(self, x):
            state = self.start
            for layer in self.layers:
                state = state + layer(state)
            return state + x

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Learned()
    under_test = ModelUnderTest(model, torch.zeros(3, 5, 6))
    with pytest.raises(
        InterventionError, match=r"made by no operation of the forward .*is a parameter as it is"
    ):
        under_test.forward({0: lambda state, seen: state + 1})


def test_a_compiled_model_is_changed_as_it_is_written():
    model = LocalStreams(layers=2).eval()
    expected = only(ModelUnderTest(model, ids()), "skip", blocks=0)
    compiled = torch.compile(model, backend="eager")
    assert same_values(only(ModelUnderTest(compiled, ids()), "skip", blocks=0), expected)
