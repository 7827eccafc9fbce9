"""How do the logits of the mixing matrices become arrays? Their values, and the gradients at them and at H_res."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from depthscope.diagnostics import schema
from depthscope.probes.connections.mixing_logits import MixingLogits


def logit_variables(logits: Sequence[MixingLogits], num_sequences: int, tokens: int) -> dict[str, Any]:
    """Variables of the logits of all connections as (dims, array).

    ``logits``: one for each connection, of the first sequences of the run.
    ``num_sequences, tokens``: of the run: what was not followed is NaN.
    Returns: Empty where the logits of no connection are known.
    """
    known = [(number, of.logits) for number, of in enumerate(logits) if of.logits is not None]
    if not known:
        return {}
    n = known[0][1].shape[-1]
    values = np.full((len(logits), num_sequences, tokens, n, n), math.nan, np.float32)
    for number, of_one in known:
        values[number, : of_one.shape[0], : of_one.shape[1]] = of_one.numpy()
    variables: dict[str, Any] = {"mixing_logits": (schema.TRACE["mixing_logits"].dims, values)}
    for name, norms in (
        ("logit_gradient_norm", [of.logit_gradient for of in logits]),
        ("mixing_gradient_norm", [of.mixing_gradient for of in logits]),
    ):
        if not all(map(math.isnan, norms)):
            variables[name] = ("connection", np.array(norms))
    return variables
