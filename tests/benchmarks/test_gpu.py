"""The command for the first GPU: the same code runs on the CPU, and without a card it says what to do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.page import markdown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.slow(more=1)
@pytest.mark.filterwarnings("ignore")
def test_all_of_it_runs_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--quick"])
    monkeypatch.setattr(gpu, "QUICK", {"residual": gpu.QUICK["residual"]})
    results = gpu.measured("cpu", quick=True, rounds=1)
    assert [row["how"] for row in results["equality"]] == ["float32", "bfloat16", "compiled"]
    assert all(row["is_equal"] for row in results["equality"])
    for row in results["equality"][:2]:
        assert row["errors"] == {"residual": 0.0, "gradient": 0.0}  # the CPU with itself
    assert "gradient_square_norm_sum" in results["equality"][2]["errors"]
    assert {row["mode"] for row in results["cost"]} == {"uncompiled", "compiled"}
    assert {row["way"] for row in results["cost"]} == {"plain", *gpu.RECORDED}
    page = markdown(results)
    assert "### Equality with the CPU" in page
    assert "compiled, metrics" in page


def test_what_the_time_does_not_suffice_for_is_named():
    results = gpu.measured("cpu", quick=True, rounds=1, seconds=-1.0)
    assert results["equality"] == []
    assert "cost of mhc, compiled" in markdown(results)
