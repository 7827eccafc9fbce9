"""Files in 16 and 8 bits, quantised and split GGUF files, and networks without connections: right, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthscope import probes
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.dialect import Dialect  # a user's own row
from tests.probes.static.dialect_files import CASES, write_gguf, write_safetensors

gguf = pytest.importorskip("gguf")


def test_sixteen_bits_are_rounded_values_of_the_same(tmp_path):
    case = CASES["deepseek_v4"]()
    rounded = {key: value.to(torch.bfloat16) for key, value in case.tensors.items()}
    full = {key: value.float() for key, value in rounded.items()}
    for part in ("half", "full"):
        (tmp_path / part).mkdir()
    half = probes.describe_weights(write_safetensors(tmp_path / "half", rounded, case.config))
    same = probes.describe_weights(write_safetensors(tmp_path / "full", full, case.config))
    for one, other in zip(half.connections, same.connections, strict=True):
        for part in ("h_res", "h_pre", "h_post"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


def test_eight_bit_floats_of_what_is_read_are_refused_by_name(tmp_path):
    case = CASES["deepseek_v4"]()
    read = next(key for key in case.tensors if key.endswith("base"))
    case.tensors[read] = case.tensors[read].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=f"'{read}' is stored as F8_E4M3"):
        probes.describe_weights(write_safetensors(tmp_path, case.tensors, case.config))


def test_eight_bit_floats_of_what_is_not_read_do_no_harm(tmp_path):
    case = CASES["deepseek_v4"]()
    for key in list(case.tensors):
        if key.endswith("fn"):
            case.tensors[key] = case.tensors[key].to(torch.float8_e4m3fn)
            case.tensors[f"{key}_scale_inv"] = torch.ones(1)
    found = probes.describe_weights(write_safetensors(tmp_path, case.tensors, case.config))
    for one, expected in zip(found.connections, case.expected, strict=True):
        np.testing.assert_allclose(one.h_res, expected.res, atol=3e-6)


# --- GGUF


def test_quantised_values_are_those_of_the_gguf_package(tmp_path):
    """Logits of 8 streams, 64 numbers, in the blocks of 32 that Q8_0 has."""
    n = 8
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(n, n, generator=generator), torch.randn(1, n, generator=generator)
    tensors = {
        "h.0.attn.H_res_logits": logits.reshape(1, -1).reshape(2, 32),
        "h.0.attn.H_pre_logits": weights,
    }
    flat = Dialect(
        name="flat", title="", family="mine", names=("{path}.*",), tensors={"H_res_logits": "2, 32"},
        projections={"H_pre_logits": "1, n"}, parts=lambda t: {"res": t.H_res_logits.reshape(t.n, t.n)},
        mixing=lambda t: t.res,
    )  # fmt: skip
    file = write_gguf(tmp_path, tensors, {"model_type": "mine"}, {}, quantised="H_res")
    (one,) = probes.describe_weights(file, dialects=[flat]).connections
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(tensors["h.0.attn.H_res_logits"].numpy(), kind), kind
    )
    np.testing.assert_array_equal(one.h_res, expected.reshape(n, n).astype(np.float64))
    assert np.abs(one.h_res - logits.numpy()).max() > 1e-4, "it was quantised"


def test_a_type_that_cannot_be_dequantised_is_refused_by_name(tmp_path):
    case = CASES["gguf_of_deepseek"]()
    file = write_gguf(tmp_path, case.tensors, case.config, case.settings)
    raw = bytearray(file.read_bytes())
    at = raw.index(b"blk.1.hc_ffn_base.weight") + len(b"blk.1.hc_ffn_base.weight") + 4 + 8
    raw[at : at + 4] = (26).to_bytes(4, "little")  # I32
    file.write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"'blk.1.hc_ffn_base.weight' is stored as I32, which cannot be dequantised"
    ):
        probes.describe_weights(file)


def series(folder, count: int = 2):
    """A GGUF checkpoint in several files, each with tensors of every layer."""
    case = CASES["gguf_of_deepseek"]()
    names = sorted(case.tensors)
    for part in range(count):
        (folder / f"part{part}").mkdir()
        tensors = {name: case.tensors[name] for name in names[part::count]}
        settings = case.settings if part == 0 else {}
        file = write_gguf(folder / f"part{part}", tensors, case.config, settings)
        file.rename(folder / f"m-{part + 1:05d}-of-{count:05d}.gguf")
    return case, folder / f"m-{1:05d}-of-{count:05d}.gguf"


def test_a_series_of_gguf_files_is_one_checkpoint(tmp_path):
    case, first = series(tmp_path)
    found = probes.describe_weights(first)
    assert found.num_files == 2
    for one, expected in zip(found.connections, case.expected, strict=True):
        np.testing.assert_allclose(one.h_res, expected.res, atol=3e-6)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="contains 1 of 2 shards"):
        probes.describe_weights(first)


def test_several_gguf_files_in_a_folder_are_a_choice(tmp_path):
    case = CASES["gguf_of_deepseek"]()
    write_gguf(tmp_path, case.tensors, case.config, case.settings).rename(tmp_path / "q8.gguf")
    assert len(probes.describe_weights(tmp_path).connections) == 6
    write_gguf(tmp_path, case.tensors, case.config, case.settings)
    with pytest.raises(CheckpointError, match=r"several GGUF checkpoints \(model.gguf, q8.gguf\)"):
        probes.describe_weights(tmp_path)


# --- networks without connections


@pytest.mark.model
def test_a_plain_network_has_no_connection_and_nothing_that_looks_like_one(tmp_path):
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=99))
    found = probes.describe_weights(write_safetensors(tmp_path, model.state_dict(), {"model_type": "mamba"}))
    assert (found.connections, found.heads, found.unrecognised) == ((), (), ())
