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

QWEN4 = {
    "make_ngram_vocab_size_divisible_by": 8, "heads_per_ngram": 2, "split_ngram_parts": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "hc_lowrank": 16,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 50, "ple_layer_ids": [2],
}  # fmt: skip
HALF_ROTARY = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]
    },
}  # fmt: skip
# Its widths follow one another by a factor of two; by the general rules they do not, and images of 1024 × 1024 remain.
HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 32, "embed_dim_per_stage": [32, 64, 128, 256],
    "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [4, 2, 4, 2], "blocks_per_stage": [1, 2, 3, 2],
    "global_attention_blocks": [4], "image_size": [64, 64],
}  # fmt: skip
SWIN = {"image_size": 64, "patch_size": 4, "window_size": 2}

FIXES: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "donut-swin": SWIN,
    "clvp_encoder": {"projection_dim": 8},
    "moshi_depth": {"num_codebooks": 4},
    "pp_formulanet": {"max_length": 5},
    "slanext": {"max_text_length": 5},
    "slanet": {"max_text_length": 5},
    "lilt": {"hidden_size": 48},
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
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {"text_config": QWEN4},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 16, "mamba_n_heads": 4},
    "glm4v_moe_text": HALF_ROTARY,
    "glm4v_moe": {"text_config": HALF_ROTARY},
    "qwen2_5_vl_vision": {"window_size": 32},
    "exaone4_5_vision": {"window_size": 32},
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "mimi": {"upsample_groups": 32},
    "mimi_decoder": {"upsample_groups": 32},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 32},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 32},
    "csm": {"codec_config": {"upsample_groups": 32}},
    "owlvit_text_model": {"max_position_embeddings": 32},
    "owlv2_text_model": {"max_position_embeddings": 32},
    "owlvit": {"text_config": {"max_position_embeddings": 32}},
    "owlv2": {"text_config": {"max_position_embeddings": 32}},
    "chameleon": {"vocabulary_map": {"<image>": 64}},
    "nemotron": {"head_dim": 8},
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
    "sam2_hiera_det_model": {name: value for name, value in HIERA.items() if name != "model_type"},
    "sam2_vision_model": {
        "backbone_config": HIERA,
        "backbone_channel_list": [256, 128, 64, 32],
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "blenderbot": {"encoder_layers": 3, "decoder_layers": 2},
}

CLASSES: dict[str, str] = {}
