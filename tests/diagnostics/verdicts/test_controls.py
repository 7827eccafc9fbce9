"""Networks that are known to be wrong are refused or flagged: mixing discarded, transposed, uniform, or really learned."""

from __future__ import annotations

import numpy as np
import torch

from depthscope.diagnostics import Severity
from tests.models.stream_models import deepseek_v4
from tests.models.verdict_models import CONNECTIONS, IDENTITY, captured, findings, streams, tokens

torch.set_num_threads(1)


def unsymmetric() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(4, 4, generator=generator).softmax(-1) for _ in range(CONNECTIONS)]
    return [0.9 * IDENTITY + 0.1 * each for each in drawn]


def test_a_discarded_mixing_matrix_is_told_and_the_applied_one_is_kept():
    run = captured(streams(unsymmetric(), merge=lambda mix, x: x))
    np.testing.assert_array_equal(run.trace.h_res.values, np.broadcast_to(np.eye(4), run.trace.h_res.shape))
    assert "gain_sum" not in run.statistics  # nothing of the matrix that is not applied
    (finding,) = [each for each in findings(run) if each.verdict == "discarded_mixing"]
    assert finding.severity == Severity.WARN
    assert "H_res is computed and discarded at all 12 connections" in finding.sentence


def test_streams_merged_behind_a_connection_are_a_part_of_the_matrix_that_is_applied():
    run = captured(streams(unsymmetric(), merge=lambda mix, x: (mix @ x).mean(2, keepdim=True).expand_as(x)))
    for number, mix in enumerate(unsymmetric()):
        merged = mix.mean(0, keepdim=True).expand_as(mix)
        np.testing.assert_allclose(run.trace.h_res.values[number, 0, 0], merged, atol=1e-6)


def test_a_transposed_mixing_matrix_is_kept_as_it_is_applied():
    run = captured(streams(unsymmetric(), merge=lambda mix, x: mix.mT @ x))
    assert run.attrs["orientation"] == "destination_source"
    for number, mix in enumerate(unsymmetric()):
        np.testing.assert_allclose(run.trace.h_res.values[number, 0, 0], mix.T, atol=1e-6)


def test_a_fresh_deepseek_mixes_uniformly():
    torch.manual_seed(0)
    found = findings(captured(deepseek_v4(3).eval(), {"input_ids": tokens()}))
    # Its streams become equal, which is normal of weights as they were drawn: said, and no warning.
    assert {finding.severity for finding in found} == {Severity.INFO}
    assert "stream_collapse" in {finding.verdict for finding in found}
