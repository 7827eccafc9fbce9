"""What do the rules not know? Fields to set, and classes that no table names, per type of transformers."""

from __future__ import annotations

from typing import Any

WAV = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3,
}
BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 2],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip

SWIN = {"image_size": 64, "patch_size": 4, "window_size": 2}

FIXES: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "donut-swin": SWIN,
    "vision-encoder-decoder": {},
    "clvp_encoder": {"projection_dim": 8},
    "moonshine_streaming": {},
    "nemo_speechlm": {},
    "zoedepth": {},
    "moshi_depth": {"num_codebooks": 4},
    "pp_formulanet": {"max_length": 5},
    "slanext": {"max_text_length": 5},
    "slanet": {"max_text_length": 5},
    "lilt": {},
    "bros": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "gemma3n_text": {
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
    },
    "gemma3n": {
        "text_config": {
            "intermediate_size": 64,
            "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "laurel_rank": 8,
            "num_kv_shared_layers": 0,
        }
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "ministral": {"head_dim": 8},
    "esm": {"vocab_size": 64, "mask_token_id": 40, "pad_token_id": 1},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "glm5_next_text": {"index_topk": 16},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "ernie4_5_vl_moe_text": {},
    "qwen4_exp_text": {
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "qwen4_exp": {
        "text_config": {
            "make_ngram_vocab_size_divisible_by": 8,
            "heads_per_ngram": 2,
            "split_ngram_parts": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
    },
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2, 3]}},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "detr": {"backbone_config": BACKBONE},
    "conditional_detr": {"backbone_config": BACKBONE},
    "dab-detr": {"backbone_config": BACKBONE},
    "deformable_detr": {"backbone_config": BACKBONE},
    "table-transformer": {"backbone_config": BACKBONE},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 3]},
    "reformer": {"is_decoder": True},
    "blenderbot": {"encoder_layers": 3, "decoder_layers": 2},
}

CLASSES: dict[str, str] = {}
