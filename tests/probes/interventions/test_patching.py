"""Every patched place is compared with hooks that are written by hand; effects and intervals with their formulas."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from torch import nn

from depthscope.probes.interventions import InterventionError, patch
from tests.models.families import STREAMS, built
from tests.models.small_models import llama
from tests.probes.interventions.local_streams import LocalStreams, ids

ANSWER, AGAINST = 3, 7


def gpt2():
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def pair(sequences=2, length=6, at=2, below=41):
    """Two batches that differ at one token."""
    clean = torch.randint(0, below, (sequences, length), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, at] = (corrupted[:, at] + torch.arange(1, sequences + 1)) % below
    return clean, corrupted


def logit_difference(output):
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return (logits[:, -1, ANSWER] - logits[:, -1, AGAINST]).double().numpy()


@contextlib.contextmanager
def hooked(hooks):
    """Hooks, as (module, whether before it, function)."""
    handles = [
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        for module, before, hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_states_of_gpt2_are_those_of_hooks_bit_for_bit():
    model = gpt2()
    clean, corrupted = pair()
    places = [model.transformer.drop, *model.transformer.h]
    states = []
    with torch.no_grad(), hooked([(m, False, lambda m, a, out: states.append(first(out))) for m in places]):
        model(clean)
    found = patch(model, {"input_ids": clean}, {"input_ids": corrupted}, answer=ANSWER, against=AGAINST)
    assert found.sizes == {"depth": 4, "token": 6, "stream": 1, "sample": 2}
    for depth, place in enumerate(places):
        for token in range(6):

            def put_in(module, args, output, depth=depth, token=token):
                state = first(output).clone()
                state[:, token] = states[depth][:, token]
                return (state, *output[1:]) if isinstance(output, tuple) else state

            with torch.no_grad(), hooked([(place, False, put_in)]):
                expected = logit_difference(model(corrupted))
            np.testing.assert_array_equal(found.patched.values[depth, token, 0], expected)
    with torch.no_grad():
        np.testing.assert_array_equal(found.clean, logit_difference(model(clean)))
        np.testing.assert_array_equal(found.corrupted, logit_difference(model(corrupted)))


def first(output):
    return output[0] if isinstance(output, tuple) else output


# --- streams


def constrained():
    return built(next(family for family in STREAMS if family.name == "mHCv2"))


def test_streams_of_mhc_are_those_of_hooks_bit_for_bit():
    model = constrained()
    clean, corrupted = pair(length=5, at=4)
    states: list[torch.Tensor] = []
    connections = [module for module in model.modules() if hasattr(module, "width_connection")]
    watched = [(module, True, lambda module, args: states.append(args[0])) for module in connections]
    with torch.no_grad(), hooked(watched):
        model(clean)
    found = patch(model, clean, corrupted, depths=2, tokens=4, answer=ANSWER, against=AGAINST)
    module = connections[2]
    for at, stream in enumerate(found.stream.values.tolist()):
        of = slice(None) if stream < 0 else stream

        def put_in(module, args, of=of):
            state = args[0].clone()
            state[:, 4, of] = states[2][:, 4, of]
            return (state, *args[1:])

        with torch.no_grad(), hooked([(module, True, put_in)]):
            expected = logit_difference(model(corrupted))
        np.testing.assert_array_equal(found.patched.values[0, 0, at], expected)


def test_all_tokens_and_streams_at_once():
    model, (clean, corrupted) = LocalStreams().eval(), pair(length=5)
    found = patch(model, clean, corrupted, tokens="all", stream="all", answer=3, against=7)
    np.testing.assert_array_equal(found.patched.values[:, 0, 0], [found.clean.values] * 4)


# --- what is measured


def test_effect_and_interval_are_those_of_a_ratio_of_means():
    model = LocalStreams(layers=2).eval()
    # The first direction of the answer's logit differs by the token that is exchanged.
    clean, corrupted = ids(6), ids(6)
    corrupted[:, 3] = 5
    clean[:, 3] = 11
    found = patch(model, clean, corrupted, tokens=3, stream="all", answer=np.full(6, ANSWER), against=AGAINST)
    whole = found.clean.values - found.corrupted.values
    reach = scipy.stats.t.ppf(0.975, 5)
    spread = whole.std(ddof=1) / np.sqrt(6)
    assert (abs(whole.mean()) > reach * spread) == (found.attrs["no_effect"] == "")
    part = found.patched.values[1, 0, 0] - found.corrupted.values
    share = part.mean() / whole.mean()
    error = (part - share * whole).std(ddof=1) / np.sqrt(6) / abs(whole.mean())
    cell = found.isel(depth=1, token=0, stream=0)
    assert float(cell.effect) == pytest.approx(share)
    assert float(cell.effect_error) == pytest.approx(error)
    assert float(cell.effect_high) == pytest.approx(share + reach * error)
    assert float(cell.change_low) == pytest.approx(part.mean() - reach * part.std(ddof=1) / np.sqrt(6))
    # What a causal model reads before the token is the same.
    early = patch(model, clean, corrupted, tokens=[0, 2], stream="all", answer=ANSWER, against=AGAINST)
    assert float(abs(early.change).max()) == 0


def test_an_effect_without_a_clear_denominator_is_nan_with_a_reason():
    model, (clean, corrupted) = LocalStreams(layers=2).eval(), pair()
    same = patch(model, clean, clean, depths=1, tokens="all", stream="all")
    assert bool(same.effect.isnull().all())
    assert "the two inputs differ by 0" in same.attrs["no_effect"]
    assert float(abs(same.change).max()) == 0
    unsure = patch(
        model, clean, corrupted, depths=1, tokens="all", stream="all", answer=ANSWER, against=AGAINST
    )
    low, high = unsure.attrs["difference"]["low"], unsure.attrs["difference"]["high"]
    assert (
        (low <= 0 <= high)
        == bool(unsure.effect.isnull().all())
        == ("no difference is possible" in unsure.attrs["no_effect"])
    )
    one = patch(
        model, clean[:1], corrupted[:1], depths=0, tokens="all", stream="all", answer=ANSWER, against=AGAINST
    )
    assert float(one.effect.squeeze()) == pytest.approx(1)  # of one sequence, without an interval
    assert bool(one.effect_error.isnull().all())


def test_measures_without_and_with_labels():
    model, (clean, corrupted) = LocalStreams(layers=2).eval(), pair(4)

    def next_token(output, batch):
        return nn.functional.cross_entropy(output[:, :-1].mT, batch[:, 1:], reduction="none").mean(1)

    places = {"depths": 1, "tokens": [2, 4], "stream": "all"}
    own = patch(model, clean, corrupted, **places)
    assert own.attrs["measure"] == "next_token_loss"
    # Of the clean tokens, which the corrupted forward predicts worse or better.
    with torch.no_grad():
        np.testing.assert_allclose(own.corrupted, next_token(model(corrupted), clean), rtol=1e-5)
        expected = -torch.log_softmax(model(corrupted)[:, -1], -1)[:, ANSWER]
    named = patch(model, clean, corrupted, answer=ANSWER, **places)
    assert named.attrs["measure"] == "answer_loss"
    assert named.change.attrs["units"] == "nats"
    np.testing.assert_allclose(named.corrupted, expected, rtol=1e-5)
    model.head = nn.Identity()
    hidden = patch(model, clean, corrupted, **places)
    assert hidden.attrs["measure"] == "output_change"
    assert hidden.attrs["no_loss"]
    with torch.no_grad():
        apart = (model(corrupted) - model(clean)).norm(dim=-1) / model(clean).norm(dim=-1)
    np.testing.assert_allclose(hidden.corrupted, apart.mean(1), rtol=1e-5)
    assert float(abs(hidden.clean).max()) == 0


def test_padding_is_not_patched_and_the_answer_is_at_the_last_real_token():
    model = llama()
    clean, corrupted = pair(3, 7, below=60)
    mask = torch.ones_like(clean)
    mask[1, 5:] = 0
    found = patch(
        model,
        {"input_ids": clean, "attention_mask": mask},
        {"input_ids": corrupted, "attention_mask": mask},
        depths=1, tokens=[2, 6], answer=ANSWER,
    )  # fmt: skip
    assert np.isnan(found.patched.values[0, 1, 0]).tolist() == [False, True, False]
    with torch.no_grad():
        expected = -torch.log_softmax(model(clean[1:2, :5]).logits[0, -1], -1)[ANSWER]
    assert float(found.clean[1]) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(InterventionError, match="the same tokens to be real in both"):
        patch(
            model,
            {"input_ids": clean, "attention_mask": mask},
            {"input_ids": corrupted, "attention_mask": mask.roll(1, 0)},
        )


# --- what is refused


def test_inputs_that_do_not_fit_are_refused():
    model, (clean, corrupted) = LocalStreams(layers=2).eval(), pair()
    with pytest.raises(
        InterventionError, match=r"shapes \[\(2, 6\)\] and corrupted \[\(2, 5\)\]; expected the same"
    ):
        patch(model, clean, corrupted[:, :5])
    with pytest.raises(ValueError, match="got against= without answer="):
        patch(model, clean, corrupted, against=3)
    with pytest.raises(ValueError, match="the output has entries 0 … 40"):
        patch(model, clean, corrupted, answer=41)
    with pytest.raises(ValueError, match="answer= has 3 token ids for 2 sequences"):
        patch(model, clean, corrupted, answer=[1, 2, 3], depths=0, tokens=0)
    with pytest.raises(ValueError, match="no stream 3; the input has streams 0 … 2"):
        patch(model, clean, corrupted, stream=3)
    with pytest.raises(ValueError, match="no token 6; the input has tokens 0 … 5"):
        patch(model, clean, corrupted, tokens=6)
    with pytest.raises(
        InterventionError, match=r"depth 9 is none of the model's; it has depths 0 \(embedding\) … 2"
    ):
        patch(model, clean, corrupted, depths=9)


def test_an_unproven_reading_is_refused():
    class Deep(nn.Module):
        """Layers without a residual, which are read where they are named."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(41, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 41)

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head(x)

    clean, corrupted = pair()
    with pytest.raises(
        InterventionError, match=r"are unproven: .* Patch with hooks of your own, or use ablate"
    ):
        patch(Deep().eval(), clean, corrupted, layers="layers.{i}")
