"""What does a forward take? Batches made from its signature, of any number of sequences and tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.models.matrix.shrinking import LARGEST_ORDINARY_TOKEN

Batch = dict[str, Any]


def fields(config: Any, name: str) -> list[Any]:
    """The values of a field in a configuration and in its parts."""
    own = [getattr(config, name)] if getattr(config, name, None) is not None else []
    parts = [value for value in vars(config).values() if hasattr(value, "to_dict") and value is not config]
    return own + [value for part in parts for value in fields(part, name)]


def first(config: Any, *names: str, default: Any = None) -> Any:
    for name in names:
        found = fields(config, name)
        if found:
            return found[0]
    return default


class Maker:
    """Makes tensors for arguments by their names.

    Parameters
    ----------
    model : Module
        Of transformers.
    sequences, tokens : int
        Sizes of the batch.
    """

    def __init__(self, model: nn.Module, sequences: int, tokens: int):
        self.config: Any = model.config
        self.b, self.t = sequences, tokens
        self.generator = torch.Generator().manual_seed(7)
        self.parameters = inspect.signature(model.forward).parameters

    def ids(self, length: int) -> torch.Tensor:
        # From 3: the lower ones are padding and the marks of begin and end, which some models mask or treat alone.
        return torch.randint(3, LARGEST_ORDINARY_TOKEN, (self.b, length), generator=self.generator)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def side(self) -> tuple[int, int]:
        size = first(self.config, "image_size", "img_size", "input_size", default=32)
        if isinstance(size, dict):
            size = (size.get("height", 32), size.get("width", 32))
        size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        return size[-2:] if len(size) >= 2 else (size[0], size[0])

    def channels(self) -> int:
        return first(self.config, "num_channels", "in_channels", "in_chans", default=3)

    def images(self) -> torch.Tensor:
        return self.floats(self.b, self.channels(), *self.side())

    def video(self) -> torch.Tensor:
        frames = first(self.config, "num_frames", "frames_per_clip", default=2)
        return self.floats(self.b, frames, self.channels(), *self.side())

    def mel(self) -> int:
        return first(self.config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_dim", default=16)


def _boxes(make: Maker) -> torch.Tensor:
    low = torch.randint(0, 50, (make.b, make.t, 2), generator=make.generator)
    return torch.cat([low, low + 10], -1)


# One way a name, or several that are tried in this order.
WAYS: dict[str, tuple[Callable[[Maker], Any], ...]] = {
    "input_ids": (lambda m: m.ids(m.t),),
    "decoder_input_ids": (lambda m: m.ids(9),),
    "pixel_values": (lambda m: m.images(), lambda m: m.video()),
    "pixel_values_videos": (lambda m: m.video(),),
    "input_features": (
        lambda m: m.floats(m.b, m.t, m.mel()),
        lambda m: m.floats(m.b, m.mel(), 2 * m.t),
        lambda m: m.floats(m.b, m.mel(), 2 * first(m.config, "max_source_positions", default=m.t)),
    ),
    "input_values": (
        lambda m: m.floats(m.b, 320 * m.t),
        lambda m: m.floats(m.b, 1, 320 * m.t),
        lambda m: m.floats(m.b, first(m.config, "max_length", default=m.t), m.mel()),
        lambda m: m.floats(m.b, m.t, m.mel()),
    ),
    "audio_values": (lambda m: m.floats(m.b, 1, 320 * m.t), lambda m: m.floats(m.b, 320 * m.t)),
    "bbox": (_boxes,),
    "hidden_states": (
        lambda m: m.floats(m.b, m.t, first(m.config, "hidden_size", "d_model", "dim", default=32)),
        lambda m: m.floats(m.b, first(m.config, "hidden_size", "embed_dim", default=32), 8, 8),
    ),
    "inputs_embeds": (lambda m: m.floats(m.b, m.t, first(m.config, "hidden_size", "d_model", "n_embd", default=32)),),
    "past_values": (
        lambda m: m.floats(m.b, first(m.config, "context_length", default=32), first(m.config, "num_input_channels", default=1)),
        lambda m: m.floats(m.b, first(m.config, "context_length", default=32)),
    ),
    "inputs": (lambda m: m.ids(m.t), lambda m: m.floats(m.b, m.t, 32)),
}
MAIN = tuple(WAYS)


def batches(model: nn.Module, sequences: int, tokens: int) -> Iterator[tuple[str, Batch]]:
    """Batches to try, the most promising first, each with a name by which it can be made again in another size."""
    make = Maker(model, sequences, tokens)
    takes = [name for name in MAIN if name in make.parameters]
    required = {
        name
        for name, p in make.parameters.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    main = getattr(model, "main_input_name", "input_ids")
    orders: list[list[str]] = []
    lead = [main] if main in takes else takes[:1]
    more = [n for n in ("decoder_input_ids", "bbox") if n in takes and n not in lead]
    needed = [n for n in takes if n in required]
    orders.append(list(dict.fromkeys([*lead, *needed, *more])))
    orders.append(list(dict.fromkeys([*lead, *needed])))
    if "pixel_values" in takes and "input_ids" in takes:
        orders.append(list(dict.fromkeys(["input_ids", "pixel_values", *needed, *more])))
    if "input_features" in takes and "input_ids" in takes:
        orders.append(list(dict.fromkeys(["input_ids", "input_features", *needed])))
    for name in takes:
        orders.append(list(dict.fromkeys([name, *needed])))
    seen = set()
    for order in orders:
        if tuple(order) in seen or not order:
            continue
        seen.add(tuple(order))
        for way in range(max(len(WAYS[n]) for n in order)):
            yield f"{'+'.join(order)}#{way}", batch_of(model, f"{'+'.join(order)}#{way}", sequences, tokens)


def batch_of(model: nn.Module, recipe: str, sequences: int, tokens: int) -> Batch:
    """The batch of a recipe that `batches` has named."""
    names, _, way = recipe.partition("#")
    make = Maker(model, sequences, tokens)
    return {name: WAYS[name][min(int(way), len(WAYS[name]) - 1)](make) for name in names.split("+")}
