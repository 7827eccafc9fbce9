"""Which files go into an sdist and a wheel? Real ones under `depthscope/`, whose folders are links in a checkout."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinkedFolders(BuildHookInterface):
    """Put `probes/`, `diagnostics/` and `app/` under `depthscope/`.

    hatchling visits a folder once, also when a link leads to it, so that `packages = ["depthscope"]` loses some. An sdist
    holds the folders where a wheel has them, and a wheel is built from a checkout as well as from an sdist.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name each folder, real, by its place in the package; an editable install points at the checkout instead."""
        root = Path(self.root)
        if version == "editable":
            # It is the checkout itself, whose `depthscope/__init__.py` refuses to be imported where the links are missing.
            spec = spec_from_file_location("depthscope", root / "depthscope" / "__init__.py")
            spec.loader.exec_module(module_from_spec(spec))
            return
        for name in ("probes", "diagnostics", "app"):
            source = root / name if (root / name).is_dir() else root / "depthscope" / name
            build_data["force_include"][str(source)] = f"depthscope/{name}"
