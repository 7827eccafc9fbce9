"""Which software made this? Versions, for manifests, reports and the command line."""

from __future__ import annotations

from depthscope.diagnostics.package_versions import package_versions

_LIBRARIES = ("numpy", "scipy", "xarray", "pandas", "matplotlib")


def depthscope_version() -> str:
    """The installed version.

    Returns
    -------
    str
        ``"0+source"`` where the code runs without being installed.
    """
    return package_versions(["depthscope"]).get("depthscope", "0+source")


def software() -> dict[str, str]:
    """Versions of depthscope and of the libraries that compute and draw.

    Returns
    -------
    dict of str to str
        Libraries that are absent are left out.
    """
    return {"depthscope": depthscope_version(), **package_versions(_LIBRARIES)}
