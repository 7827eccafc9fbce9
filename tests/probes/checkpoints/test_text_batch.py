"""Text: seeded, non-overlapping windows; padding masked; bytes where there is no tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.load import LoadedModel
from depthscope.probes.checkpoints.text_batch import batches_of, encode_text, token_texts


class Reader(nn.Module):
    """Accepts a mask and labels, as transformers' causal models do."""

    def __init__(self, vocabulary: int = 256):
        super().__init__()
        self.table = nn.Embedding(vocabulary, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.table(input_ids)


class BareReader(Reader):
    def forward(self, input_ids):
        return self.table(input_ids)


class Letters:
    """A tokenizer of single letters: a = 1, b = 2, …"""

    pad_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) - 96 for letter in text]}

    def decode(self, ids):
        return "".join(chr(token + 96) for token in ids)


def loaded(model: nn.Module, tokenizer=None) -> LoadedModel:
    return LoadedModel(model, tokenizer, "reader", "", "")


def test_windows_are_real_parts_of_the_text_and_do_not_overlap():
    text = "".join(chr(33 + i % 90) for i in range(1000))
    batch = encode_text(loaded(Reader()), text, sequences=5, length=32, seed=3)
    ids = batch["input_ids"]
    assert ids.shape == (5, 32)
    windows = [bytes(row.tolist()).decode() for row in ids]
    starts = [index for index in range(0, 1000, 32) if text[index : index + 32] in windows]
    assert len(starts) >= 5
    assert all(window in text for window in windows)
    assert len(set(windows)) == 5
    assert torch.equal(batch["labels"], ids)
    assert batch["attention_mask"].all()


def test_short_text_is_padded_and_masked():
    batch = encode_text(loaded(Reader(), Letters()), "abcdefg", sequences=4, length=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, -100]]
    texts = token_texts(loaded(Reader(), Letters()), batch)
    assert texts.dtype == object
    assert texts.tolist() == [["a", "b", "c", "d"], ["e", "f", "g", ""]]


def test_model_that_takes_no_mask_gets_whole_windows_only():
    batch = encode_text(loaded(BareReader(), Letters()), "abcdefg", sequences=4, length=4)
    assert {name: value.tolist() for name, value in batch.items()} == {"input_ids": [[1, 2, 3, 4]]}
    assert encode_text(loaded(BareReader(), Letters()), "abc", length=4)["input_ids"].tolist() == [[1, 2, 3]]


class Ids(Reader):
    def forward(self, ids, targets=None):
        return self.table(ids)


class Pair(Reader):
    def forward(self, question, answer):
        return self.table(question)


def test_token_ids_go_to_the_only_required_argument():
    batch = encode_text(loaded(Ids(), Letters()), "abcdefg", sequences=4, length=3)
    assert {name: value.tolist() for name, value in batch.items()} == {"ids": [[1, 2, 3], [4, 5, 6]]}
    assert token_texts(loaded(Ids(), Letters()), batch).tolist() == [["a", "b", "c"], ["d", "e", "f"]]
    assert [part["ids"].shape for part in batches_of(batch, 1)] == [(1, 3), (1, 3)]
    with pytest.raises(
        InputError, match=r"takes \(question, answer\); expected an argument input_ids, or one"
    ):
        encode_text(loaded(Pair(), Letters()), "abcdefg", length=3)


def test_bytes_without_a_tokenizer(caplog):
    batch = encode_text(loaded(Reader()), "né", length=3)
    assert batch["input_ids"].tolist() == [[110, 195, 169]]
    assert not caplog.records
    encode_text(loaded(Reader(50_000)), "né", length=3)
    assert "bytes are read as its 50000 token ids" in caplog.text
    with pytest.raises(ValueError, match="no tokenizer and a vocabulary of 100 entries"):
        encode_text(loaded(Reader(100)), "né", length=3)


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("", {}, "the text has 0 tokens"),
        ("abc", {"sequences": 0}, "got 0 sequences"),
        ("abc", {"length": 1}, "of 1 tokens"),
    ],
)
def test_wrong_sizes(text, sizes, message):
    with pytest.raises(ValueError, match=message):
        encode_text(loaded(Reader()), text, **sizes)


def test_length_beyond_the_positions():
    model = Reader()
    model.config = type("Config", (), {"max_position_embeddings": 64, "vocab_size": 256})()
    with pytest.raises(ValueError, match="128 tokens, but the model has 64 positions; give length=64"):
        encode_text(loaded(model), "a" * 500, length=128)


def test_text_reaches_a_run_with_its_mask():
    from depthscope import probes
    from depthscope.app.demo.small_lm import Size, build

    model = build("residual", size=Size(layers=2, width=8, heads=2))
    small = loaded(model)
    batch = encode_text(small, "Depth and width differ.", sequences=2, length=16)
    run = probes.capture(model, batch, gradients=True, token_text=token_texts(small, batch))
    mask = run["trace"]["mask"].values
    assert np.array_equal(mask, batch["attention_mask"].numpy().astype(bool))
    assert "".join(run["trace"]["token_text"].values[mask]) == "Depth and width differ."
