"""Other stream families of transformers: read by their roles, or refused with the override to give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import probes

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip


def glm5_next() -> nn.Module:
    config = transformers.Glm5NextTextConfig(
        **SIZES, intermediate_size=128, moe_intermediate_size=64, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=32, v_head_dim=16, qk_nope_head_dim=16, qk_rope_head_dim=0,
        index_topk=8, index_head_dim=16, index_n_heads=2, index_kpool=4, linear_head_dim=16, linear_num_heads=4,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    )  # fmt: skip
    return transformers.Glm5NextTextModel(config)


def hy_v4() -> nn.Module:
    config = transformers.HYV4Config(
        **SIZES, intermediate_size=128, moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=32,
        kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, index_topk=8, index_head_dim=32,
        index_n_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.HYV4ForCausalLM(config)


def qwen4_exp() -> nn.Module:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 1.0,
    }
    config = transformers.Qwen4ExpTextConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        num_experts_per_tok=2, num_experts=4, hc_lowrank=16, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=8, indexer_compress_ratio=4, ple_layer_ids=[2], ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8, heads_per_ngram=2, split_ngram_parts=1, eos_token_id=2, rope_parameters=rope,
    )  # fmt: skip
    return transformers.Qwen4ExpTextModel(config)


def gemma3n() -> nn.Module:
    config = transformers.Gemma3nTextConfig(
        **SIZES, intermediate_size=128, num_key_value_heads=2, head_dim=16, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=16, num_kv_shared_layers=0, laurel_rank=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

    return Gemma3nTextModel(config)


def built(factory) -> nn.Module:
    torch.manual_seed(0)
    model = factory().eval()
    for name, parameter in model.named_parameters():
        if "_hc" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def long_ids() -> torch.Tensor:
    return torch.randint(3, 64, (3, 22), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("factory", "family"), [(glm5_next, "mhc"), (hy_v4, "independent_hc")])
def test_families_that_return_their_weights_are_proven(long_ids, factory, family):
    model = built(factory)
    run = probes.capture(
        model, {"input_ids": long_ids}, gradients=True, loss=lambda output, batch: output[0].square().mean()
    )
    trace = run.trace
    assert run.attrs["family"] == family
    assert run.attrs["n_streams"] == 4
    assert run.attrs["reconstruction_error"] < 1e-6
    assert float(trace.read_error.max()) < 1e-6
    assert list(trace.branch.values) == ["attn", "mlp"] * 4
    assert np.abs(trace.gradient.values).max() > 0
    if family == "mhc":
        assert run.attrs["orientation"] == "destination_source"
        np.testing.assert_allclose(trace.h_res.values.sum(-1), 1, atol=2e-2)
    else:
        assert run.attrs["orientation"] == "not_applicable"
        np.testing.assert_array_equal(trace.h_res.values, np.broadcast_to(np.eye(4), trace.h_res.shape))


def test_gated_streams_of_qwen4_exp_and_what_is_added_between_them(long_ids):
    model = built(qwen4_exp)
    given: list[torch.Tensor] = []
    model.layers[1].ple.register_forward_hook(lambda module, args, output: given.append(output))
    run = probes.capture(model, {"input_ids": long_ids})
    trace = run["trace"].to_dataset()
    assert run.attrs["family"] == "gated"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert list(trace.site.values[:5]) == ["embed", "mid", "post", "pre", "mid"]
    assert list(trace.depth_out.values[:3]) == [1, 2, 4], "no connection joins the depths 2 and 3"
    added = (trace.residual[3] - trace.residual[2]).values
    np.testing.assert_allclose(added, given[0].detach().unflatten(-1, (4, 64)).numpy(), atol=1e-6)
    (outside,) = run.attrs["changes_outside"]
    assert (outside["depth_in"], outside["depth_out"]) == (2, 3)
    assert outside["change"] == pytest.approx(
        np.linalg.norm(added) / np.linalg.norm(trace.residual[2].values), rel=1e-4
    )


def test_altup_of_gemma3n_is_read_from_its_two_methods(long_ids):
    model = built(gemma3n)
    for layer in model.layers:
        nn.init.normal_(layer.altup.correct_output_scale, std=0.5)  # zero in a fresh model
    seen: list[tuple[torch.Tensor, ...]] = []
    altup = model.layers[1].altup
    predict, correct = altup.predict, altup.correct

    def see_predict(x):
        seen.append((x.clone(), predict(x).clone()))
        return predict(x)

    def see_correct(predictions, activated):
        out = correct(predictions, activated)
        seen.append((activated.clone(), out.clone()))
        return out

    altup.predict, altup.correct = see_predict, see_correct
    run = probes.capture(model, {"input_ids": long_ids})
    trace = run["trace"].to_dataset()
    (x, predictions), (activated, corrected) = seen[:2]
    assert run.attrs["family"] == "altup"
    assert run.attrs["layout"] == "N B T D"
    assert run.attrs["orientation"] == "destination_source"
    assert run.attrs["reconstruction_error"] < 1e-6
    assert list(trace.site.values) == ["embed"] + ["mid", "post"] * 4
    assert list(trace.depth_in.values) == [0, 2, 4, 6]
    states = trace.residual.transpose("depth", "stream", "sample", "token", "feature").values
    np.testing.assert_allclose(states[2], x.detach(), atol=0)
    np.testing.assert_allclose(states[3], corrected.detach(), atol=0)
    np.testing.assert_allclose(trace.branch_in.values[1], predictions[0].detach(), atol=0)
    np.testing.assert_allclose(trace.branch_out.values[1], activated.detach(), atol=0)
    h_res, h_post, h_pre = trace.h_res.values[1], trace.h_post.values[1], trace.h_pre.values[1]
    again = np.einsum("stoi,istd->ostd", h_res, states[2]) + np.einsum("sto,std->ostd", h_post, activated.detach())
    np.testing.assert_allclose(again, states[3], atol=1e-5)
    np.testing.assert_allclose(np.einsum("sti,istd->std", h_pre, states[2]), predictions[0].detach(), atol=1e-5)
    assert len(run.attrs["changes_outside"]) == 4, "the per-layer embedding is added outside of AltUp"


def test_states_alone_on_request(long_ids):
    run = probes.capture(built(gemma3n), {"input_ids": long_ids}, layers="layers.{i}", layout="N B T D")
    assert run.trace.sizes["stream"] == 4
    assert run.attrs["family"] == "unknown"
