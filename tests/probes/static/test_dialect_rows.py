"""Rows of dialects: a user's own, and what is said of one that cannot be computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthscope import probes
from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.errors import CheckpointError

# What a user's own row is made of.
from depthscope.probes.static.dialect import Constant, Dialect, solve
from depthscope.probes.static.dialects import DEEPSEEK_V4, TABLE, permutations, sinkhorn

MINE = Dialect(
    name="mine",
    title="three maps in one projection",
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


def files(folder, n: int = 5):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for branch in ("attn", "ffn"):
            tensors[f"h.{layer}.{branch}_mixer.map"] = torch.randn(n * 8, 3 * n, generator=generator)
            tensors[f"h.{layer}.{branch}_mixer.start"] = torch.randn(3 * n, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_a_users_row_is_read_like_any_other(tmp_path):
    tensors = files(tmp_path)
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
        ({"read": lambda t: t.begin}, "'begin' is not a tensor, size, constant or part of the row"),
        ({"mixing": lambda t: permutations(t.res, 9)}, "permutations of 9 streams; expected at most 8"),
        ({"mixing": lambda t: sinkhorn(np.diag(t.res), 3, last="up")}, "sinkhorn ends on 'up'"),
    ],
)
def test_a_row_that_does_not_fit_the_tensors_is_named_with_the_place(change, words, tmp_path):
    files(tmp_path)
    with pytest.raises(CheckpointError, match=words) as raised:
        probes.describe_weights(tmp_path, dialects=[replace(MINE, **change)])
    assert "'mine', at h.0.attn_mixer" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_have_one_place_for_a_tensor():
    with pytest.raises(InputError, match=r"must begin with '\{path\}\.' and have one"):
        replace(MINE, names=("h.*.mixer",))


def test_rows_of_the_table_have_names_of_their_own():
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_shapes_give_the_sizes_or_several_solutions():
    texts = {"a": "n*k, k*(n+1)", "b": "n, n + 1"}
    assert solve({"b": (4, 5)}, texts) == [{"n": 4}]
    assert solve({"b": (5, 4)}, texts) == []
    assert solve({"a": (8, 10)}, texts) == [{"k": 2, "n": 4}]
