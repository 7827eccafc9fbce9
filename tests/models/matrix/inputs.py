"""What does a forward take? Batches made from its signature, of any number of sequences and tokens."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from tests.models.matrix.cases import NotBuildable
from tests.models.matrix.shrinking import LARGEST_ORDINARY_TOKEN, WIDTH

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
        return first(
            self.config,
            "num_mel_bins",
            "n_mels",
            "input_feat_per_channel",
            "feature_size",
            "input_dim",
            default=16,
        )


def _boxes(make: Maker) -> torch.Tensor:
    low = torch.randint(0, 50, (make.b, make.t, 2), generator=make.generator)
    return torch.cat([low, low + 10], -1)


# One way a name, or several that are tried in this order.
WAYS: dict[str, tuple[Callable[[Maker], Any], ...]] = {
    "input_ids": (lambda m: m.ids(m.t),),
    "decoder_input_ids": (
        lambda m: m.ids(9),
        lambda m: m.ids(9).repeat_interleave(first(m.config, "num_codebooks", default=1), 0),
    ),
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
    "inputs_embeds": (
        lambda m: m.floats(m.b, m.t, first(m.config, "hidden_size", "d_model", "n_embd", default=32)),
    ),
    "flattened_patches": (
        lambda m: m.floats(m.b, m.t, first(m.config, "patch_embed_hidden_size", default=32) + 2),
    ),
    "past_values": (
        lambda m: m.floats(
            m.b,
            first(m.config, "context_length", default=32),
            first(m.config, "num_input_channels", default=1),
        ),
        lambda m: m.floats(m.b, first(m.config, "context_length", default=32)),
    ),
    "inputs": (lambda m: m.ids(m.t), lambda m: m.floats(m.b, m.t, 32)),
}
IMAGES_OR_SOUND = ("pixel_values", "input_features")
IMAGE_TOKENS = ("image_token_id", "image_token_index", "img_token_id", "image_patch_id")


def _packed(make: Maker) -> torch.Tensor:
    """Patches of all images one behind the other, for the grids of `_grids`."""
    patch = first(make.config, "patch_size", default=8)
    frames = first(make.config, "temporal_patch_size", default=1)
    return make.floats(make.b * 16, make.channels() * frames * patch * patch)


def _grids(make: Maker) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * make.b)


def _ones(make: Maker) -> torch.Tensor:
    return torch.ones(make.b, make.t, dtype=torch.long)


# Names that mean this only where another one is required too.
WITH: dict[str, dict[str, Callable[[Maker], Any]]] = {
    "grid_thw": {"hidden_states": _packed, "pixel_values": _packed, "grid_thw": _grids},
    "image_grid_thw": {"hidden_states": _packed, "pixel_values": _packed, "image_grid_thw": _grids},
    "merge_sizes": {"merge_sizes": lambda m: torch.full((m.b,), 2)},
    "input_features_mask": {"input_features_mask": _ones},
    "attention_mask": {"attention_mask": _ones},
    "context_input_ids": {},
    "past_values_padding": {"past_values_padding": lambda m: torch.zeros(m.b, 32)},
    "freq": {"freq": lambda m: torch.zeros(m.b, 1, dtype=torch.long)},
    "spatial_shapes": {
        "pixel_values": lambda m: m.floats(
            m.b, 16, m.channels() * first(m.config, "patch_size", default=8) ** 2
        ),
        "spatial_shapes": lambda m: torch.tensor([[4, 4]] * m.b),
        "pixel_attention_mask": lambda m: torch.ones(m.b, 16, dtype=torch.long),
    },
    "qformer_input_ids": {"qformer_input_ids": lambda m: m.ids(5)},
    "task_inputs": {"task_inputs": lambda m: m.ids(5)},
    "action_embeds": {"action_embeds": lambda m: m.floats(m.b, 5, 32)},
}


def recipes(model: nn.Module) -> Iterator[str]:
    """Names of batches to try, the most promising first; `batch_of` makes them, in any size."""
    make = Maker(model, 1, 1)
    takes = [name for name in WAYS if name in make.parameters]
    needed = [name for name in takes if name in required_of(make)]
    main = getattr(model, "main_input_name", "input_ids")
    lead = [main] if main in takes else takes[:1]
    more = [name for name in ("decoder_input_ids", "bbox") if name in takes]
    orders = [[*lead, *needed, *more], [*lead, *needed]]
    orders += [
        ["input_ids", name, *needed, *more] for name in IMAGES_OR_SOUND if {name, "input_ids"} <= set(takes)
    ]
    orders += [[name, *needed] for name in takes]
    for order in dict.fromkeys(tuple(dict.fromkeys(order)) for order in orders if order):
        for way in range(max(len(WAYS[name]) for name in order)):
            yield f"{'+'.join(order)}#{way}"


def fitting(model: nn.Module, candidates: Iterable[str], sequences: int, tokens: int) -> str:
    """The first recipe whose batch the model takes.

    Raises
    ------
    NotBuildable
        With what each of them ended in.
    """
    errors = []
    for recipe in candidates:
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                model(**batch_of(model, recipe, sequences, tokens))
        except Exception as error:
            errors.append(f"{recipe}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        else:
            return recipe
    raise NotBuildable(" | ".join(errors) or "no argument of its forward is known here")


def with_images(model: nn.Module, recipe: str, sequences: int, tokens: int) -> str | None:
    """The recipe of the same batch with images among the text, where the model takes one."""
    make = Maker(model, sequences, tokens)
    if "pixel_values" not in make.parameters or "input_ids" not in recipe or "pixel_values" in recipe:
        return None
    if first(make.config, *IMAGE_TOKENS) is None:
        return None
    named = recipe.partition("#")[0].replace("input_ids", "input_ids+pixel_values", 1)
    for way in (0, 1):
        try:
            return fitting(model, [f"{named}#{way}@{tokens // 2}"], sequences, tokens)
        except NotBuildable as error:
            # The models themselves tell how many places the features of the images take.
            told = re.search(r"features:? (\d+)|(\d+) (?:image )?features", str(error))
            count = int(next(filter(None, told.groups()))) if told else 0
        for each in (count / sequences, count / sequences / WIDTH):  # some count places, others numbers
            if each.is_integer() and 0 < each < tokens:
                with contextlib.suppress(NotBuildable):
                    return fitting(model, [f"{named}#{way}@{int(each)}"], sequences, tokens)
    return None


def batch_of(model: nn.Module, recipe: str, sequences: int, tokens: int) -> Batch:
    """The batch of a recipe: ``names of arguments#which of the ways@number of places of an image``."""
    named, _, places = recipe.partition("@")
    names, _, way = named.partition("#")
    make = Maker(model, sequences, tokens)
    found = {name: WAYS[name][min(int(way), len(WAYS[name]) - 1)](make) for name in names.split("+") if name}
    asked = required_of(make)
    if places and "image_grid_thw" in make.parameters:
        asked.append("image_grid_thw")
    for name in asked:
        special = WITH.get(name, {})
        found |= {key: way_of(make) for key, way_of in special.items() if key in found or key == name}
    if places:
        found["input_ids"][:, 1 : 1 + int(places)] = first(make.config, *IMAGE_TOKENS)
    # Without a cache: some hybrids can only make one where a block has full attention.
    if "use_cache" in make.parameters:
        found["use_cache"] = False
    return found


def required_of(make: Maker) -> list[str]:
    """Arguments of the forward without a default."""
    return [
        name
        for name, p in make.parameters.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
