"""What happens to the signal on its way through the depth of a network, forward and backward.

The public names, each loaded when it is first used: importing this package costs no torch, and a saved run is opened,
analysed and judged without it.

    import depthscope as ds

    run = ds.capture(model, batch, gradients=True)
    analysis = ds.analyze(run)
    findings = ds.judge(analysis)
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthscope import app, diagnostics, probes
    from depthscope.app.paper import figures
    from depthscope.diagnostics import (
        CATALOGUE,
        DepthscopeError,
        Finding,
        SchemaError,
        Severity,
        analyze,
        judge,
        kernels,
        metrics,
        open_run,
        save_run,
        training_curves,
        validate,
        with_replay,
    )
    from depthscope.probes import (
        CaptureError,
        ChainError,
        LayoutError,
        ProbeWarning,
        ReconstructionError,
        Recorder,
        SiteError,
        StreamConnectionError,
        TrainingStopped,
        capture,
        describe,
        describe_weights,
        initial_logits,
        interventions,
        probe_checkpoints,
        record,
        settle,
    )
    from depthscope.probes.checkpoints.load import load_checkpoint as load
    from depthscope.probes.jacobian import jacobian
    from depthscope.probes.lens import lens

_ROOMS = ("app", "diagnostics", "probes")
_BROKEN = [room for room in _ROOMS if not os.path.isdir(os.path.join(os.path.dirname(__file__), room))]
if _BROKEN and os.path.isfile(__file__):  # in a zip archive nothing is a folder, and all is there
    raise ImportError(
        f"in {os.path.dirname(__file__)} the links {', '.join(_BROKEN)} are no folders: this checkout was written without "
        "symbolic links (core.symlinks=false, or an unpacked zip) and cannot be imported from where it is. Either install a "
        "copy of it: pip install . (without -e); or get the links, in a clone: git config core.symlinks true && "
        "git checkout -- depthscope (Windows needs its developer mode for links)"
    )

# What a saved run needs: its names are loaded without torch. Every other public name is of `probes`.
_DIAGNOSTICS = (
    *("analyze", "judge", "Finding", "Severity", "CATALOGUE", "training_curves", "with_replay"),
    *("open_run", "save_run", "validate", "DepthscopeError", "SchemaError", "kernels", "metrics"),
)

__all__ = [
    "CATALOGUE",
    "CaptureError",
    "ChainError",
    "DepthscopeError",
    "Finding",
    "LayoutError",
    "ProbeWarning",
    "ReconstructionError",
    "Recorder",
    "SchemaError",
    "Severity",
    "SiteError",
    "StreamConnectionError",
    "TrainingStopped",
    "analyze",
    "app",
    "capture",
    "describe",
    "describe_weights",
    "diagnostics",
    "figures",
    "initial_logits",
    "interventions",
    "jacobian",
    "judge",
    "kernels",
    "lens",
    "load",
    "metrics",
    "open_run",
    "probe_checkpoints",
    "probes",
    "record",
    "save_run",
    "settle",
    "training_curves",
    "validate",
    "with_replay",
]


# Type checkers read the imports above; for them an unknown name must stay an error.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        try:
            return _load(name)
        except ModuleNotFoundError as error:
            from depthscope.app.cli.main import missing_extra
            from depthscope.diagnostics.errors import MissingExtraError

            needed = missing_extra(f"depthscope.{name}", error)
            if needed is None:
                raise
            raise MissingExtraError(needed, name=error.name) from error

    def _load(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"depthscope.{name}")
        if name in ("jacobian", "lens"):  # `probes.jacobian` is the room, and its verb is in it
            return getattr(importlib.import_module(f"depthscope.probes.{name}"), name)
        if name == "load":
            return importlib.import_module("depthscope.probes.checkpoints.load").load_checkpoint
        if name == "figures":  # needs the extra `paper`
            return importlib.import_module("depthscope.app.paper.figures")
        if name == "interventions":
            return importlib.import_module("depthscope.probes.interventions")
        if name in __all__:
            room = "diagnostics" if name in _DIAGNOSTICS else "probes"
            return getattr(importlib.import_module(f"depthscope.{room}"), name)
        raise AttributeError(
            f"module 'depthscope' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )


# In a notebook the classes of this project show themselves; elsewhere nothing is imported for it. Without the extra that has
# the templates they are printed as text.
if "IPython" in sys.modules:
    with contextlib.suppress(ImportError):
        importlib.import_module("depthscope.app.text.notebook").show_in_notebooks()


def __dir__() -> list[str]:
    return list(__all__)
