"""Which versions of packages are installed? For the attributes of runs, for manifests and reports."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions by the names of the distributions, without importing them; those not installed are left out."""
    found = {name: _version(name) for name in names}
    return {name: number for name, number in found.items() if number is not None}


@cache  # some milliseconds each, and they stay what they are while a program runs
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # an optional package
        return None


DEPTHSCOPE = package_versions(["depthscope"]).get("depthscope", "0+source")
"""The installed version of this package; ``"0+source"`` where the code runs without being installed."""
