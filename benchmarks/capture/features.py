"""What do peers have, and by which name? Looked up where they are installed: ``python -m benchmarks.capture.features``."""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.shared import tables

# What is done, by which name here, and by which names of peers; a peer that has none among its public names is not listed.
FEATURES: dict[str, tuple[str, ...]] = {
    "states by depth, of a module or site that is named": (
        "depthscope.capture",
        "transformer_lens.model_bridge.TransformerBridge.run_with_cache",
        "nnsight.NNsight.trace",
        "torchlens.extract",
        "captum.attr.LayerActivation",
        "pyvene.IntervenableModel",
    ),
    "which modules those are, found and proven": ("depthscope.describe",),
    "gradients at them": (
        "depthscope.capture",
        "transformer_lens.model_bridge.TransformerBridge.run_with_cache",
        "nnsight.NNsight.trace",
        "captum.attr.LayerGradientXActivation",
    ),
    "streams with H_res, H_pre, H_post": ("depthscope.capture", "innards.mHC"),
    "weights of reads over depth": ("depthscope.capture",),
    "exact statistics over a training, states not kept": (
        "depthscope.record",
        "torchlens.stats.aggregate",
        "torchinstruments.inject_observer",
    ),
    "findings with limits": (
        "depthscope.judge",
        "neural_observatory.GradientHealthAnalyzer",
        "weightwatcher.WeightWatcher.analyze",
    ),
    "a finding tried by an experiment on the model": ("depthscope.settle",),
    "states of one input put into another": (
        "depthscope.interventions.patch",
        "transformer_lens.patching.generic_activation_patch",
        "nnsight.NNsight.edit",
        "torchlens.patch_from",
        "pyvene.VanillaIntervention",
    ),
    "single streams and H_res put into another": ("depthscope.interventions.patch",),
    "parts left out": (
        "depthscope.interventions.ablate",
        "torchlens.zero_ablate",
        "captum.attr.LayerFeatureAblation",
        "pyvene.ZeroIntervention",
    ),
    "CKA": ("depthscope.metrics.cka", "torchlens.stats.cka", "cka.compute_cka"),
    "statistical tests of RSA models": ("rsatoolbox.inference.eval_fixed",),
    "effective dimension": (
        "depthscope.metrics.effective_rank",
        "torchlens.repgeom.effective_dimensionality",
    ),
    "spectra of weights, their tails": ("weightwatcher.WeightWatcher.analyze",),
    "attribution to inputs": ("captum.attr.IntegratedGradients", "torchlens.attribution"),
    "a graph of every operation": ("torchlens.Trace",),
    "a view in the browser": (
        "depthscope.app.dashboard",
        "innards.view",
        "neural_observatory.HTMLReporter",
        "torchinstruments.TensorBoardSink",
    ),
    "figures, tables and text for a paper": ("depthscope.app.paper",),
}
PACKAGES = {"cka": "pytorch-cka"}  # imported by another name than it is installed by
NOT_TO_BE_HAD = "netrep, LIM and baukit are not on PyPI, and were not looked at."


def resolved(path: str) -> bool:
    """Whether a dotted name is there."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def version_of(path: str) -> str | None:
    """The installed version of the package that a name is of."""
    package = path.partition(".")[0]
    try:
        return metadata.version(PACKAGES.get(package, package).replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def page() -> str:
    """The table, with the versions in which the names were found."""
    peers = sorted({path.partition(".")[0] for paths in FEATURES.values() for path in paths} - {"depthscope"})
    versions = {PACKAGES.get(name, name).replace("_", "-"): version_of(name) for name in peers}
    rows = []
    for what, paths in FEATURES.items():
        own = [f"`{path.partition('.')[2]}`" for path in paths if path.startswith("depthscope")]
        others = [f"`{path}`" for path in paths if not path.startswith("depthscope")]
        rows.append([what, ", ".join(own) or "–", "; ".join(others) or "–"])
    table = tables.as_markdown(("What each has", ["", "depthscope", "others"], rows), level=2)
    found = ", ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items())
    return (
        f"{table}\nEach name was looked up in its package ({found}). A dash: none was found among the public names of these "
        f"packages; nnsight, pyvene and torchlens are languages in which much more can be written. {NOT_TO_BE_HAD}\n"
    )


def main() -> int:
    """Print the table, or write it; 1 where a name of an installed package is not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="write the part of docs/benchmarks.md")
    arguments = parser.parse_args()
    missing = [
        path for paths in FEATURES.values() for path in paths if version_of(path) and not resolved(path)
    ]
    if arguments.markdown and not missing:
        tables.put_section(arguments.markdown, "benchmarks.capture.features", page())
    sys.stdout.write(page() if not missing else "not found: " + ", ".join(missing) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
