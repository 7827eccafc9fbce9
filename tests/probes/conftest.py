"""Small models and batches for every test of the probes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from tests.models.small_models import deepseek, llama, lucidrains

transformers.logging.set_verbosity_error()
torch.set_num_threads(
    1
)  # before anything is computed: sums differ in the last bit with the number of threads


@pytest.fixture(scope="session")
def models() -> dict[str, Callable[..., nn.Module]]:
    """Factories by name."""
    return {"llama": llama, "deepseek": deepseek, "lucidrains": lucidrains}


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def text_batch(ids) -> dict[str, torch.Tensor]:
    """Three sequences, the first one padded on the left and the second one on the right."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}
