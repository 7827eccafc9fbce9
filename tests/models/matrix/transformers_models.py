"""Which model of transformers stands for a type, and how is a tiny one built?"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.models.matrix import inputs
from tests.models.matrix.cases import SEQUENCES, TOKENS, Case, NotBuildable, Subject
from tests.models.matrix.expectations import PLAIN, TRANSFORMERS
from tests.models.matrix.fixes import CLASSES, FIXES
from tests.models.matrix.shrinking import tiny

MOST_PARAMETERS = 30_000_000
# What a type is used for most comes first: a language model before its bare trunk.
PREFERRED = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


def transformers_cases() -> list[Case]:
    """One for every model type of transformers."""
    return [
        Case("transformers", name, partial(subjects, name), TRANSFORMERS.get(name, PLAIN)) for name in types()
    ]


def subjects(model_type: str, seed: int) -> list[Subject]:
    """The model of a type with the first batch that it takes, and where it takes images among text, with them too."""
    errors = []
    for light in (False, True):
        try:
            model = build(model_type, seed, light=light)
            recipe = inputs.fitting(model, inputs.recipes(model), SEQUENCES, TOKENS)
        except NotBuildable as error:
            errors.append(str(error))
        else:
            break
    else:
        raise NotBuildable("; with its own widths: ".join(errors))
    images = inputs.with_images(model, recipe, SEQUENCES, TOKENS)
    chosen = {"": recipe} | ({"with images": images} if images else {})
    return [
        Subject(note, model, partial(inputs.batch_of, model, each), each) for note, each in chosen.items()
    ]


def types() -> list[str]:
    """Every model type that transformers has, by name."""
    return sorted(CONFIG_MAPPING_NAMES)


def mappings() -> list[dict[str, Any]]:
    others = [
        name for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES") and name.startswith("MODEL_")
    ]
    return [getattr(modeling_auto, name) for name in (*PREFERRED, *sorted(set(others) - set(PREFERRED)))]


def class_of(model_type: str) -> type[nn.Module]:
    """The class that stands for a type."""
    config_class = CONFIG_MAPPING[model_type]
    names = [CLASSES[model_type]] if model_type in CLASSES else []
    for mapping in mappings():
        found = mapping.get(model_type)
        names += list(found) if isinstance(found, (list, tuple)) else [found] if found else []
    known = [getattr(transformers, name, None) for name in names]
    classes = [c for c in known if isinstance(c, type) and issubclass(c, nn.Module)]
    # The language model in a table may be that of a part, which another configuration builds.
    fitting = [c for c in classes if model_type in CLASSES or c.config_class is config_class]
    if fitting or classes:
        return (fitting or classes)[0]
    # A part of other models, such as a vision tower, is in no table, but its classes name their configuration.
    place = config_class.__module__.replace("configuration_", "modeling_")
    if importlib.util.find_spec(place) is None:
        raise NotBuildable("it has no model of its own in transformers")
    module = importlib.import_module(place)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, transformers.PreTrainedModel)
        and value.config_class is config_class
        and not value.__name__.endswith("PreTrainedModel")
    ]
    if not own:
        raise NotBuildable("no class of a model has this configuration")
    # The bare model comes before heads for tasks.
    return min(own, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))


def build(model_type: str, seed: int, *, light: bool = False) -> nn.Module:
    """A tiny model of a type with generic weights, in evaluation mode."""
    try:
        model_class = class_of(model_type)
    except (ImportError, AttributeError, KeyError) as error:
        raise NotBuildable(f"{type(error).__name__}: {error}") from error
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = tiny(config_class, FIXES.get(model_type), light=light)
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class._from_config(config).parameters())
        if count > MOST_PARAMETERS:
            raise NotBuildable(f"{count:,} parameters after shrinking")
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation=None).eval()
    except NotBuildable:
        raise
    except Exception as error:
        raise NotBuildable(f"{type(error).__name__}: {error}") from error
    return generic(model, seed)


def generic(model: nn.Module, seed: int) -> nn.Module:
    """The model with noise on every weight: a branch that starts at zero would hide a wrong reading."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model
