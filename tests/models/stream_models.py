"""Tiny random models of transformers' stream families."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _config_of(name: str) -> Any:
    """A class of transformers; older versions than its family skip the test."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def deepseek_v4(layers: int = 4, **more: Any) -> nn.Module:
    # One block routes by hash and the others by scores, so that blocks of one class have different parts.
    config = _config_of("DeepseekV4Config")(
        **SIZES, num_hidden_layers=layers, moe_intermediate_size=64, head_dim=32, q_lora_rank=32, partial_rotary_factor=0.5,
        num_experts_per_tok=2, n_routed_experts=4, o_groups=2, o_lora_rank=16, index_n_heads=2, index_head_dim=32,
        index_topk=4, sliding_window=8, num_nextn_predict_layers=0, max_position_embeddings=512,
        mlp_layer_types=["hash_moe"] + ["moe"] * (layers - 1),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, **more,
    )  # fmt: skip
    return transformers.DeepseekV4ForCausalLM(config)


def glm5_next(layers: int = 4, **more: Any) -> nn.Module:
    config = _config_of("Glm5NextTextConfig")(
        **SIZES, num_hidden_layers=layers, intermediate_size=128, moe_intermediate_size=64, num_key_value_heads=4,
        n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=32, v_head_dim=16, qk_nope_head_dim=16,
        qk_rope_head_dim=0, index_topk=8, index_head_dim=16, index_n_heads=2, index_kpool=4, linear_head_dim=16,
        linear_num_heads=4, mlp_layer_types=["dense"] + ["sparse"] * (layers - 1), **more,
    )  # fmt: skip
    return transformers.Glm5NextTextModel(config)


def hy_v4(layers: int = 4, **more: Any) -> nn.Module:
    config = _config_of("HYV4Config")(
        **SIZES, num_hidden_layers=layers, intermediate_size=128, moe_intermediate_size=64, n_routed_experts=4,
        num_experts_per_tok=2, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        index_topk=8, index_head_dim=32, index_n_heads=2, **more,
    )  # fmt: skip
    return transformers.HYV4ForCausalLM(config)


def qwen4_exp(layers: int = 4, **more: Any) -> nn.Module:
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 1.0,
    }
    # One per-layer embedding, which is added to the streams outside of the connections.
    config = _config_of("Qwen4ExpTextConfig")(
        **SIZES, num_hidden_layers=layers, num_key_value_heads=2, head_dim=16, linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, num_experts_per_tok=2, num_experts=4, hc_lowrank=16, indexer_n_heads=2,
        indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4, ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8, heads_per_ngram=2, split_ngram_parts=1, rope_parameters=rope,
        **{"ple_layer_ids": [2]} | more,
    )  # fmt: skip
    return transformers.Qwen4ExpTextModel(config)


def gemma3n(layers: int = 4, **more: Any) -> nn.Module:
    config = transformers.Gemma3nTextConfig(
        **SIZES, num_hidden_layers=layers, intermediate_size=128, num_key_value_heads=2, head_dim=16,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=16, num_kv_shared_layers=0, laurel_rank=8,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        activation_sparsity_pattern=[0.0] * layers, **more,
    )  # fmt: skip
    # Imported where it is used: it brings timm and torchvision with it.
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

    return Gemma3nTextModel(config)


def perturbed(model: nn.Module, *words: str) -> nn.Module:
    """A model with random values in its connections' parameters, at which their maps are not trivial."""
    for name, parameter in model.named_parameters():
        if any(word in name for word in words or ("_hc.",)):
            nn.init.normal_(parameter, std=0.5)
    return model
