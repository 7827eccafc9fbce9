"""Dialects: what is read of the files is what the code of its models computes where the input adds nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthscope import probes
from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.dialect import Constant, Dialect, solve  # a user's own row is made of these
from depthscope.probes.static.dialects import DEEPSEEK_V4, sinkhorn
from tests.probes.static.dialect_files import CASES, Case, D, N, Random, write_gguf, write_safetensors

gguf = pytest.importorskip("gguf")


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


def test_an_unknown_model_type_needs_a_row_of_its_own(tmp_path):
    case = CASES["deepseek_v4"]()
    folder = write_safetensors(tmp_path, case.tensors, {"model_type": "deepseek_v9"})
    with pytest.raises(
        CheckpointError, match=r"the names of deepseek-v4, and the model type deepseek_v9 is none of theirs"
    ):
        probes.describe_weights(folder)
    mine = replace(DEEPSEEK_V4, name="mine", model_types=frozenset())
    assert len(probes.describe_weights(folder, dialects=[mine]).connections) == 6


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


# --- a user's own rows, and what is said of one that cannot be computed

MINE = Dialect(
    name="mine",
    family="circulant",
    names=("{path}.{branch}_mixer.*",),
    projections={"map": "n*D, 3*n"},
    tensors={"start": "3*n"},
    parts=lambda t: {"pre": t.start[: t.n], "post": t.start[t.n : 2 * t.n], "res": t.start[2 * t.n :]},
    sources_in_rows=True,
    read=lambda t: np.exp(t.pre) / np.exp(t.pre).sum(),
    write=lambda t: t.strength / (1 + np.exp(-t.post)),
    mixing=lambda t: np.diag(np.tanh(t.res)),
    constants={"strength": Constant(("mixer_strength",), 3.0)},
)


def files_of_mine(folder, n: int = 5):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for branch in ("attn", "ffn"):
            tensors[f"h.{layer}.{branch}_mixer.map"] = torch.randn(n * 8, 3 * n, generator=generator)
            tensors[f"h.{layer}.{branch}_mixer.start"] = torch.randn(3 * n, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_users_row_is_read_like_any_other(tmp_path):
    tensors = files_of_mine(tmp_path)
    assert probes.describe_weights(tmp_path).connections == ()  # without it
    found = probes.describe_weights(tmp_path, dialects=[MINE])
    assert [(one.layer, one.branch, one.family) for one in found.connections] == [
        (layer, branch, "circulant") for layer in range(2) for branch in ("attn", "mlp")
    ]
    one, start = found.connections[0], tensors["h.0.attn_mixer.start"].double()
    np.testing.assert_allclose(one.h_res, torch.diag(torch.tanh(start[10:])), atol=1e-12)
    np.testing.assert_allclose(one.h_pre, torch.softmax(start[:5], 0), atol=1e-12)
    np.testing.assert_allclose(one.h_post, 3 * torch.sigmoid(start[5:10]), atol=1e-12)
    assert (one.streams, one.width) == (5, 8)
    assert found.assumed == ("mixer_strength",)
    assert "mixer_strength 3 (assumed" in str(found)
    (tmp_path / "config.json").write_text('{"model_type": "my_model", "mixer_strength": 2.0}')
    assert probes.describe_weights(tmp_path, dialects=[MINE]).settings == {"mixer_strength": 2.0}


def test_a_users_row_comes_before_the_table(tmp_path):
    base = torch.randn(24, generator=torch.Generator().manual_seed(1))
    names = {"fn": torch.zeros(24, 64), "base": base, "scale": torch.ones(3)}
    save_file(
        {f"layers.0.hc_attn_{name}": tensor for name, tensor in names.items()}, tmp_path / "m.safetensors"
    )

    def parts(t):
        return {
            "pre": t.base[t.n : 2 * t.n],
            "post": t.base[: t.n],
            "res": t.base[2 * t.n :].reshape(t.n, t.n),
        }

    swapped = replace(DEEPSEEK_V4, name="swapped", family="mine", parts=parts)
    usual = probes.describe_weights(tmp_path / "m.safetensors").connections[0]
    own = probes.describe_weights(tmp_path / "m.safetensors", dialects=[swapped]).connections[0]
    assert (own.dialect, own.family) == ("swapped", "mine")
    np.testing.assert_allclose(own.h_pre, usual.h_post / 2 + 1e-6, atol=1e-9)
    np.testing.assert_array_equal(own.h_res, usual.h_res)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixing": lambda t: np.diag(t.post[:2])}, r"H_res has the shape \(2, 2\); expected \(5, 5\)"),
        ({"mixing": lambda t: np.diag(t.res + t.start)}, "could not be broadcast"),
        ({"read": lambda t: t.begin}, "has no attribute 'begin'"),
        ({"mixing": lambda t: sinkhorn(np.diag(t.res), 3, last="up")}, "sinkhorn ends on 'up'"),
    ],
)
def test_a_row_that_does_not_fit_the_tensors_is_named_with_the_place(change, words, tmp_path):
    files_of_mine(tmp_path)
    with pytest.raises(CheckpointError, match=words) as raised:
        probes.describe_weights(tmp_path, dialects=[replace(MINE, **change)])
    assert "'mine', at h.0.attn_mixer" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_have_one_place_for_a_tensor():
    with pytest.raises(InputError, match=r"must begin with '\{path\}\.' and have one"):
        replace(MINE, names=("h.*.mixer",))


def test_shapes_give_the_sizes_or_several_solutions():
    texts = {"a": "n*k, k*(n+1)", "b": "n, n + 1"}
    assert solve({"b": (4, 5)}, texts) == [{"n": 4}]
    assert solve({"b": (5, 4)}, texts) == []
    assert [size["n"] for size in solve({"c": (8,)}, {"c": "n*k"})] == [2, 4, 8]
    with pytest.raises(InputError, match="several unknown factors"):
        solve({"d": (8,)}, {"d": "k*r"})
    assert solve({"a": (8, 10)}, texts) == [{"k": 2, "n": 4}]


# --- files in 16 and 8 bits, quantised and split GGUF files, and networks without connections


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


def test_eight_bit_floats_are_refused_by_name_where_they_are_read_and_do_no_harm_elsewhere(tmp_path):
    case = CASES["deepseek_v4"]()
    for key in list(case.tensors):
        if key.endswith("fn"):
            case.tensors[key] = case.tensors[key].to(torch.float8_e4m3fn)
            case.tensors[f"{key}_scale_inv"] = torch.ones(1)
    found = probes.describe_weights(write_safetensors(tmp_path, case.tensors, case.config))
    for one, expected in zip(found.connections, case.expected, strict=True):
        same(one.h_res, expected.res)
    read = next(key for key in case.tensors if key.endswith("base"))
    case.tensors[read] = case.tensors[read].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=f"'{read}' is stored as F8_E4M3"):
        probes.describe_weights(write_safetensors(tmp_path, case.tensors, case.config))


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
        name="flat", family="mine", names=("{path}.*",), tensors={"H_res_logits": "2, 32"},
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
