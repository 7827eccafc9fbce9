"""The studies of width and depth: what the rules of a parametrisation do, the table, the figure and the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("hyper_connections")

from depthscope.app.cli.command import FINE, USAGE
from depthscope.app.cli.main import main
from depthscope.app.study import scaling
from depthscope.app.study.scaling import BASE_DEPTH, BASE_WIDTH, PARAMETRISATIONS, Decoder, optimizer_of
from depthscope.diagnostics.experiments import open_result


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_at_the_base_all_rules_are_the_same_and_elsewhere_as_declared(name):
    rules = PARAMETRISATIONS[name]
    base, large = Decoder(rules, BASE_WIDTH, BASE_DEPTH), Decoder(rules, 4 * BASE_WIDTH, 2 * BASE_DEPTH)
    assert base.logit_scale == base.blocks[0].scale == 1
    assert large.logit_scale == (1.0 if name == "standard" else 0.25)
    assert large.blocks[0].scale == (0.5 if name == "completep" else 1.0)
    rates = [group["lr"] for group in optimizer_of(large, 0, learning_rate=1.0).param_groups]
    assert rates == ([1.0, 1.0] if name == "standard" else [0.25, 1.0])
    groups = optimizer_of(large, 0).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in large.parameters()}
    # Hidden matrices alone: neither norms nor the embedding and the head.
    assert all(p.ndim == 2 and len(p) >= 4 * BASE_WIDTH for p in groups[0]["params"])


def test_hidden_states_have_one_size_at_the_start_whatever_the_width():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = []
        for width in (32, 128):
            x = torch.randn(2, 8, width)
            block = Decoder(PARAMETRISATIONS["standard"], width, 1).blocks[0]
            sizes.append(float(block(x).detach().square().mean()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


@pytest.fixture
def quick(monkeypatch):
    """Sizes that take a second."""
    monkeypatch.setattr(
        scaling, "STUDIES", {"width": ((16, 32, 64), ("standard", "mup")), "depth": ((2, 4), ("completep",))}
    )
    monkeypatch.setattr(scaling, "STEPS", 2)
    monkeypatch.setattr(scaling, "SEEDS", 1)


@pytest.mark.usefixtures("quick")
def test_the_command_prints_a_table_and_writes_results_and_a_figure(tmp_path, capsys):
    out = tmp_path / "study"
    assert main(["study", "width", "--out", str(out), "--json"]) == FINE
    told = json.loads(capsys.readouterr().out)
    assert (told["study"], told["sizes"]) == ("width", [16, 32, 64])
    standard, mup = told["parametrisations"]
    assert (standard["title"], mup["title"]) == ("standard", "μP")
    # Already here the states change much more with the width in one than in the other.
    last = [each["places"][-2]["change_exponent"] for each in (standard, mup)]
    assert last[0] > 0.5 > last[1] > -0.5
    assert sorted(path.name for path in out.iterdir()) == ["width-mup.h5", "width-standard.h5", "width.svg"]
    saved = open_result(out / "width-standard.h5")
    assert float(saved["change_exponent"][-2]) == pytest.approx(last[0])
    assert main(["study", "width", "--out", str(out)]) == FINE  # its own files are replaced
    printed = capsys.readouterr().out
    assert "standard: Training changes" in printed
    assert "place" in printed.splitlines()[2]
    (out / "width-mup.h5").write_text("somebody else's")
    assert main(["study", "width", "--out", str(out)]) == USAGE
    assert "is not the result of an earlier study" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_figure_is_of_the_last_state():
    results = scaling.run_scaling_study("depth", seeds=1, steps=1)
    figure = scaling.figure_of(results)
    assert figure.log_x
    assert figure.log_y
    change = results["completep"]["change"].sel(place="the last state")
    np.testing.assert_allclose(figure.lines[0].y, change.mean("seed"))
    assert figure.x_label == "depth"


def test_what_does_not_go_together_is_refused(capsys):
    assert main(["study", "width", "--memory"]) == USAGE
    assert "--memory belongs to the study of families" in capsys.readouterr().err
    assert main(["study", "breadth"]) == USAGE
    assert "expected one of families, answer, connections, initialisation" in capsys.readouterr().err
