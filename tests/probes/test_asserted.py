"""What a user says of a model or a run is refused where it cannot be so, and called asserted where nothing shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import depthscope as ds
from depthscope import probe_checkpoints
from depthscope.app.cli.main import USAGE, main
from tests.models.plain_stack import Block, Stack
from tests.models.small_models import lucidrains

IDS = torch.arange(24).reshape(4, 6) % 16


def plain() -> Stack:
    return Stack([Block(12), Block(12)], nn.Embedding(16, 12))


def test_streams_that_only_the_user_knows_are_asserted_and_not_proven():
    assert ds.capture(plain(), IDS).attrs["proof"] == "proven"
    run = ds.capture(plain(), IDS, streams=4, layout="B T (N D)")
    assert run.attrs["n_streams"] == 4
    assert run.attrs["proof"].startswith("unproven: 4 streams are asserted")
    assert "asserted" in str(ds.describe(plain(), IDS, streams=4, layout="B T (N D)"))
    assert all("4 streams are asserted" in each.sentence for each in ds.judge(ds.analyze(run)))


@pytest.mark.parametrize("layout", [None, "B T D"])
def test_streams_that_the_states_do_not_have_are_refused(layout):
    for verb in (ds.capture, ds.describe):
        with pytest.raises(ds.LayoutError, match="got streams=3, but a state of shape"):
            verb(plain(), IDS, streams=3, layout=layout)


def test_streams_that_the_connections_do_not_have_are_refused():
    model = lucidrains("mhc", streams=4)
    with pytest.raises(ds.LayoutError, match="got streams=3, but the connections of this model have 4"):
        ds.capture(model, IDS, streams=3)
    run = ds.capture(model, IDS, streams=4)
    assert run.attrs["n_streams"] == 4
    assert run.attrs["proof"] == "proven"


@pytest.mark.parametrize("value", [{"made": [object()]}, nn.Linear(1, 1), {(1, 2): 3}])
def test_attributes_that_no_file_takes_are_refused_before_anything_is_measured(value, tmp_path):
    attrs = {"model": "mine", "config": value}
    expected = pytest.raises(ds.DepthscopeError, match="attrs contain 'config', which no file takes")
    with expected:
        ds.record(plain(), attrs=attrs)
    with expected:
        ds.record(plain(), attrs=attrs, store=tmp_path / "a")
    with expected:
        ds.capture(plain(), IDS, attrs=attrs)
    with expected:
        probe_checkpoints([tmp_path / "step-1"], "text", tmp_path / "h.zarr.zip", attrs=attrs)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [{"return_dict": False}, {"_attn_implementation": "flex_attention"}, {"output_hidden_states": "x"}],
)
def test_settings_that_a_model_does_not_run_with_are_no_bug_of_ours(llama, tmp_path, change, capsys):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    words = ["probe", str(tmp_path), "--out", str(tmp_path / "a.zarr.zip"), "--length", "16"]
    for command in (words, ["describe", str(tmp_path)]):
        assert main(command) == USAGE
        assert "the model stops with" in capsys.readouterr().err
