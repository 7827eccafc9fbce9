"""What is a run? Its groups, variables and attributes, their validation, and runs on disk."""

from depthscope.diagnostics.schema.creation import Parts, create_run
from depthscope.diagnostics.schema.formats import SUFFIXES
from depthscope.diagnostics.schema.groups import GROUPS, chain_dataset, chains
from depthscope.diagnostics.schema.listing import list_runs
from depthscope.diagnostics.schema.opening import integrity, open_run
from depthscope.diagnostics.schema.replaceable import require_replaceable
from depthscope.diagnostics.schema.saving import save_run
from depthscope.diagnostics.schema.validation import (
    PROVEN,
    SCHEMA_VERSION,
    UNPROVEN,
    SchemaError,
    check_version,
    is_proof,
    validate,
)
from depthscope.diagnostics.schema.variables import (
    COVERAGE,
    CUT_GRADIENT,
    FROZEN_MODULES,
    GAIN,
    MOTION,
    NOT_FINITE,
    OF_STREAMING,
    OF_WEIGHTS,
    OVER_DEPTH,
    PLAIN_FACTORS,
    PROFILE,
    ROUTE,
    SITES,
    SPECTRUM,
    STATE,
    STATISTICS,
    STREAM_SPECTRUM,
    TRACE,
    TRACE_COORDS,
    WITHOUT_GRADIENT,
    Variable,
)

__all__ = [
    "COVERAGE",
    "CUT_GRADIENT",
    "FROZEN_MODULES",
    "GAIN",
    "GROUPS",
    "MOTION",
    "NOT_FINITE",
    "OF_STREAMING",
    "OF_WEIGHTS",
    "OVER_DEPTH",
    "PLAIN_FACTORS",
    "PROFILE",
    "PROVEN",
    "ROUTE",
    "SCHEMA_VERSION",
    "SITES",
    "SPECTRUM",
    "STATE",
    "STATISTICS",
    "STREAM_SPECTRUM",
    "SUFFIXES",
    "TRACE",
    "TRACE_COORDS",
    "UNPROVEN",
    "WITHOUT_GRADIENT",
    "Parts",
    "SchemaError",
    "Variable",
    "chain_dataset",
    "chains",
    "check_version",
    "create_run",
    "integrity",
    "is_proof",
    "list_runs",
    "open_run",
    "require_replaceable",
    "save_run",
    "validate",
]
