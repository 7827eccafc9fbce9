"""Checkpoints: what loads, what is refused and why, what is never done (network, pickled code)."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from depthscope import load as load_checkpoint
from depthscope.probes.checkpoints.weight_files import CheckpointError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def tiny_llama(cls: str = "LlamaForCausalLM") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return getattr(transformers, cls)(config).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


# --- transformers folders


def test_folder_gives_the_saved_model(folder):
    loaded = load_checkpoint(str(folder))
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    assert not loaded.model.training
    assert loaded.tokenizer is None
    assert (loaded.name, loaded.source) == ("tiny", str(folder))
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.digest == f"sha256:{expected}"


def test_sharded_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "s", max_shard_size="30KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    loaded = load_checkpoint(str(tmp_path / "s"))
    assert torch.equal(loaded.model(IDS).logits, tiny_llama()(IDS).logits)
    sorted((tmp_path / "s").glob("*.safetensors"))[0].unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-.* is not there; complete the download"):
        load_checkpoint(str(tmp_path / "s"))


def test_dtype(folder):
    assert load_checkpoint(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="got dtype 'float33'"):
        load_checkpoint(str(folder), dtype="float33")


def test_torn_safetensors(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is torn"):
        load_checkpoint(str(folder))


def test_weights_that_would_be_random_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of LlamaForCausalLM \(model.norm.weight\)"):
        load_checkpoint(str(folder))


def test_folders_that_are_empty_or_without_configuration_or_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json in .* \(found: nothing\)"):
        load_checkpoint(str(tmp_path))
    (tmp_path / "weights.txt").touch()
    with pytest.raises(CheckpointError, match=r"no config.json in .* \(found: weights.txt\)"):
        load_checkpoint(str(tmp_path))
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no safetensors or pytorch_model.bin"):
        load_checkpoint(str(tmp_path))


def test_unknown_architecture_runs_no_code_of_the_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "novel.Config", "AutoModel": "novel.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "novel.py").write_text("import os; os.mkdir('evil-was-here')")
    with pytest.raises(CheckpointError, match=r"does not know the architecture.*never run"):
        load_checkpoint(str(folder))
    assert not Path("evil-was-here").exists()


def test_pickled_folder_opens_only_as_tensors(folder, monkeypatch):
    monkeypatch.chdir(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load_checkpoint(str(folder)).model(IDS).logits, tiny_llama()(IDS).logits)
    torch.save({"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"more than tensors.*safetensors"):
        load_checkpoint(str(folder))
    assert not Path("evil-was-here").exists()


# --- what a folder names, and what its configuration gives


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def sharded(folder: Path, kind: str) -> Path:
    """A folder with an index of two files, safetensors or pickles; returns the index."""
    model = tiny_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    names = sorted(model.state_dict())
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    files = [f"part-{i}.{kind}" for i in range(2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        found = {name: tensors[name] for name in part}
        save_file(found, folder / file) if kind == "safetensors" else torch.save(found, folder / file)
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(
    ("kind", "way"), [("safetensors", ".."), ("bin", "linked folder"), ("safetensors", "link")]
)
def test_no_shard_is_read_from_outside(tmp_path, kind, way):
    index = sharded(tmp_path / "m", kind)
    assert torch.equal(load_checkpoint(str(tmp_path / "m")).model(IDS).logits, tiny_llama()(IDS).logits)
    inside, outside = tmp_path / "m" / f"part-0.{kind}", tmp_path / f"outside.{kind}"
    inside.rename(outside)
    names = {"..": f"../{outside.name}", "linked folder": f"way/{outside.name}"}
    if way == "link":
        inside.symlink_to(outside)
    else:
        (tmp_path / "m" / "way").symlink_to(tmp_path)
        index.write_text(index.read_text().replace(inside.name, names[way]))
    with pytest.raises(CheckpointError, match=r"leads? out of"):
        load_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["../w.safetensors", "w.safetensors", 5])
def test_weights_that_the_configuration_names_are_the_folders(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "w.safetensors")
    (folder / "w.safetensors").symlink_to("../w.safetensors")
    configure(folder, transformers_weights=name)
    with pytest.raises(CheckpointError, match=r"leads out of|names .* as a file"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**7), ("vocab_size", 10**12), ("hidden_size", 2 * 10**5)],
)
def test_a_model_larger_than_its_weights_is_refused_before_it_is_built(folder, name, value):
    configure(folder, **{name: value})
    with pytest.raises(CheckpointError, match=r"one of the two is of another checkpoint, or was edited"):
        load_checkpoint(str(folder))


def test_weights_of_another_shape_are_named_with_both_shapes(folder):
    configure(folder, vocab_size=290)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: \(300, 32\), not \(290, 32\)"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("names", [[1], ["AutoModel"], ["logging"]])
def test_architectures_that_are_no_models(folder, names):
    configure(folder, architectures=names)
    with pytest.raises(CheckpointError, match="as its architecture; expected a model class"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"", b"[" * 10_000, b'{"version": "1.0", "model": {}}'])
def test_a_broken_tokenizer_is_not_replaced_by_bytes(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer in .* does not load .*; repair its files"):
        load_checkpoint(str(folder))


def test_no_code_of_a_tokenizer_or_a_known_architecture_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "novel.py").write_text("import os; os.mkdir('evil-was-here')\nclass M: pass")
    configure(folder, auto_map={"AutoConfig": "novel.M", "AutoModelForCausalLM": "novel.M"})
    load_checkpoint(str(folder))
    config = {"auto_map": {"AutoTokenizer": ["novel.M", None]}, "tokenizer_class": "Novel"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not load"):
        load_checkpoint(str(folder))
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.model", "generation_config.json"]
)
def test_a_pipe_in_the_folder_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is a named pipe"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("suffix", ["", ".gguf", ".safetensors", ".pt"])
def test_a_pipe_as_checkpoint_is_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(CheckpointError, match="is a named pipe"):
        load_checkpoint(str(tmp_path / f"x{suffix}"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/at/all", "no such checkpoint: 'nowhere/at/all'; expected a transformers folder"),
        ("my model:build", "got 'my model:build', expected 'package.module:function'"),
        ("a\0b", r"no such checkpoint: 'a\?b'"),
        ("x" * 5000, "no such checkpoint: 'x+…'"),
        ("~nobody-of-this-name/x", "names no home folder"),
        ("/dev/zero", "is a device"),
    ],
)
def test_what_is_not_there(spec, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(spec)


def test_weights_file_alone(folder, tmp_path):
    with pytest.raises(CheckpointError, match="give its folder"):
        load_checkpoint(str(folder / "model.safetensors"))
    lone = tmp_path / "lone.pt"
    lone.touch()
    with pytest.raises(CheckpointError, match=r"package.module:function"):
        load_checkpoint(str(lone))
    with pytest.raises(CheckpointError, match=r"go with 'package.module:function'"):
        load_checkpoint(str(folder), weights=str(lone))


# --- factories


FACTORIES = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.first = nn.Linear(width, width)
            self.last = nn.Linear(width, 2)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

    def build(): return Net()
    def needs(width): return Net(width)
    def text(): return "a model"
    READY = Net()
    NUMBER = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module in the working folder, as when a command is run in a project's folder."""
    name = f"models_{abs(hash(tmp_path)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.chdir(tmp_path)
    return name


