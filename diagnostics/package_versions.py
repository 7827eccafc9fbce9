"""Which versions of packages are installed? For the attributes of runs, for manifests and reports."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions by the names of the distributions, without importing them; those not installed are left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # an optional package
            continue
    return versions
