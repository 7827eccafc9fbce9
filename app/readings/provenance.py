"""Which software made this? Versions, for manifests, reports and the command line."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("numpy", "scipy", "xarray", "pandas", "matplotlib")


def depthscope_version() -> str:
    """The installed version.

    Returns
    -------
    str
        ``"0+source"`` where the code runs without being installed.
    """
    return _version("depthscope") or "0+source"


def software() -> dict[str, str]:
    """Versions of depthscope and of the libraries that compute and draw.

    Returns
    -------
    dict of str to str
        Libraries that are absent are left out.
    """
    known = {name: _version(name) for name in _LIBRARIES}
    return {"depthscope": depthscope_version()} | {name: found for name, found in known.items() if found}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
