"""Do several processes measure together what one would with all the data, and does nothing ever hang?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from depthscope.diagnostics.quantities.mixing_matrices import over_last
from depthscope.probes.statistics.histograms import BINS, OF_GAINS, counts, extremes, histogram
from depthscope.probes.training.ranks.packing import apportioned
from tests.probes.training.ranks.worker import SCENARIOS

WORKER = Path(__file__).parent / "worker.py"
SECONDS = 300  # of which starting torch in four processes on two busy cores may take a third

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of torch has no gloo", allow_module_level=True)


def launch(world: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    root = str(Path(__file__).parents[4])
    done = subprocess.run(
        [*command, str(WORKER), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow(more=1, one_in=5)
@pytest.mark.parametrize("world", SCENARIOS)
def test_processes(world, tmp_path):
    """Every scenario in one start of so many processes, which takes most of the time."""
    launch(world, tmp_path)
    failed = {}
    for rank in range(world):
        met = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(met) == {scenario.__name__ for scenario in SCENARIOS[world]}
        failed |= {(rank, scenario): words for scenario, words in met.items() if words}
    assert failed == {}


def test_reductions_of_parts_are_those_of_all_values():
    values = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)).exp()
    parts = values.split([1, 2000, 0, 2999])
    counted = sum(counts(part, OF_GAINS) for part in parts)
    extreme = torch.stack([extremes(part) for part in parts]).amax(0)
    found = histogram(OF_GAINS, counted.numpy(), extreme.numpy())
    expected = over_last(values.double().numpy().T)
    np.testing.assert_allclose(found.reductions()[:, [0, -1]], expected[:, [0, -1]], rtol=1e-12)
    np.testing.assert_allclose(found.reductions(), expected, rtol=2 ** (1 / OF_GAINS.per_octave) - 1)


def test_the_number_above_an_edge_is_exact():
    bins = BINS["largest"]
    values = 500 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)).exp()
    found = histogram(bins, counts(values, bins).numpy(), extremes(values).numpy())
    for edge in bins.edges[[0, 10, 25]]:
        np.testing.assert_array_equal(found.number_above(np.array([edge, edge])), (values > edge).sum(0))


def test_an_undefined_value_makes_its_reductions_undefined():
    values = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    found = histogram(OF_GAINS, counts(values, OF_GAINS).numpy(), extremes(values).numpy())
    np.testing.assert_array_equal(np.isnan(found.reductions()).all(axis=1), [False, True])
    np.testing.assert_array_equal(np.isnan(found.number_above(np.array([1.0, 1.0]))), [False, True])


def test_equal_values_are_their_own_quantiles():
    values = torch.full((7, 1), 1.001)
    found = histogram(OF_GAINS, counts(values, OF_GAINS).numpy(), extremes(values).numpy())
    np.testing.assert_allclose(found.reductions(), values[0].item(), rtol=1e-7)


@pytest.mark.parametrize("available", [[3, 3, 3], [0, 100, 1], [128, 0, 0], [1, 1, 1, 1, 1000]])
def test_samples_are_shared_in_proportion(available):
    shares = apportioned(available, 64)
    assert sum(shares) == min(64, sum(available))
    assert all(share <= number for share, number in zip(shares, available, strict=True))