def linear_weights(width: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layers = nn.ModuleDict({"first": nn.Linear(width, width), "last": nn.Linear(width, 2)})
    return dict(layers.state_dict())


@pytest.mark.parametrize("name", ["build", "Net", "READY"])
def test_factory(factories, name):
    loaded = load_checkpoint(f"{factories}:{name}")
    assert type(loaded.model).__name__ == "Net"
    assert not loaded.model.training
    assert loaded.name == name
    assert loaded.digest.startswith("sha256:")


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "ddp", "folder"])
def test_factory_with_weights(factories, tmp_path, kind):
    weights = linear_weights()
    path = tmp_path / f"w.{'safetensors' if kind in {'safetensors', 'folder'} else 'pt'}"
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        prefix = "module." if kind == "ddp" else ""
        content = {prefix + name: value for name, value in weights.items()}
        torch.save({"state_dict": content, "epoch": 3} if kind == "nested" else content, path)
    loaded = load_checkpoint(f"{factories}:build", weights=tmp_path if kind == "folder" else path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_tied_weights_need_one_name(factories, tmp_path):
    table = torch.randn(5, 3)
    save_file({"table.weight": table}, tmp_path / "w.safetensors")
    model = load_checkpoint(f"{factories}:Tied", weights=tmp_path / "w.safetensors").model
    assert torch.equal(model.head.weight, table)


def test_weights_that_do_not_fit_are_listed(factories, tmp_path):
    weights = linear_weights()
    weights["extra.bias"] = weights.pop("last.bias")
    weights["first.weight"] = torch.zeros(4, 5)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(f"{factories}:build", weights=tmp_path / "w.safetensors")
    for part in (
        'Missing key(s) in state_dict: "last.bias"',
        'Unexpected key(s) in state_dict: "extra.bias"',
        "shape torch.Size([4, 5]) from checkpoint, the shape in current model is torch.Size([4, 4])",
    ):
        assert part in str(caught.value)


def test_pickle_with_code_is_refused_and_not_run(factories, tmp_path):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    torch.save({"a": Evil()}, tmp_path / "v.pt")
    for name in ("w.pt", "v.pt"):
        with pytest.raises(CheckpointError, match="save the weights alone"):
            load_checkpoint(f"{factories}:build", weights=tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [({"epoch": 3}, "contains no state dict"), ([1, 2], "contains a list"), (b"", "cannot be read")],
)
def test_weights_without_tensors(factories, tmp_path, content, message):
    path = tmp_path / "w.pt"
    if content == b"":
        path.write_bytes(b"")
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(f"{factories}:build", weights=path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"no 'absent' in '.*'; it has: .*build"),
        ("needs", "cannot be called without arguments .*'width'"),
        ("text", "returned an object of type str; expected an nn.Module"),
        ("NUMBER", "is a int; expected a function"),
    ],
)
def test_wrong_factory(factories, name, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(f"{factories}:{name}")
    with pytest.raises(CheckpointError, match="no module 'not_a_module_at_all'"):
        load_checkpoint("not_a_module_at_all:build")
