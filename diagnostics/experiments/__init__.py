"""Which experiments are there, what do their results mean, and which one settles a finding? Without torch."""

from depthscope.diagnostics.experiments.intervals import estimate, estimated, share_of
from depthscope.diagnostics.experiments.kinds import (
    KINDS,
    consequence_words,
    experiment_for,
    kind_named,
)
from depthscope.diagnostics.experiments.results import (
    RESULTS,
    base_loss,
    open_result,
    patch_rows,
    prediction_words,
    result_for,
    result_path,
    results_beside,
    save_result,
    table_rows,
)
from depthscope.diagnostics.experiments.variables import CELLS, EFFECTS, LENS, PATCHES, declared

__all__ = [
    "CELLS",
    "EFFECTS",
    "KINDS",
    "LENS",
    "PATCHES",
    "RESULTS",
    "base_loss",
    "consequence_words",
    "declared",
    "estimate",
    "estimated",
    "experiment_for",
    "kind_named",
    "open_result",
    "patch_rows",
    "prediction_words",
    "result_for",
    "result_path",
    "results_beside",
    "save_result",
    "share_of",
    "table_rows",
]
