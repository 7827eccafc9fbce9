"""Checkpoints of dialects with random values, and what their public code computes of them, written anew in torch.

Each `Case` has the tensors of a model of a few layers, its configuration, and the weights that the model applies where the
input adds nothing. Nothing here uses depthscope: the formulas are those of the modules that each `Case` names.
Dialects of models and packages that are installed are compared with their own modules in `test_describe`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.models.stream_bugs import sinkhorn

N, D, LAYERS = 4, 8, 3
M = N * (N + 2)
SUBLAYERS = [(layer, branch) for layer in range(LAYERS) for branch in (0, 1)]
Tensors = dict[str, torch.Tensor]


@dataclass
class Weights:
    """What one sub-block applies: X' = res X + post ⊗ F(pre · X)."""

    res: torch.Tensor
    pre: torch.Tensor
    post: torch.Tensor


@dataclass
class Case:
    """A checkpoint, and what is to be read of it."""

    tensors: Tensors
    config: dict[str, Any]
    family: str
    dialect: str
    expected: list[Weights] = field(default_factory=list)
    head: torch.Tensor | None = None
    settings: dict[str, float] = field(default_factory=dict)  # of a GGUF file, without the architecture


class Random:
    """Random tensors of one seed; strong biases, so that Sinkhorn has not converged and the order of its rounds shows."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=self.generator)


# --- operators


def sinkhorn_v4(logits: torch.Tensor, rounds: int, eps: float) -> torch.Tensor:
    """DeepSeek-V4's: a softmax, then columns, then rows and columns in turn."""
    matrix = torch.softmax(logits.double(), dim=-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def of_v4_bias(bias: torch.Tensor, rounds: int, eps: float) -> Weights:
    """DeepSeek-V4: comb[source, destination], X' = combᵀ X + post ⊗ F."""
    pre, post, comb = bias.double().split([N, N, N * N])
    return Weights(
        sinkhorn_v4(comb.view(N, N), rounds, eps).T, torch.sigmoid(pre) + eps, 2 * torch.sigmoid(post)
    )


# --- dialects of one projection


def projected(
    prefix: Callable[[int, int], str],
    names: tuple[str, ...],
    make: Random,
    shapes: tuple[tuple[int, ...], ...],
) -> Tensors:
    return {
        f"{prefix(layer, branch)}{name}": make(*shape, scale=1.0 if len(shape) == 2 else 1.5)
        for layer, branch in SUBLAYERS
        for name, shape in zip(names, shapes, strict=True)
    }


def like_v4(
    seed: int,
    prefix: Callable[[int, int], str],
    names: tuple[str, ...],
    *,
    bias: str,
    config: dict[str, Any],
    dialect: str,
    rounds: int,
    eps: float = 1e-6,
    shapes: tuple[tuple[int, ...], ...] = ((M, N * D), (M,), (3,)),
    **more: Any,
) -> Case:
    tensors = projected(prefix, names, Random(seed), shapes)
    expected = [of_v4_bias(tensors[f"{prefix(*place)}{bias}"], rounds, eps) for place in SUBLAYERS]
    return Case(tensors, config, "mhc", dialect, expected, **more)


def raw_names(layer: int, branch: int) -> str:
    return f"layers.{layer}.hc_{('attn', 'ffn')[branch]}_"


def deepseek_v4() -> Case:
    case = like_v4(
        1, raw_names, ("fn", "base", "scale"), bias="base", dialect="deepseek-v4", rounds=7, eps=1e-4,
        config={"model_type": "deepseek_v4", "hc_mult": N, "hc_sinkhorn_iters": 7, "hc_eps": 1e-4},
    )  # fmt: skip
    return with_head(case, 1e-4, "hc_head_fn", "hc_head_base", "hc_head_scale")


def with_head(case: Case, eps: float, weight: str, bias: str, scale: str) -> Case:
    """The case with the tensors of a head of these names."""
    make = Random(11)
    case.tensors |= {weight: make(N, N * D), bias: make(N), scale: make(1)}
    case.head = torch.sigmoid(case.tensors[bias].double()) + eps
    return case


def deepseek_v41() -> Case:
    return like_v4(
        3, raw_names, ("fn", "base", "scale"), bias="base", dialect="deepseek-v4", rounds=5, eps=1e-5,
        config={"model_type": "deepseek_v41", "text_config": {"hc_mult": N, "hc_sinkhorn_iters": 5, "hc_eps": 1e-5}},
    )  # fmt: skip


def torchtitan() -> Case:
    return like_v4(
        5, lambda layer, branch: f"layers.{layer}.{('attention', 'ffn')[branch]}.", ("hc_fn", "hc_base", "hc_scale"),
        bias="hc_base", dialect="deepseek-v4-transformers", rounds=20, config={},
    )  # fmt: skip


MEGATRON = ("mapping_proj.weight", "bias", "alpha_pre", "alpha_post", "alpha_res")


def megatron_names(layer: int, branch: int) -> str:
    return f"decoder.layers.{layer}.{('self_attention', 'mlp')[branch]}_hyper_connection."


def megatron() -> Case:
    return like_v4(
        7, megatron_names, MEGATRON, bias="bias", dialect="megatron", rounds=9,
        shapes=((M, N * D), (M,), (1,), (1,), (1,)),
        config={"num_residual_streams": N, "mhc_sinkhorn_iterations": 9, "hidden_size": D},
    )  # fmt: skip


def paddlefleet() -> Case:
    return like_v4(
        8, megatron_names, MEGATRON, bias="bias", dialect="megatron", rounds=20,
        shapes=((N * D, M), (M,), (1,), (1,), (1,)), config={"hidden_size": D},
    )  # fmt: skip


def openpangu() -> Case:
    def names(layer: int, branch: int) -> str:
        return f"model.layers.{layer}.{('attn', 'mlp')[branch]}_mhc_module."

    case = like_v4(
        10, names, ("phi.weight", "branch_beta", "branch_alpha", "norm_gamma"), bias="branch_beta",
        dialect="openpangu-v2", rounds=11, shapes=((M, N * D), (M,), (3,), (N * D,)),
        config={"model_type": "openpangu_v2", "mhc_num_stream": N, "mhc_recur_norm": 11},
    )  # fmt: skip
    case.tensors["model.merge_mhc_module.norm_gamma"] = Random(12)(N * D)
    of_head = (
        f"model.merge_mhc_module.{name}" for name in ("phi.weight", "branch_beta_pre", "branch_alpha_pre")
    )
    return with_head(case, 1e-6, *of_head)


def gguf_of_deepseek() -> Case:
    case = like_v4(
        13, lambda layer, branch: f"blk.{layer}.hc_{('attn', 'ffn')[branch]}_", ("fn.weight", "base.weight", "scale.weight"),
        bias="base.weight", dialect="deepseek-v4", rounds=6, eps=1e-4, config={"model_type": "deepseek4"},
        settings={"hyper_connection.sinkhorn_iterations": 6, "hyper_connection.epsilon": 1e-4, "hyper_connection.count": N},
    )  # fmt: skip
    return with_head(case, 1e-4, *(f"output_hc_{name}.weight" for name in ("fn", "base", "scale")))


# --- static_alpha and its descendants


def of_alphas(
    seed: int,
    alpha: tuple[int, ...],
    others: dict[str, tuple[int, ...]],
    weights: Callable[[torch.Tensor, torch.Tensor], Weights],
    *kind: str,
    scale: float = 1.0,
) -> Case:
    """A case with other tensors of some shapes, whose weights follow from static_alpha and static_beta."""
    make, case = Random(seed), Case({}, {}, *kind)
    for layer, branch in SUBLAYERS:
        found = {"static_alpha": make(*alpha, scale=scale), "static_beta": make(N)}
        case.expected.append(weights(*found.values()))
        found |= {name: make(*shape) for name, shape in others.items()}
        case.tensors |= {f"layers.{layer}.{branch}.{name}": tensor for name, tensor in found.items()}
    return case


def dynamic_hyper_connections() -> Case:
    others = {
        "dynamic_alpha_fn": (D, N + 1), "dynamic_alpha_scale": (), "dynamic_beta_fn": (D,), "dynamic_beta_scale": (),
        "norm.gamma": (D,),
    }  # fmt: skip
    return of_alphas(
        18, (N, N + 1), others,
        # mix_h = alphaᵀ X: column 0 is the branch's input
        lambda alpha, beta: Weights(alpha[:, 1:].T, alpha[:, 0], beta), "hc", "hyper-connections",
    )  # fmt: skip


def static_hyper_connections() -> Case:
    case = dynamic_hyper_connections()
    case.tensors = {name: value for name, value in case.tensors.items() if "static" in name}
    return case


OF_ALL_STREAMS: dict[str, tuple[int, ...]] = {
    "dynamic_beta_fn": (N * D, N), "pre_branch_scale": (1,), "residual_scale": (1,), "h_post_scale": (),
    "norm.gamma": (N * D,),
}  # fmt: skip


def flattened_mhc() -> Case:
    return of_alphas(
        19, (N, N + 1), {"dynamic_alpha_fn": (N * D, N + N * N), **OF_ALL_STREAMS},
        lambda alpha, beta: Weights(
            sinkhorn(alpha[:, 1:].double()).T, torch.sigmoid(alpha[:, 0]), 2 * torch.sigmoid(beta)
        ),
        "mhc", "mhc-lucidrains", scale=2.0,
    )  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        deepseek_v4, deepseek_v41, torchtitan, megatron, paddlefleet, openpangu, gguf_of_deepseek, dynamic_hyper_connections,
        static_hyper_connections, flattened_mhc,
    )
}  # fmt: skip


# --- files


def write_safetensors(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """One file in a folder."""
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(
    folder: Path, tensors: Tensors, config: dict[str, Any], settings: dict[str, float], *, quantised: str = ""
) -> Path:
    """One GGUF file; its metadata have the numbers of the configuration. Tensors that ``quantised`` names are Q8_0."""
    import gguf

    config = {**config, **config.get("text_config", {})}
    architecture = str(config.get("model_type", ""))
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), architecture or "none")
    for key, value in (config | settings).items():
        name = f"{architecture or 'none'}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
    for name, tensor in tensors.items():
        values = np.atleast_1d(tensor.float().numpy())
        if quantised and quantised in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"
