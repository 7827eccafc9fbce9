"""How is a configuration of transformers made tiny? By what its fields are called; its parts are shrunk the same way."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

VOCABULARY = 128
WIDTH, HEADS, HEAD_WIDTH, LAYERS, SIDE, PATCH = 32, 4, 8, 4, 32, 8
LARGEST_ORDINARY_TOKEN = 63
"""Batches draw their tokens up to here; special tokens get numbers above."""


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# In this order: the first that fits decides. A field that none fits keeps its value.
RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"num_feat_extract_layers|num_conv_pos.*", lambda v: v),
    (
        r"num_labels|num_classes|num_channels|in_channels|in_chans|type_vocab_size|.*_per_second|.*stride.*",
        lambda v: v,
    ),
    (r".*token_type.*|.*pad_to.*|.*_idx|.*_index_.*|hash.*", lambda v: v),
    (r".*vocab_size.*|vocab", at_most(VOCABULARY)),
    (r".*codebook_size|.*num_embeddings|.*codebook_dim", at_most(VOCABULARY)),
    # Rows of positions; sequences of tests are short.
    (
        r"max_position.*|n_positions|.*max_.*positions|n_ctx|context_length|max_seq.*|.*max_.*length.*|block_size",
        at_most(256),
    ),
    (
        r"(.*_)?(num_)?(key_value|kv)_heads|num_key_value_heads|n_head_kv|multi_query_group_num|num_kv_heads",
        at_most(2),
    ),
    (r".*(num_|n_)?(attention_)?heads|n_head|.*_heads|.*num_heads.*", at_most(HEADS)),
    (r"n_group|topk_group|.*n_groups", at_most(1)),
    (r"index_topk.*|index_k.*", lambda v: v),
    (
        r"(.*_)?(experts_per_tok|topk|top_k|experts_top_k|num_experts_per_token)|moe_topk|moe_k|topk_.*|num_selected.*",
        at_most(2),
    ),
    (r".*(num|n)_.*experts|num_experts|.*expert_num|experts", at_most(4)),
    (r".*(layers|depth|num_blocks|n_layer|n_layers|_blocks|num_stages_.*)", at_most(LAYERS)),
    (r".*image_size.*|img_size|.*input_size|input_resolution|.*crop_size", at_most(SIDE)),
    (r".*patch_size.*", at_most(PATCH)),
    (r".*window_size.*", at_most(4)),
    (r".*.*window|.*sliding.*|.*chunk_size.*|chunk_.*", at_most(8)),
    (
        r".*(head_dim|kv_channels|d_kv|head_size|qk_.*dim|v_head_dim|dim_head|_head_dim).*|d_head",
        at_most(HEAD_WIDTH),
    ),
    (r".*(rank|bottleneck).*", at_most(8)),
    (
        r".*(intermediate|ffn|feed_forward|ffn_dim|inner|mlp_dim|fc_dim|d_ff|n_inner|mlp_hidden).*",
        at_most(2 * WIDTH),
    ),
    (r".*num_mel.*|.*mel_bins|.*n_mels", at_most(16)),
    (r".*state_size|.*d_state|.*ssm_state.*", at_most(8)),
    (r".*num_queries|.*query_length|.*num_latents|.*_tokens|.*num_query.*|num_image_.*", at_most(16)),
    (
        r".*(hidden_size|d_model|n_embd|dim|width|embed.*size|channels|features|units|hidden|size|embd|planes|filters)s?",
        at_most(WIDTH),
    ),
)


# For models whose widths hang together in ways of their own: only what costs most.
FEW_RULES = tuple(
    (pattern, rule)
    for pattern, rule in RULES
    if any(word in pattern for word in ("vocab_size", "layers|depth", "num_labels"))
)


def shrunk(key: str, value: int, light: bool = False) -> int:
    """The tiny value of one field."""
    for pattern, rule in FEW_RULES if light else RULES:
        if re.fullmatch(pattern, key):
            return rule(value)
    return value


def tiny(config_class: type, fixes: Mapping[str, Any] | None = None, *, light: bool = False) -> Any:
    """A tiny configuration of a class.

    Parameters
    ----------
    config_class : type
        Of transformers.
    fixes : mapping, optional
        Values that replace those that the rules give; a mapping for a part.
    light : bool
        Whether widths are left as they are.

    Returns
    -------
    PretrainedConfig
    """
    fixes = dict(fixes or {})
    default = config_class()
    changed = _tiny_fields(default, fixes, light)
    # A whole part, which names its type, replaces what the default has; another mapping was used in shrinking it.
    whole = {
        n: v for n, v in fixes.items() if not isinstance(v, Mapping) or "model_type" in v or n not in changed
    }
    changed |= whole
    config = config_class(**changed)
    again = {
        name: _length_fitted(default, config, value)
        for name, value in vars(config).items()
        if isinstance(value, list)
    }
    lists = {
        name: value
        for name, value in again.items()
        if value is not None and name not in fixes and not name.startswith("_")
    }
    return config_class(**{**changed, **lists}) if lists else config


def _tiny_fields(default: Any, fixes: Mapping[str, Any], light: bool) -> dict[str, Any]:
    """The fields that change, with their new values."""
    changed: dict[str, Any] = {}
    special = count(LARGEST_ORDINARY_TOKEN + 1)
    for name, value in vars(default).items():
        if name.startswith("_") or name in ("transformers_version", "model_type", "id2label", "label2id"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            changed[name] = tiny(type(value), fixes.get(name), light=light).to_dict()
        elif re.fullmatch(r".*token_(id|index)|.*_id|.*_index|.*token_ids", name):
            if _beyond(value):
                changed[name] = next(special)
        else:
            small = _tiny_value(default, name, value, light)
            if small != value:
                changed[name] = small
    return changed


def _beyond(value: Any) -> bool:
    """Whether a token's number, or one of a list, is not one of the tiny vocabulary's ordinary ones."""
    numbers = value if isinstance(value, list) else [value]
    return any(type(number) is int and number >= LARGEST_ORDINARY_TOKEN for number in numbers)


def _tiny_value(default: Any, name: str, value: Any, light: bool) -> Any:
    if type(value) is int:
        # As many keys and values as heads: each head has its own.
        own = value == getattr(default, "num_attention_heads", None) and re.fullmatch(
            r".*(key_value|kv)_heads", name
        )
        return min(value, HEADS) if own and not light else shrunk(name, value, light)
    if light:
        return value
    if isinstance(value, Mapping) and name.startswith("rope"):
        sections = _tiny_sections(value, default)
        if (
            "rope_type" in sections
            and _reads_sections(type(default))
            and not any("section" in key for key in sections)
        ):
            sections["mrope_section"] = [2, 1, 1]
        return sections
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return type(value)(_tiny_list(name, list(value)))
    return value


def _reads_sections(config_class: type) -> bool:
    """Whether the model's code has sections of its own that it takes where the configuration has none."""
    place = Path(inspect.getfile(config_class))
    code = place.with_name(place.name.replace("configuration_", "modeling_"))
    return code.exists() and '"mrope_section", [' in code.read_text(encoding="utf-8")


