"""Tensors of plain connections, of weights over depth and of lags become the variables that the schema declares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from depthscope.diagnostics import schema
from depthscope.probes.connections.proof import Evidence, Joint, Parts, Proof
from depthscope.probes.run.attributes import chain_proof, run_proof
from depthscope.probes.run.linear_variables import depth_variables, factor_variables, linear_coords
from depthscope.probes.structure.chain import Chain, Connection

LINKS = tuple(Connection(f"blocks.{i}", 0, i, "block", None, 0, "add", i, i + 1) for i in range(3))
CHAIN = Chain("", (), LINKS, (), "Block", ())
NO_EVIDENCE = Evidence((), ())


def test_factors_that_are_one_everywhere_are_left_out():
    assert factor_variables([None, None], [None, torch.ones(2, 3)]) == {}


def test_factors_of_a_token_and_of_a_feature_are_two_variables():
    token, gate = torch.full((2, 3), 0.5), torch.full((2, 3, 4), 2.0)
    found = factor_variables([token, None], [gate, token])
    assert set(found) == {"residual_scale", "branch_scale", "branch_gate"}
    for name, (dims, array) in found.items():
        assert dims == schema.TRACE[name].dims
        assert array.shape[0] == 2
    np.testing.assert_array_equal(found["residual_scale"][1][:, 0, 0], [0.5, 1.0])
    # The product of both is the factor: ones where a connection has only the other.
    np.testing.assert_array_equal(found["branch_gate"][1][:, 0, 0, 0], [2.0, 1.0])
    np.testing.assert_array_equal(found["branch_scale"][1][:, 0, 0], [1.0, 0.5])


def test_odd_factors_are_refused():
    with pytest.raises(ValueError, match=r"has 1 axes; expected \(sequence, token\)"):
        factor_variables([torch.ones(3)], [None])
    with pytest.raises(ValueError, match=r"shapes \[\(2, 3\), \(2, 4\)\]; expected one shape"):
        factor_variables([torch.zeros(2, 3), torch.zeros(2, 4)], [None, None])


def test_weights_over_depth_are_padded_to_all_sources():
    rows = [torch.full((2, 3, k + 1), k + 1.0) for k in range(3)]
    reads = [row.unsqueeze(2) for row in rows]
    dims, array = depth_variables(read=reads)["depth_read"]
    assert dims == schema.TRACE["depth_read"].dims
    np.testing.assert_array_equal(array[:, 0, 0], [[1, 0, 0, 0], [2, 2, 0, 0], [3, 3, 3, 0]])
    assert set(depth_variables(read=reads, carry=rows)) == {"depth_read", "depth_carry"}
    assert depth_variables() == {}


def test_a_branch_with_several_inputs_has_a_row_for_each_and_the_others_none():
    one, two = torch.ones(2, 3, 1, 1), torch.full((2, 3, 2, 2), 2.0)
    padded = torch.cat([one, torch.full_like(one, torch.nan)], 2)
    dims, array = depth_variables(read=[padded, two])["depth_reads"]
    assert dims == schema.TRACE["depth_reads"].dims
    np.testing.assert_array_equal(array[:, 0, 0], [[[1, 0, 0], [np.nan] * 3], [[2, 2, 0], [2, 2, 0]]])


def test_a_whole_matrix_of_weights_gives_the_same_rows():
    square = torch.tril(torch.ones(4, 4)).expand(2, 3, 4, 4)
    _, array = depth_variables(read=[square[:, :, k : k + 1] for k in range(3)])["depth_read"]
    np.testing.assert_array_equal(array[:, 0, 0], np.tri(3, 4))


def test_a_weight_on_a_later_output_is_refused():
    rows = [torch.ones(2, 3, 1, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="depth_read of connection 0 has a weight on source 1 or later"):
        depth_variables(read=rows)


def test_coordinates_that_say_nothing_are_left_out():
    assert linear_coords(LINKS) == {}
    np.testing.assert_array_equal(linear_coords(LINKS, over_depth=True)["source"], [0, 1, 2, 3])
    normed = linear_coords([replace(link, style="normed") for link in LINKS])
    assert normed["after_sum"][1].tolist() == ["norm"] * 3


def evidence(*, known: bool) -> Evidence:
    parts = Parts(None, None, torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    joint = Joint(
        "blocks.1", torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), parts, torch.ones(1, 1) > 0, torch.float32
    )
    return Evidence((Proof(0.0, 0.0, known),), (joint,))


def test_streams_are_proven_by_their_evidence():
    streams = replace(CHAIN, connections=tuple(replace(link, style="returned") for link in LINKS))
    assert chain_proof(streams, evidence(known=True)) == "proven"
    unknown = chain_proof(streams, evidence(known=False))
    assert schema.is_proof(unknown)
    assert "no sampled token has finite states around 'blocks.1'" in unknown


def test_a_run_names_the_chains_that_are_not_proven():
    def chains(*proofs: str) -> list[Chain]:
        return [replace(CHAIN, name=name, proof=proof) for name, proof in zip("ab", proofs, strict=True)]

    assert run_proof(chains("proven", "proven"), NO_EVIDENCE) == "proven"
    assert run_proof(chains("proven", "unproven: why"), NO_EVIDENCE) == "unproven: b: why"
    assert run_proof(chains("proven", ""), NO_EVIDENCE) == ""
    one = [replace(CHAIN, proof="unproven: why")]
    assert run_proof(one, NO_EVIDENCE) == "unproven: why"
