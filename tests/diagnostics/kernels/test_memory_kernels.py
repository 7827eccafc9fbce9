"""What streams cost: the paper's table row by row, and the block of recomputation by trying all of them."""

import pytest

from depthscope.diagnostics.kernels import memory

WIDTH, SIZES = 7168, (2, 4, 8)


def table(d, n):
    """Table 2 of the mHC paper: elements that each operation reads and writes."""
    return {
        "compute H_pre, H_post, H_res": (n * d, n * n + 2 * n),
        "apply H_pre": (n * d + n, d),
        "apply H_post": (d + n, n * d),
        "apply H_res": (n * d + n * n, n * d),
        "add": (2 * n * d, n * d),
    }


def facts(n, sublayers=1, width=WIDTH):
    return memory.StreamMemory(width, n, sublayers, element_bytes=1).as_dict()


@pytest.mark.parametrize("n", SIZES)
def test_traffic_is_the_sum_of_the_operations(n):
    rows = table(WIDTH, n)
    assert facts(n)["elements_read"] == sum(read for read, _ in rows.values())
    assert facts(n)["elements_written"] == sum(written for _, written in rows.values())
    # A fused kernel reads the streams and the branch once, and writes the streams once; coefficients are read all the same.
    alone = [rows["compute H_pre, H_post, H_res"], rows["apply H_pre"]]
    assert facts(n)["fused_elements_read"] == sum(r for r, _ in alone) + (n + 1) * WIDTH + n + n * n
    assert facts(n)["fused_elements_written"] == sum(w for _, w in alone) + n * WIDTH


def test_a_plain_residual_reads_two_states_and_writes_one():
    for fused in ("", "fused_"):
        assert facts(1)[f"{fused}elements_read"] == 2 * WIDTH
        assert facts(1)[f"{fused}elements_written"] == WIDTH
        assert facts(1)[f"{fused}traffic_ratio"] == 1.0


@pytest.mark.parametrize(("n", "sublayers"), [(2, 24), (4, 60), (4, 61), (8, 100), (4, 1)])
def test_the_block_of_recomputation_is_within_a_tenth_of_the_best(n, sublayers):
    # The streams at the begin of each block; of the one that runs backward also the input and output of each branch.
    kept = [n * 8 * -(-sublayers // block) + (n + 2) * 8 * block for block in range(1, sublayers + 1)]
    found = facts(n, sublayers, width=8)
    assert found["recomputed_kept_bytes"] == kept[found["recomputed_block"] - 1]
    # The formula takes the number of blocks as it divides, and not rounded up.
    assert found["recomputed_kept_bytes"] <= 1.1 * min(kept)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="got a size of 0"):
        facts(0)
