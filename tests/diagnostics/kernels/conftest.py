"""Both array kinds for every test that asks for one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def _numpy(x, dtype="float64"):
    return np.asarray(x, dtype=dtype)


def _torch(x, dtype="float64"):
    return torch.asarray(np.asarray(x), dtype=getattr(torch, dtype))


@pytest.fixture(params=[_numpy, _torch], ids=["numpy", "torch"])
def array(request) -> Callable:
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20261124)
