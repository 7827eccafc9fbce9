"""Models larger than their weights: refused while they are built, whatever the setting is called."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from depthscope.probes.checkpoints.building_limits import (
    LONGEST_LIST,
    SPARE_MODULES,
    StoredSize,
    building_limits,
    check_numbers,
)
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.weight_files import stored_size

STORED = StoredSize(num_elements=10_000, num_tensors=20, largest_dimension=300)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**7},
        {"vocab_size": 10**12},
        {"n_anything": -(10**30)},
        {"text_config": {"deep": [{"layers": 2 * 10**6}]}},
        {"x": 10**400},
        {"x": -(10**400)},
        {"x": 1e18},
        {"max_position_embeddings": 10**15},
        {"layer_types": ["full_attention"] * (LONGEST_LIST + 1)},
    ],
)
def test_numbers_of_no_model(config):
    with pytest.raises(CheckpointError, match=r"^m: '\w+' (is|has)"):
        check_numbers(config, STORED, "m")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 61, "vocab_size": 300, "tie": True, "eps": 1e-5, "name": "x", "none": None},
        {"rope_theta": 500_000_000, "max_position_embeddings": 10_485_760, "bos_token_id": 2_000_000},
        {"time_step_limit": [0.0, float("inf")], "nan": float("nan"), "initializer_range": 0.02},
        {"layer_types": ["full_attention"] * 100},
    ],
)
def test_numbers_of_public_models(config):
    check_numbers(config, STORED, "m")
    with pytest.raises(CheckpointError, match="of_no_model"):
        check_numbers({**config, "of_no_model": 10**18}, STORED, "m")


def test_a_stored_dimension_allows_a_number_as_large():
    stored = StoredSize(10**9, 20, 3_000_000)
    check_numbers({"vocab_size": 3_000_000}, stored, "m")
    with pytest.raises(CheckpointError, match="vocab_size"):
        check_numbers({"vocab_size": 3_000_000_000}, stored, "m")


def test_nesting_has_an_end():
    config: dict = {}
    for _ in range(200):
        config = {"a": config}
    with pytest.raises(CheckpointError, match="nested too deeply"):
        check_numbers(config, STORED, "m")


def test_parameters_without_data_are_counted():
    with torch.device("meta"), building_limits(STORED, "m"):
        nn.Linear(100, 100)
        with pytest.raises(CheckpointError, match=r"'m': .* more than \d+ elements in parameters"):
            nn.Linear(10**9, 10**9)
        with pytest.raises(CheckpointError, match="elements in parameters"):
            nn.ModuleList([nn.Linear(100, 100) for _ in range(10**7)])


def test_buffers_and_modules_are_counted():
    with torch.device("meta"), building_limits(STORED, "m"):
        with pytest.raises(CheckpointError, match="elements in buffers"):
            nn.Module().register_buffer("mask", torch.ones(10**6, 10**6))
        with pytest.raises(CheckpointError, match=r"more than \d+ modules"):
            nn.ModuleList([nn.Identity() for _ in range(2 * SPARE_MODULES)])


def test_nothing_is_counted_afterwards_or_in_other_threads():
    made: list[nn.Module] = []
    with torch.device("meta"):
        with building_limits(STORED, "m"):
            other = threading.Thread(target=lambda: made.append(nn.Linear(1 << 11, 1 << 11)))
            other.start()
            other.join()
        nn.Linear(10**5, 10**5)
    assert len(made) == 1
    assert not torch.nn.modules.module._global_parameter_registration_hooks


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_packed_weights_count_as_what_they_unpack_to(tmp_path, suffix):
    """GPTQ keeps eight weights of four bits in an int32, and the model is first built with all of them."""
    tensors = {"packed": torch.zeros(100, dtype=torch.int32), "scale": torch.zeros(10)}
    file = tmp_path / f"m.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    assert stored_size([file]).num_elements >= 8 * 100 + 10
