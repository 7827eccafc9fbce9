"""Synthetic runs for every test: small, exact, without torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import xarray as xr

from tests.models.synthetic_run import synthetic_run


@pytest.fixture(scope="session")
def make_run() -> Callable[..., xr.DataTree]:
    """The factory ``make_run(family, layers=…, …)``."""
    return synthetic_run


@pytest.fixture(scope="session")
def residual_run() -> xr.DataTree:
    return synthetic_run("residual")


@pytest.fixture(scope="session")
def hc_run() -> xr.DataTree:
    return synthetic_run("hc")


@pytest.fixture(scope="session")
def mhc_run() -> xr.DataTree:
    return synthetic_run("mhc")
