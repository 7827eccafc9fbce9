"""Which versions of packages are installed, and from where is this one? For attributes, manifests, reports and hints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


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


def install_command(extra: str) -> str:
    """The command that adds an extra to this installation, from the place that it was installed from.

    By the name alone only where it came from an index: elsewhere that name is nobody's, or somebody else's.
    """
    try:
        origin = distribution("depthscope").read_text("direct_url.json")  # PEP 610; an index leaves none
    except PackageNotFoundError:  # on the path and not installed: a checkout
        root = Path(__file__).resolve().parents[1]
        origin = json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}})
    if origin is None:
        return f"pip install {shlex.quote(f'depthscope[{extra}]')}"
    place = json.loads(origin)
    url = place["url"]
    if place.get("dir_info", {}).get("editable"):
        checkout = url2pathname(urlsplit(url).path)
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    scheme = f"{place['vcs_info']['vcs']}+" if "vcs_info" in place else ""
    return f"pip install {shlex.quote(f'depthscope[{extra}] @ {scheme}{url}')}"
