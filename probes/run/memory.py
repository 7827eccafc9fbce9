"""What do the streams of a run cost? By formula where their connections are known, and measured where there are gradients."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr

from depthscope.diagnostics.kernels.memory import StreamMemory, bytes_text

PARTS = {"h_res", "h_pre", "h_post"}
"""The formula counts connections that read, write and mix by one scalar for each stream."""


def memory_facts(trace: xr.Dataset, dtype: torch.dtype, measured: dict[str, Any] | None) -> dict[str, Any]:
    """The attribute ``memory`` of a run.

    ``measured``: what `kept_bytes` found, where gradients were captured.
    Returns: The counts of `StreamMemory`, those of `kept_bytes`, and ``sentence``; empty where nothing is known.
    """
    facts: dict[str, Any] = {}
    sentences: list[str] = []
    if set(trace.data_vars) >= PARTS:
        memory = StreamMemory(
            width=trace.sizes["feature"],
            streams=trace.sizes["stream"],
            sublayers=trace.sizes["connection"],
            element_bytes=dtype.itemsize,
        )
        facts |= memory.as_dict()
        sentences.append(memory.sentence())
    if measured:
        facts |= measured
    if measured and "measured_kept_bytes" in measured:
        a_token = measured["measured_kept_bytes"] / measured["measured_tokens"]
        sentences.append(f"measured: a forward keeps {bytes_text(a_token)} a token for its backward in all")
    if sentences:
        facts["sentence"] = "; ".join(sentences)
    return facts
