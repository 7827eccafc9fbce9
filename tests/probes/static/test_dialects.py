"""Dialects: what is read of the files is what the code of its models computes where the input adds nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from depthscope import probes
from depthscope.diagnostics import kernels
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.dialects import DEEPSEEK_V4, DEEPSEEK_V41  # to begin a row of one's own with
from tests.probes.static.dialect_files import CASES, Case, D, N, Random
from tests.probes.static.written_files import write_gguf, write_safetensors

pytest.importorskip("gguf")


def write(case: Case, folder, form: str):
    if form == "gguf":
        # a GGUF file always names an architecture
        return write_gguf(folder, case.tensors, case.config or {"model_type": "deepseek4"}, case.settings)
    config = {**case.config, **case.settings}
    return write_safetensors(folder, case.tensors, config)


def same(found, expected) -> None:
    np.testing.assert_allclose(found, np.asarray(expected), atol=3e-6)


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_what_the_code_of_the_dialect_computes(name, form, tmp_path):
    case = CASES[name]()
    found = probes.describe_weights(write(case, tmp_path, form))
    assert found.unrecognised == ()
    assert len(found.connections) == len(case.expected)
    for one, expected in zip(found.connections, case.expected, strict=True):
        assert (one.family, one.dialect, one.streams) == (case.family, case.dialect, N)
        # the width is that of the projections, where there are any
        assert one.width in (D, None)
        same(one.h_res, expected.res)
        same(one.h_pre, expected.pre)
        same(one.h_post, expected.post)
    if case.head is not None:
        (head,) = found.heads
        same(head.h_pre, case.head)
    str(found)  # prints


def test_the_depth_kernel_of_a_lagged_read_is_that_of_the_model(tmp_path):
    """DeepSeek-V4.1, run stream by stream on one-hot branch outputs."""
    case = CASES["deepseek_v41"]()
    found = probes.describe_weights(write(case, tmp_path, "safetensors"))
    computed = [
        case.head if at == len(case.expected) - 1 else case.expected[at + 1].pre
        for at in range(len(case.expected))
    ]
    reads = [torch.eye(N).double()[0], *computed]
    kernel = np.zeros((len(case.expected), len(case.expected)))
    for source in range(len(case.expected)):
        streams = torch.zeros(N).double()
        for reader, weights in enumerate(case.expected):
            kernel[reader, source] = reads[reader] @ streams
            streams = weights.res @ streams + (weights.post if reader == source else 0)
    h_res, h_pre, h_post = (
        np.stack([getattr(one, part) for one in found.connections]) for part in ("h_res", "h_pre", "h_post")
    )
    np.testing.assert_allclose(kernels.mixing.depth_kernel(h_res, h_pre, h_post), kernel, atol=1e-5)
    assert {one.read_lag for one in found.connections} == {1}
    assert "collapses the streams" in found.heads[0].note


def test_without_a_model_type_the_lag_is_open_and_said(tmp_path):
    case = CASES["deepseek_v41"]()
    found = probes.describe_weights(write_safetensors(tmp_path, case.tensors, {}))
    assert {one.read_lag for one in found.connections} == {None}
    assert "whether it or the next one applies it" in str(found)
    lagged = probes.describe_weights(tmp_path, dialects=[replace(DEEPSEEK_V41, name="mine")])
    assert [one.read_lag for one in lagged.connections] == [1] * 6


def test_a_gap_leaves_the_lagged_reads_open(tmp_path):
    case = CASES["deepseek_v41"]()
    tensors = {name: value for name, value in case.tensors.items() if not name.startswith("layers.1.hc_ffn")}
    found = probes.describe_weights(write_safetensors(tmp_path, tensors, case.config))
    assert all(one.h_pre is None for one in found.connections)
    assert any("layer 1 mlp" in words for words in found.warnings)


def test_an_unknown_model_type_needs_a_row_of_its_own(tmp_path):
    case = CASES["deepseek_v4"]()
    folder = write_safetensors(tmp_path, case.tensors, {"model_type": "deepseek_v9"})
    with pytest.raises(
        CheckpointError, match=r"the names of deepseek-v4 .* model type deepseek_v9 is none of theirs"
    ):
        probes.describe_weights(folder)
    mine = replace(DEEPSEEK_V4, name="mine", model_types=frozenset())
    assert len(probes.describe_weights(folder, dialects=[mine]).connections) == 6


# --- attention over depth


def kimi(layers: int = 5) -> dict[str, torch.Tensor]:
    make = Random(30)
    prefix = "language_model.model."
    tensors = {}
    for layer in range(layers):
        for branch in ("self_attention", "mlp"):
            tensors[f"{prefix}layers.{layer}.{branch}_res_norm.weight"] = make(D)
            tensors[f"{prefix}layers.{layer}.{branch}_res_proj.weight"] = make(1, D)
    tensors[f"{prefix}output_attn_res_norm.weight"] = make(D)
    tensors[f"{prefix}output_attn_res_proj.weight"] = make(1, D)
    return tensors


def test_attention_residuals_are_named_and_their_weights_left_to_a_run(tmp_path):
    found = probes.describe_weights(write_safetensors(tmp_path, kimi(), {"model_type": "kimi_k3"}))
    everything = [*found.connections, *found.heads]
    assert (len(everything), {one.family for one in everything}) == (11, {"depth_attention"})
    assert (found.composites, everything[0].h_res, found.unrecognised) == ((), None, ())
    assert "depends on the input: run the model" in str(found)


def test_the_names_of_kimi_in_another_model_are_not_taken_for_it(tmp_path):
    with pytest.raises(CheckpointError, match="model type qwen3 is none of theirs"):
        probes.describe_weights(write_safetensors(tmp_path, kimi(), {"model_type": "qwen3"}))


def test_names_of_one_code_are_read_under_any_model_type_and_that_is_said(tmp_path):
    case = CASES["dynamic_hyper_connections"]()
    found = probes.describe_weights(write_safetensors(tmp_path, case.tensors, {"model_type": "nano_gpt"}))
    assert len(found.connections) == 6
    assert "by the names of its tensors, under the model type nano_gpt" in str(found)


def test_names_with_another_norm_are_not_read_and_named(tmp_path):
    """x-transformers' connection, which its mHC has under the names of the hyper-connections that it had before."""
    random, path = Random(0), "attn_layers.layers.0.2"
    tensors = {
        f"{path}.static_alpha": random(N, N + 1),
        f"{path}.static_beta": random(N),
        f"{path}.norm.weight": torch.ones(D),
    }
    found = probes.describe_weights(write_safetensors(tmp_path, tensors, {}))
    assert found.connections == ()
    assert [one.name for one in found.unrecognised] == [f"{path}.static_alpha", f"{path}.static_beta"]