def _tiny_sections(rope: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The sections of a rotary embedding over several axes, as wide together as a tiny head's half that is rotated."""
    changed = dict(rope)
    for name, value in rope.items():
        if isinstance(value, Mapping):
            changed[name] = _tiny_sections(value, default)
        elif "section" in name and isinstance(value, (list, tuple)) and len(value) == 3:
            factor = (
                rope.get("partial_rotary_factor") or getattr(default, "partial_rotary_factor", None) or 1.0
            )
            half = max(int(HEAD_WIDTH * factor) // 2, 1)
            changed[name] = [half - 2 * (half // 3), half // 3, half // 3]
    return changed


def _tiny_list(name: str, value: list[int]) -> list[int]:
    if (
        re.fullmatch(r".*(hidden_sizes|dims?|channels|embed_dim.*|neck_hidden.*|widths?)", name)
        and len(set(value)) > 1
    ):
        order = sorted(set(value))
        return [min(v, 16 * 2 ** order.index(v)) for v in value]
    if re.fullmatch(r"depths|.*layers.*|.*num_blocks.*|layers", name):
        return [min(v, 2) for v in value]
    if re.fullmatch(r".*heads.*", name):
        order = sorted(set(value))
        return [min(v, 2 ** order.index(v)) if len(order) > 1 else min(v, HEADS) for v in value]
    if "section" in name and len(value) == 3:
        return [2, 1, 1]
    if (
        "kernel" in name
        or "stride" in name
        or "dilation" in name
        or "padding" in name
        or "indices" in name
        or "indexes" in name
    ):
        return value
    return [shrunk(name, v) for v in value]


def _length_fitted(default: Any, config: Any, value: list[Any]) -> list[Any] | None:
    """A list with an entry a layer, as long as there are layers; first, middle and last keep their kinds."""
    for field in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        before, now = getattr(default, field, None), getattr(config, field, None)
        if isinstance(before, int) and isinstance(now, int) and before != now and len(value) == before:
            return [value[round(i * (before - 1) / (now - 1))] for i in range(now)] if now > 1 else value[-1:]
    return None
