"""What is each operation to a residual memory? One table: what it adds up, what it multiplies, where its elements go.

An operation carries a memory when, everything else frozen, it is linear in it, treats all features alike and mixes no
tokens. What is in none of these groups is opaque: a branch begins there.
"""

from __future__ import annotations

from typing import Any

from depthscope.probes.reading.graph import Graph, TracedValue, names, values_in

SAME = names("alias detach clone contiguous _to_copy to lift_fresh lift_fresh_copy neg positive")
VIEWS = names("view _unsafe_view reshape _reshape_alias flatten unflatten")
MOVES = VIEWS | names(
    "permute transpose t mT movedim unsqueeze squeeze expand repeat slice narrow split split_with_sizes chunk select "
    "unbind index_select index gather tile repeat_interleave diagonal unfold constant_pad_nd"
)
# The positions of what is added up.
SUMS: dict[str, tuple[int, ...]] = {
    "add": (0, 1), "sub": (0, 1), "rsub": (0, 1), "where": (1, 2), "lerp": (0, 1), "masked_fill": (0, 2),
}  # fmt: skip
# The positions of what is written into, and of what is written.
SCATTERS: dict[str, tuple[int, ...]] = {
    "index_add": (0, 3), "index_copy": (0, 3), "scatter_add": (0, 3), "scatter": (0, 3), "index_put": (0, 2),
    "slice_scatter": (0, 1), "select_scatter": (0, 1), "patch": (0, 1), "copy": (1,), "masked_scatter": (0, 2),
}  # fmt: skip
PRODUCTS: dict[str, tuple[int, ...]] = {"mul": (0, 1), "div": (0,)}
MATRICES: dict[str, tuple[int, int]] = {
    "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1), "dot": (0, 1),
}  # fmt: skip
REDUCES = names("sum mean")
JOINS = names("cat stack")
# Norms and activations: they may lie on the way of the memory itself, as in post-norm blocks.
NORMS = names(
    "native_layer_norm layer_norm _fused_rms_norm rms_norm native_batch_norm _native_batch_norm_legit batch_norm "
    "cudnn_batch_norm native_group_norm group_norm _native_batch_norm_legit_no_training _batch_norm_with_update "
    "_batch_norm_no_update"
)
FUNCTIONS = NORMS | names(
    "relu gelu silu leaky_relu elu hardswish hardtanh sigmoid tanh mish prelu _prelu_kernel softplus hardsigmoid clamp "
    "relu6 threshold clamp_min"
)
STATISTICS = names("rsqrt sqrt reciprocal linalg_vector_norm norm std pow")  # what a norm divides by
# Norms along the channels of images, whose features are the second axis.
CHANNEL_NORMS = NORMS - names("native_layer_norm layer_norm _fused_rms_norm rms_norm")


def addends(value: TracedValue) -> list[TracedValue]:
    """What an operation adds up, whatever it multiplies."""
    if value.name in JOINS:
        return list(values_in(value.args[0]))
    positions = SUMS.get(value.name) or SCATTERS.get(value.name) or ()
    if value.name in ("addmm", "baddbmm"):
        positions = (0,)
    return [v for at in positions if at < len(value.args) for v in values_in(value.args[at])]


def factors(value: TracedValue) -> list[Any]:
    """What an operation multiplies: values, numbers."""
    return [value.args[at] for at in PRODUCTS.get(value.name) or MATRICES.get(value.name) or ()]


def weights_of(value: TracedValue) -> list[TracedValue]:
    """The parameters that an operation takes, also where they were cast, cut or transposed before."""
    found, waiting = [], list(value.parents)
    while waiting:
        of = waiting.pop()
        if of.kind == "parameter":
            found.append(of)
        elif not of.kind and len(of.parents) == 1 and (of.name in SAME or of.name in MOVES):
            waiting += of.parents
    return found


def is_statistic(graph: Graph, value: TracedValue, of: TracedValue) -> bool:
    """Whether a factor is a norm of what it scales, or of what that was computed from."""
    for _ in range(6):
        if value.name in STATISTICS:
            return graph.depends(value, of) or any(graph.depends(value, p) for p in of.parents[:1])
        passes = value.name in SAME or value.name in MOVES
        if not value.parents or not (passes or value.name in ("clamp_min", "clamp", "add", "maximum", "mul")):
            return False
        value = max(value.parents, key=lambda v: v.number)
    return False
