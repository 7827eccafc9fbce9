"""How does a text become the batch that a model reads? Windows chosen by seed, padding masked; a sample text for a start."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.errors import errors_of, errors_of_user_code
from depthscope.probes.checkpoints.load import LoadedModel

logger = logging.getLogger(__name__)

NUM_BYTES = 256
REPAIR = "repair the tokenizer's files"
IGNORED_LABEL = -100  # torch's and transformers' ignore_index


def sample_text() -> str:
    """English text that comes with every Python installation, so that a first look needs no download.

    Returns: The language reference that ``help()`` prints, about 470 kB, the same on every machine with this Python version.

    Examples
    --------
    >>> "coroutine" in sample_text()
    True
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError("this Python has no pydoc_data; give a text of your own") from error
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def encode_text(
    loaded: LoadedModel, text: str, *, sequences: int = 8, length: int = 256, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Encode non-overlapping windows of a text as a batch; the seed chooses them, their order is the text's.

    A text that is too short gives fewer windows, the last one padded and masked. A model without a tokenizer
    reads bytes.

    ``loaded``: the model that will read the batch.
    ``sequences, length``: number of windows, and of tokens in each.
    Returns: Token ids (sequence, token) int64 under the name of `token_argument` and, where the model's forward takes
    them, ``attention_mask`` (1 = a real token) and ``labels`` (the ids, -100 on padding; the model shifts them itself).
    Raises InputError: If the text is empty, a number is not positive, the length exceeds the model's positions, or the
    model has neither a tokenizer nor an entry for every byte, or no argument for token ids.
    """
    if sequences < 1 or length < 2:
        raise InputError(f"got {sequences} sequences of {length} tokens; expected at least 1 of at least 2")
    _check_positions(loaded.model, length)
    ids = _token_ids(loaded, text)
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens; expected at least 2")
    name_of_ids, accepted = token_argument(loaded), _parameters(loaded)
    if "attention_mask" not in accepted:  # padding cannot be masked: only full windows are used
        length = min(length, len(ids))
        ids = ids[: len(ids) // length * length]
    windows = _windows(ids, sequences, length, seed)
    padding = getattr(loaded.tokenizer, "pad_token_id", None)
    ids, more = _padded(windows, length, padding if isinstance(padding, int) else 0)
    batch = {name_of_ids: ids, **{name: value for name, value in more.items() if name in accepted}}
    device = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
    return {name: value.to(device) for name, value in batch.items()}


def _parameters(loaded: LoadedModel) -> Mapping[str, inspect.Parameter]:
    with errors_of_user_code(f"the model '{loaded.name}'"):
        return inspect.signature(loaded.model.forward).parameters


def token_argument(loaded: LoadedModel) -> str:
    """The argument of a model's forward that takes token ids: ``input_ids``, or else the only one that it requires.

    ``loaded``: the model that will read them.
    Raises InputError: Where the forward requires several arguments, or none by name.
    """
    parameters = _parameters(loaded)
    if "input_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return "input_ids"
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(required) != 1:
        raise InputError(
            f"the forward of '{loaded.name}' takes ({', '.join(parameters)}); expected an argument input_ids, or one required "
            "argument, for token ids; make the batch yourself and call ds.capture(model, batch)"
        )
    return required[0]


def encode_pairs(
    loaded: LoadedModel, pairs: Sequence[tuple[str, str]]
) -> tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pairs of short texts as pairs of batches: those of equal length together, so that nothing is padded.

    A token that the tokenizer puts before every text, such as BOS, is put there.

    ``loaded``: the model that will read them.
    ``pairs``: a clean and a corrupted text each.
    Returns: The numbers of the pairs in the order of the batches, and the ids (sequence, token) of each two.
    Raises InputError: Where the two texts of a pair have other numbers of tokens, with these.
    """
    encoded = []
    for number, pair in enumerate(pairs, 1):
        clean, corrupted = (_prompt_ids(loaded, text) for text in pair)
        if len(clean) != len(corrupted):
            counts = "; ".join(
                f"{len(ids)}: {' | '.join(token_texts(loaded, {'ids': ids[None]})[0])}"
                for ids in (clean, corrupted)
            )
            raise InputError(
                f"the texts of pair {number} have {len(clean)} and {len(corrupted)} tokens; expected as many, word by word "
                f"({counts})"
            )
        _check_positions(loaded.model, len(clean))
        encoded.append((clean, corrupted))
    order = sorted(range(len(pairs)), key=lambda number: len(encoded[number][0]))
    groups = groupby((encoded[number] for number in order), key=lambda pair: len(pair[0]))
    device = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
    batches = []
    for _, group in groups:
        clean, corrupted = zip(*group, strict=True)
        batches.append((torch.stack(clean).to(device), torch.stack(corrupted).to(device)))
    return order, batches


def _prompt_ids(loaded: LoadedModel, text: str) -> torch.Tensor:
    ids = _token_ids(loaded, text)
    if loaded.tokenizer is not None:
        with errors_of("transformers", f"the tokenizer of '{loaded.name}' does not encode the text", REPAIR):
            first = loaded.tokenizer.bos_token_id
            if first is not None and loaded.tokenizer(text)["input_ids"][:1] == [first] != list(ids[:1]):
                ids = np.concatenate([[first], ids])
    if len(ids) < 1:
        raise InputError(f"the text {text!r} has no tokens; expected a few words")
    return torch.from_numpy(np.array(ids))


def single_token(loaded: LoadedModel, text: str) -> int:
    """The id of a text that is one token, such as an answer.

    Raises InputError: Where it is several, with these.
    """
    ids = _token_ids(loaded, text)
    if len(ids) != 1:
        parts = " | ".join(token_texts(loaded, {"ids": torch.from_numpy(np.array(ids))[None]})[0])
        raise InputError(
            f"the answer {text!r} is {len(ids)} tokens ({parts}), expected one; most words begin with their space, as ' Paris'"
        )
    return int(ids[0])


def token_ids(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The token ids of a batch of `encode_text`: its first entry, whatever the model calls them."""
    return next(iter(batch.values()))


def batches_of(batch: Mapping[str, torch.Tensor], size: int | None) -> list[dict[str, torch.Tensor]]:
    """A batch in parts for one forward each, in order.

    ``size``: sequences in each part, fewer in the last one; None for all in one.
    """
    count = len(token_ids(batch))
    size = size or count
    return [
        {name: value[first : first + size] for name, value in batch.items()}
        for first in range(0, count, size)
    ]


def token_texts(loaded: LoadedModel, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Text of every token of a batch; the empty string on padding.

    ``loaded``: the model whose tokenizer made the batch.
    """
    ids = token_ids(batch).cpu().numpy()
    # Each token on its own: decoding a sequence at once may join tokens, as for a character of several bytes.
    decode = chr if loaded.tokenizer is None else lambda token: str(loaded.tokenizer.decode([token]))
    with errors_of("transformers", f"the tokenizer of '{loaded.name}' does not decode its own ids", REPAIR):
        known = {int(token): decode(int(token)) for token in np.unique(ids)}
    texts = np.array([[known[int(token)] for token in row] for row in ids], dtype=object)
    if "attention_mask" in batch:
        texts[batch["attention_mask"].cpu().numpy() == 0] = ""
    return texts


def _token_ids(loaded: LoadedModel, text: str) -> np.ndarray:
    if loaded.tokenizer is not None:
        # No BOS token, which only the first of all windows would have; verbose=False: the full text is longer than the
        # model's positions, of which tokenizers warn.
        with errors_of("transformers", f"the tokenizer of '{loaded.name}' does not encode the text", REPAIR):
            ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if not all(isinstance(token, int) for token in ids):
                raise TypeError("its ids are not whole numbers")
            return np.array(ids, dtype=np.int64)
    size = _vocabulary_size(loaded.model)  # bytes as ids: any vocabulary of 256 or more has an entry for each
    if size is None or size < NUM_BYTES:
        raise InputError(
            f"'{loaded.name}' has no tokenizer and a vocabulary of {size or 'unknown'} entries, fewer than "
            f"the {NUM_BYTES} bytes; make the batch yourself and call ds.capture(model, batch)"
        )
    if size > 2 * NUM_BYTES:
        logger.warning("%s has no tokenizer: bytes are read as its %d token ids", loaded.name, size)
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def _vocabulary_size(model: nn.Module) -> int | None:
    size = getattr(_text_config(model), "vocab_size", None)
    if isinstance(size, int):
        return size
    # Without a config the largest embedding: the others are positions or types, of which there are mostly fewer.
    return max(
        (module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)),
        default=None,
    )


def _text_config(model: nn.Module) -> Any:
    # Configs of multimodal models have the language model's as a part; all others return themselves.
    with errors_of_user_code(f"the configuration of {type(model).__name__}"):
        config = getattr(model, "config", None)
        get_text_config = getattr(config, "get_text_config", None)
        return config if get_text_config is None else get_text_config()


def _check_positions(model: nn.Module, length: int) -> None:
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise InputError(
            f"got a length of {length} tokens, but the model has {limit} positions; give length={limit}"
        )


def _windows(ids: np.ndarray, sequences: int, length: int, seed: int) -> list[np.ndarray]:
    # Up to len - 1: a window of one token has no next token to predict
    starts = np.arange(0, len(ids) - 1, length)
    full = starts[starts + length <= len(ids)]
    # The shorter last window is used only where there are not enough full ones.
    chosen = np.random.default_rng(seed).permutation(full)[:sequences] if len(full) >= sequences else starts
    return [ids[start : start + length] for start in np.sort(chosen)]


def _padded(
    windows: list[np.ndarray], length: int, padding: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.full((len(windows), length), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.from_numpy(window)
        mask[row, : len(window)] = 1
    return ids, {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED_LABEL)}
