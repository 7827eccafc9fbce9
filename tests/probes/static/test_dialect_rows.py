"""Rows of dialects: a user's own in a file, and what is said of malformed ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthscope import probes
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.static.formula import Formula, FormulaError

ROW = """
[[dialect]]
name = "mine"
family = "circulant"
names = ["{path}.{branch}_mixer.*"]
tensors = { map = "n*D, 3*n", start = "3*n" }
parts = { pre = "start[:n]", post = "start[n:2*n]", res = "start[2*n:]" }
rows = "sources"
read = "softmax(pre)"
write = "strength * sigmoid(post)"
mixing = "diagonal(tanh(res))"
[dialect.constants]
strength = { keys = ["mixer_strength"], default = 3.0 }
"""


def files(folder, row: str = ROW, n: int = 5):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for branch in ("attn", "ffn"):
            tensors[f"h.{layer}.{branch}_mixer.map"] = torch.randn(n * 8, 3 * n, generator=generator)
            tensors[f"h.{layer}.{branch}_mixer.start"] = torch.randn(3 * n, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "mine.toml").write_text(row, encoding="utf-8")
    return tensors


def test_a_users_row_is_read_like_any_other(tmp_path):
    tensors = files(tmp_path)
    found = probes.describe_weights(tmp_path, dialect_file=tmp_path / "mine.toml")
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


def test_a_users_row_comes_before_the_table(tmp_path):
    base = torch.randn(24, generator=torch.Generator().manual_seed(1))
    names = {"fn": torch.zeros(24, 64), "base": base, "scale": torch.ones(3)}
    save_file(
        {f"layers.0.hc_attn_{name}": tensor for name, tensor in names.items()}, tmp_path / "m.safetensors"
    )
    row = (
        '[[dialect]]\nname = "swapped"\nlike = "deepseek-v4"\nfamily = "mine"\nparts = { pre = "base[n:2*n]", '
        + ('post = "base[:n]", res = "square(base[2*n:])" }\n')
    )
    (tmp_path / "mine.toml").write_text(row)
    usual = probes.describe_weights(tmp_path / "m.safetensors").connections[0]
    own = probes.describe_weights(
        tmp_path / "m.safetensors", dialect_file=tmp_path / "mine.toml"
    ).connections[0]
    assert (own.dialect, own.family) == ("swapped", "mine")
    np.testing.assert_allclose(own.h_pre, usual.h_post / 2 + 1e-6, atol=1e-9)
    np.testing.assert_array_equal(own.h_res, usual.h_res)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[[dialect]]", "[dialect]"), r"no \[\[dialect\]\] table"),
        (('name = "mine"\n', ""), "its name is missing"),
        (('family = "circulant"\n', ""), "it has no family"),
        (("rows =", "row ="), "'row' is not a key of a row; expected name, family"),
        (('rows = "sources"', 'rows = "sideways"'), "rows is 'sideways'; expected 'sources' or 'destinations'"),
        (('"{path}.{branch}_mixer.*"', '"h.*.mixer"'), "must begin with '{path}.' and have one"),
        (('"start[:n]"', '"begin[:n]"'), "pre uses 'begin', which is not a tensor, symbol of a shape, constant or part"),
        (('"softmax(pre)"', '"open(pre)"'), "calls what is not a function"),
        (('"softmax(pre)"', '"pre.__class__"'), "contains a Attribute, which is not a part of a formula"),
        (('"softmax(pre)"', '"softmax(pre"'), "is not a formula"),
        (('"n*D, 3*n"', "12"), "tensors contains a whole number; expected text"),
        (('keys = ["mixer_strength"], ', ""), "constants.strength is not a table with keys"),
        (("default = 3.0", 'default = "three"'), "constants.strength.default is not a number"),
        (('read = "softmax(pre)"', "read = 3"), "read is a whole number; expected text"),
        (('read = "softmax(pre)"', 'read = "softmax(pre)'), r"is not a TOML file \("),
        (('name = "mine"', 'name = "mine"\nlike = "deepseek-v5"'), "like = 'deepseek-v5' is not an earlier row"),
        (('name = "mine"', 'name = "mine"\nread_lag = 2'), "read_lag is 2; expected 0 or 1"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_refused_in_one_sentence(change, words, tmp_path):
    assert change[0] in ROW
    files(tmp_path, ROW.replace(*change))
    with pytest.raises(CheckpointError, match=words) as raised:
        probes.describe_weights(tmp_path, dialect_file=tmp_path / "mine.toml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ('"diagonal(tanh(post[:2]))"', r"mixing gives the shape \(2, 2\); expected \(5, 5\)"),
        ('"square(res)"', "square of 5 values, which is not a square number"),
        ('"permutations(res)"', "permutations of 5 weights"),
        ("\"sinkhorn(square(start[:9]), 3, last='up')\"", "sinkhorn ends on 'up'"),
        ('"diagonal(res + start)"', "cannot be computed"),
    ],
)
def test_a_formula_that_does_not_fit_the_tensors_names_the_row_and_the_place(formula, words, tmp_path):
    files(tmp_path, ROW.replace('"diagonal(tanh(res))"', formula))
    with pytest.raises(CheckpointError, match=words) as raised:
        probes.describe_weights(tmp_path, dialect_file=tmp_path / "mine.toml")
    assert "'mine', at h.0.attn_mixer" in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "[n for n in x]", "lambda: 1", "n if n else 1", "x.shape", "f(*n)"],
)
def test_a_formula_is_arithmetic_and_nothing_else(text):
    with pytest.raises(FormulaError):
        Formula(text).value({"n": 2, "x": np.zeros(2)})
