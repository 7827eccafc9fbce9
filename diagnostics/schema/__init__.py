"""What is a run? Its groups, variables and attributes, their validation, and runs on disk."""

from depthscope.diagnostics.schema.attributes import storable_attributes
from depthscope.diagnostics.schema.groups import COMPLETE, GROUPS, by_chain, chain_dataset, chains
from depthscope.diagnostics.schema.live_rows import FINDINGS, LOG, LiveRows, Status
from depthscope.diagnostics.schema.live_store import is_being_written, is_live_store, newest_state
from depthscope.diagnostics.schema.opening import (
    POOLED_STEP,
    RESUMED_AT,
    list_runs,
    open_group,
    open_run,
    open_tree,
)
from depthscope.diagnostics.schema.saving import (
    LIVE,
    SUFFIXES,
    require_replaceable,
    save_run,
    short_names,
    without_suffix,
    write_zip,
)
from depthscope.diagnostics.schema.validation import (
    SCHEMA_VERSION,
    SchemaError,
    create_run,
    validate,
)
from depthscope.diagnostics.schema.variables import (
    COEFFICIENTS,
    CUT_GRADIENT,
    FROZEN_MODULES,
    GAIN,
    MOTION,
    NOT_FINITE,
    OF_ATTENTION,
    OF_STREAMS,
    OF_WEIGHTS,
    PLAIN_FACTORS,
    PROFILE,
    PROVEN,
    QUERY,
    STATE,
    STATISTICS,
    SUMMED,
    SUMS_OF_COEFFICIENTS,
    TRACE,
    TRACE_COORDS,
    UNPROVEN,
    WITHOUT_GRADIENT,
    Variable,
)
