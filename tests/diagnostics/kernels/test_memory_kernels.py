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


@pytest.mark.parametrize("n", SIZES)
def test_traffic_is_the_sum_of_the_operations(n):
    rows = table(WIDTH, n).values()
    assert memory.elements_read(WIDTH, n) == sum(read for read, _ in rows)
    assert memory.elements_written(WIDTH, n) == sum(written for _, written in rows)


@pytest.mark.parametrize("n", SIZES)
def test_a_fused_kernel_reads_the_streams_and_the_branch_once_and_writes_the_streams_once(n):
    rows = table(WIDTH, n)
    alone = [rows["compute H_pre, H_post, H_res"], rows["apply H_pre"]]
    # The coefficients of the two operations are read all the same.
    assert (
        memory.elements_read(WIDTH, n, fused=True) == sum(r for r, _ in alone) + (n + 1) * WIDTH + n + n * n
    )
    assert memory.elements_written(WIDTH, n, fused=True) == sum(w for _, w in alone) + n * WIDTH


def test_a_plain_residual_reads_two_states_and_writes_one():
    for fused in (False, True):
        assert memory.elements_read(WIDTH, 1, fused=fused) == 2 * WIDTH
        assert memory.elements_written(WIDTH, 1, fused=fused) == WIDTH


@pytest.mark.parametrize(("n", "sublayers"), [(2, 24), (4, 60), (4, 61), (8, 100), (4, 1)])
def test_the_block_of_recomputation_is_within_a_tenth_of_the_best(n, sublayers):
    kept = {b: memory.kept_elements(8, n, sublayers, block=b) for b in range(1, sublayers + 1)}
    chosen = memory.recomputed_block(n, sublayers)
    # The formula takes the number of blocks as it divides, and not rounded up.
    assert kept[chosen] <= 1.1 * min(kept.values())


def test_sizes_below_one_are_refused():
    for call in (lambda: memory.elements_read(0, 4), lambda: memory.kept_elements(8, 4, 10, block=0)):
        with pytest.raises(ValueError, match="got a size of 0"):
            call()
