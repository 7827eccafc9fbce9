"""Which software made this? Versions, for manifests, reports and the command line."""

from __future__ import annotations

from depthscope.diagnostics.package_versions import package_versions

# Those that compute or draw what a report and a bundle show.
_PACKAGES = ("depthscope", "numpy", "scipy", "xarray", "pandas", "matplotlib")


def depthscope_version() -> str:
    """The installed version.

    Returns
    -------
    str
        ``"0+source"`` where the code runs without being installed.
    """
    return software()["depthscope"]


def software() -> dict[str, str]:
    """Versions of depthscope and of the packages that compute and draw.

    Returns
    -------
    dict of str to str
        Packages that are absent are left out.
    """
    return {"depthscope": "0+source", **package_versions(_PACKAGES)}
