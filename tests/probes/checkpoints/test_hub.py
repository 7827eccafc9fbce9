"""Checkpoints of the hub: from a server of this machine, only data, once; and what is said where it may not be had."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import depthscope as ds
from depthscope.app.cli.main import FINE, USAGE, main
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.hub import is_hub_name
from tests.probes.checkpoints.hub_server import COMMIT, served
from tests.probes.checkpoints.test_load import IDS, tiny_llama

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Repositories: whole, in shards, without weights that are data, with a tokenizer that is a program's."""
    root = tmp_path_factory.mktemp("hub")
    tiny_llama().save_pretrained(root / "org" / "tiny")
    (root / "org" / "tiny" / "modeling_tiny.py").write_text("raise SystemExit('run')")
    (root / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "org" / "tiny" / "onnx").mkdir()
    (root / "org" / "tiny" / "onnx" / "model.safetensors").write_bytes(b"another")
    tiny_llama().save_pretrained(root / "org" / "shards", max_shard_size="30KB")
    for name, files in {
        "pickled": ["config.json", "pytorch_model.bin"],
        "spm": ["config.json", "model.safetensors", "tokenizer.model"],
        "quantised": ["a.Q4.gguf", "a.Q8.gguf"],
        "empty": ["README.md"],
        "gated": ["config.json"],
        "one": ["README.md", "m.Q4.gguf"],
    }.items():
        (root / "org" / name).mkdir()
        for file in files:
            (root / "org" / name / file).write_text("{}")
    return root


@pytest.fixture
def server(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with served(root) as (address, asked):
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "")
        yield asked


def test_only_data_is_fetched_and_only_once(server, monkeypatch, tmp_path):
    loaded = ds.load("org/tiny")
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    assert (loaded.name, loaded.repository, loaded.commit) == ("tiny", "org/tiny", COMMIT)
    fetched = {line.rpartition("/")[2] for line in server if line.startswith("GET /org")}
    assert fetched == {"config.json", "generation_config.json", "model.safetensors"}
    assert not list(tmp_path.rglob("*.py")) + list(tmp_path.rglob("*.bin"))
    # Weights after everything else: where they are there, nothing is missing.
    assert [line for line in server if line.startswith("GET /org")][-1].endswith("model.safetensors")
    before = len(server)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    for spec in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert ds.load(spec).digest == loaded.digest
    assert len(server) == before


def test_shards_are_fetched_by_their_index(server, tmp_path):
    loaded = ds.load("org/shards")
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    shards = sorted((tmp_path / "cache").rglob("model-0*.safetensors"))
    assert len(shards) > 1
    # One that is missing is fetched again.
    shards[0].resolve().unlink()
    shards[0].unlink()
    assert ds.load("org/shards").digest == loaded.digest


def test_a_run_keeps_the_commit(server, tmp_path, capsys):
    assert main(["probe", "org/tiny", "--sequences", "2", "--length", "16", "--json"]) == FINE
    attrs = json.loads(capsys.readouterr().out)["attrs"]
    assert (attrs["repository"], attrs["repository_commit"]) == ("org/tiny", COMMIT)
    assert attrs["model"] == "tiny"
    assert main(["describe", "org/tiny", "--weights-only", "--json"]) == FINE


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "org/pickled",
            r"it has config\.json, pytorch_model\.bin\. Weights in other files can contain code and are not",
        ),
        ("org/spm", r"tokenizer of 'org/spm' is neither JSON nor text \(tokenizer\.model\)"),
        ("org/quantised", r"has 2 GGUF files; name one, such as org/quantised/a\.Q4\.gguf"),
        ("org/quantised/b.gguf", r"no b\.gguf in 'org/quantised'; it has a\.Q4\.gguf, a\.Q8\.gguf"),
        ("org/one", r"m\.Q4\.gguf' .*GGUF"),  # it was fetched, and is none
        ("org/empty", r"has no model\.safetensors or \.gguf; it has README\.md"),
        ("org/gated", "Cannot access gated repo .* log in with"),
        ("org/nothing", "Repository Not Found .* no folder has this name here; correct the name"),
        ("org/tiny@v9", "Revision Not Found .*v9"),
    ],
)
def test_what_cannot_be_had_is_said(server, spec, message):
    with pytest.raises(CheckpointError, match=message):
        ds.load(spec)


def test_without_a_network_or_the_library(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'org/tiny' is not in the cache .* and HF_HUB_OFFLINE is set"):
        ds.load("org/tiny")
    assert not server
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match=r"'org/tiny' at http.* could not be fetched .* try again with a network"
    ):
        ds.load("org/tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["describe", "org/tiny"]) == USAGE
    assert "to fetch it from the Hugging Face hub: pip install" in capsys.readouterr().err


def test_a_model_that_another_program_cached_without_its_tokenizer_is_completed(server, root, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        hub.hf_hub_download("org/tiny", name)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"is not in the cache .*, or without its tokenizer"):
        ds.load("org/tiny")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert ds.load("org/tiny").commit == COMMIT


def test_what_is_a_path_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for spec in (
        "models/llama",
        "../llama",
        "a/b/c",
        "llama",
        "a/weights.safetensors",
        "my.module:build",
        "/a/b",
        "~/a",
    ):
        assert not is_hub_name(spec)
    for spec in ("org/name", "org/na.me-1@refs/pr/1", "org/name/sub/x.gguf", "org/name@abc"):
        assert is_hub_name(spec)
    with pytest.raises(
        CheckpointError, match="no such checkpoint: 'models/llama'; expected a transformers folder"
    ):
        ds.load("models/llama")
