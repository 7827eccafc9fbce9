"""ablate: from a factory and a text to a table, JSON and a file, next to its run where one is named; patching of pairs."""

from __future__ import annotations

import json

import pytest

from depthscope.app.cli.main import FINE, USAGE, main
from depthscope.diagnostics import experiments

FACTORY = "tests.app.cli.byte_model:build"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


def call(*words) -> int:
    return main([str(word) for word in words])


def test_ablate_measures_what_each_block_does(text, tmp_path, capsys):
    out = tmp_path / "result.h5"
    words = ("ablate", FACTORY, "--text", text, "--length", 16, "--sequences", 3, "--out", out)
    assert call(*words, "--do", "skip,bypass", "--blocks", "0-1", "--json") == FINE
    printed = json.loads(capsys.readouterr().out)
    assert [row["experiment"] for row in printed["experiments"]] == [
        "skip block 0", "skip block 1", "without the step to depth 1", "without the step to depth 2",
    ]  # fmt: skip
    assert printed["experiments"][0]["loss_change_low"] < printed["experiments"][0]["loss_change_high"]
    assert printed["base_loss"]["sequences"] == 3
    result = experiments.open_result(out)
    assert result.sizes["experiment"] == 4
    assert result.token_text.values[0, 0] in set(text.read_text())
    assert call(*words) == USAGE
    assert "exists; name another file with --out, or add --force" in capsys.readouterr().err
    assert call(*words, "--force") == FINE
    assert "skip block 1" in capsys.readouterr().out


def test_a_result_goes_next_to_its_run_and_must_be_of_its_weights_and_text(text, tmp_path, capsys):
    run = tmp_path / "a.zarr"
    sizes = ("--length", 16, "--sequences", 3, "--text", text)
    assert call("probe", FACTORY, *sizes, "--out", run) == FINE
    assert "no gradients: build takes no labels" in capsys.readouterr().err
    assert call("ablate", f"{FACTORY}_another", *sizes, "--run", run) == USAGE
    assert "was made of other weights" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("another text " * 20)
    assert call("ablate", FACTORY, *sizes[:-1], other, "--run", run) == USAGE
    assert "was made of another text (notes.txt)" in capsys.readouterr().err
    assert call("ablate", FACTORY, *sizes, "--run", run) == FINE
    result = experiments.open_result(experiments.result_path(run, "ablate"))
    assert (result.sizes["sample"], result.sizes["token"]) == (3, 16)


def test_patching_puts_the_clean_text_into_the_corrupted_one(tmp_path, capsys):
    pairs, out = tmp_path / "pairs.tsv", tmp_path / "patch.h5"
    pairs.write_text("the quick fox\tthe thick fox\tx\ty\n")
    words = ("ablate", FACTORY, "--patch", pairs)
    assert call(*words, "--out", out, "--json") == FINE
    printed = json.loads(capsys.readouterr().out)
    assert printed["measure"] == "logit_difference"
    # The first state has each letter alone, and the last letter's last state everything.
    cells = {(row["depth"], row["token"]): row for row in printed["cells"]}
    assert cells[0, 4]["token_text"] == "q → t"
    assert cells[2, 12]["effect"] == pytest.approx(1)
    assert cells[0, 0]["change"] == 0
    assert experiments.open_result(out).sizes["token"] == 13
    assert call(*words, "--tokens", "12", "--depths", "1-2") == FINE
    assert "effect (95 %)" in capsys.readouterr().out


def test_pairs_are_grouped_by_their_length_and_wrong_ones_are_named(tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a longer one\ta larger one\tx\ty\nshort\tshirt\tp\tq\nother\tot_er\tq\tp\n")
    assert call("ablate", FACTORY, "--patch", pairs, "--depths", "1", "--json") == FINE
    assert json.loads(capsys.readouterr().out)["sequences"] == 3
    for lines, said in (
        ("one\ttwo\nthree\tfour\n", "the texts of pair 2 have 5 and 4 tokens; expected as many"),
        ("one\ttwo\nthree\n", "lines of 1, 2 fields"),
        ("ab\tac\txy\n", "the answer 'xy' is 2 tokens (x | y), expected one"),
    ):
        pairs.write_text(lines)
        assert call("ablate", FACTORY, "--patch", pairs) == USAGE
        assert said in capsys.readouterr().err
