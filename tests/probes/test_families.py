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


def test_gated_streams_of_qwen4_exp_are_refused_not_taken_for_plain(long_ids):
    with pytest.raises(probes.ConnectionError, match="per-feature gates"):
        probes.capture(built(qwen4_exp), {"input_ids": long_ids})


def test_altup_of_gemma3n_is_refused_and_its_states_captured_on_request(long_ids):
    model = built(gemma3n)
    with pytest.raises(probes.LayoutError, match="layout="):
        probes.capture(model, {"input_ids": long_ids})
    run = probes.capture(model, {"input_ids": long_ids}, layout="N B T D")
    assert run.trace.sizes["stream"] == 4
    assert run.attrs["family"] == "unknown"
