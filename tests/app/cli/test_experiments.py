"""ablate, lens and jacobian: from a factory and a text to a table, JSON and a file; of a run its own checkpoint and text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from depthscope.app.cli.command import FINE, USAGE
from depthscope.app.cli.main import main
from depthscope.app.figures import Heatmap, Selection
from depthscope.app.paper.contents import draw_all
from depthscope.app.readings.readings import read_paths
from depthscope.diagnostics import experiments

FACTORY = "tests.app.cli.byte_model:build"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


def call(*words) -> int:
    return main([str(word) for word in words])


def test_ablate_tells_what_each_block_does(text, tmp_path, capsys):
    out = tmp_path / "result.zip"
    words = ("ablate", FACTORY, "--text", text, "--length", 16, "--sequences", 3, "--out", out)
    assert call(*words, "--do", "skip,repeat", "--blocks", "0-1", "--json") == FINE
    told = json.loads(capsys.readouterr().out)
    assert [row["experiment"] for row in told["experiments"]] == [
        "skip block 0", "skip block 1", "repeat block 0", "repeat block 1",
    ]  # fmt: skip
    assert told["experiments"][0]["loss_change_low"] < told["experiments"][0]["loss_change_high"]
    assert told["base_loss"]["sequences"] == 3
    saved = experiments.open_result(out)
    assert saved.sizes["experiment"] == 4
    assert saved.token_text.values[0, 0] in set(text.read_text())
    assert call(*words) == USAGE
    assert "exists; name another file, or add --force" in capsys.readouterr().err
    assert call(*words, "--force") == FINE
    assert "skip block 1" in capsys.readouterr().out


def test_ablate_tells_what_a_block_is_worth_to_the_later_ones(text, capsys):
    words = ("ablate", FACTORY, "--text", text, "--length", 16, "--sequences", 3, "--do", "skip,skip-past")
    assert call(*words) == FINE
    told = capsys.readouterr().out
    assert "skip block 0 at the first tokens" in told
    assert "change of what each later block adds, relative to what it added, by block:" in told
    assert call(*words, "--json") == FINE
    row = json.loads(capsys.readouterr().out)["experiments"][0]
    first = row["later_blocks"][0]
    assert first["block"] == 1
    assert first["low"] <= first["change"] <= first["high"]


def test_lens_tells_what_each_depth_reads(text, capsys):
    words = ("lens", FACTORY, "--text", text, "--length", 16)
    assert call(*words, "--sequences", 4, "--json") == FINE
    told = json.loads(capsys.readouterr().out)
    assert {row["lens"] for row in told["readings"]} == {"logit", "tuned"}
    assert told["readings"][2]["agreement"] == 1
    assert call(*words, "--sequences", 3) == USAGE
    assert "at least 4 sequences" in capsys.readouterr().err
    assert call(*words, "--sequences", 3, "--no-tuned") == FINE
    assert "prediction depth, logit lens:" in capsys.readouterr().out


def test_of_a_run_its_checkpoint_and_its_text_are_asked_for(text, tmp_path, capsys):
    run = tmp_path / "a.zarr.zip"
    sizes = ("--length", 16, "--sequences", 3)
    assert call("probe", FACTORY, "--text", text, *sizes, "--out", run) == FINE
    assert "no gradients: build takes no labels" in capsys.readouterr().err
    assert call("ablate", run, "--text", text) == USAGE
    error = capsys.readouterr().err
    assert "name the checkpoint with --model" in error
    assert "sha256:" in error
    assert call("ablate", run, "--model", f"{FACTORY}_another", "--text", text) == USAGE
    assert "has other weights" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("another text " * 20)
    assert call("ablate", run, "--model", FACTORY, "--text", other) == USAGE
    assert "another text than the run's (notes.txt" in capsys.readouterr().err
    assert call("ablate", run, "--model", FACTORY, "--text", text, "--do", "skip") == FINE
    saved = experiments.open_result(tmp_path / "a.ablate.zip")
    assert (saved.sizes["sample"], saved.sizes["token"]) == (3, 16)  # as in the run
    assert (
        call("ablate", run, "--model", FACTORY, "--text", text, "--do", "patch", "--from", run, "--force")
        == FINE
    )
    patched = experiments.open_result(tmp_path / "a.ablate.zip")
    assert float(abs(patched.output_change).max()) == 0  # its own states
    capsys.readouterr()
    assert call("jacobian", run, "--model", FACTORY, "--text", text, "--values", 3, "--json") == FINE
    told = json.loads(capsys.readouterr().out)
    (reading,) = read_paths([str(run)])[0]
    kept = reading.results["jacobian"]
    assert kept.singular_value.values.tolist() == [row["singular_values"] for row in told["jacobians"][:-1]]
    drawn = dict(draw_all([reading], Selection()))["gradients"]
    assert isinstance(drawn, Heatmap)
    np.testing.assert_array_equal(drawn.z, kept.singular_value.values.T)


def test_what_does_not_go_together_is_one_line(text, capsys):
    words = ("ablate", FACTORY, "--text", text)
    assert call(*words, "--do", "patch") == USAGE
    assert "--do patch and --from RUN go together" in capsys.readouterr().err
    assert call(*words, "--model", FACTORY) == USAGE
    assert "is not a run file; leave --model out" in capsys.readouterr().err
    assert call(*words, "--do", "identity", "--length", 16) == USAGE
    assert "needs several residual streams" in capsys.readouterr().err
    assert call(*words, "--sites", "mid") == USAGE
    assert "leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(*words, "--blocks", "5-3")
    assert "give such as 3 or 3,5-7" in capsys.readouterr().err


def test_patch_puts_the_clean_text_into_the_corrupted_one(tmp_path, capsys):
    out, figure = tmp_path / "patch.zip", tmp_path / "patch.svg"
    words = ("patch", FACTORY, "--clean", "the quick fox", "--corrupted", "the thick fox")
    assert call(*words, "--answer", "x", "--against", "y", "--out", out, "--figure", figure, "--json") == FINE
    told = json.loads(capsys.readouterr().out)
    assert told["measure"] == "logit_difference"
    assert told["files"] == [str(out), str(figure)]
    # The first state has each letter alone, and the last letter's last state everything.
    cells = {(row["depth"], row["token"]): row for row in told["cells"]}
    assert cells[0, 4]["token_text"] == "q → t"
    assert cells[2, 12]["effect"] == pytest.approx(1)
    assert cells[0, 0]["change"] == 0
    saved = experiments.open_result(out)
    assert saved.sizes["token"] == 13
    assert "q → t" in figure.read_text()
    assert call(*words, "--tokens", "12", "--depths", "1-2") == FINE
    told = capsys.readouterr().out
    assert "effect (95 %)" in told
    assert "−log p(next clean token)" in told


def test_pairs_of_a_file_are_grouped_by_their_length(tmp_path, capsys):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a longer one\ta larger one\tx\ty\nshort\tshirt\tp\tq\nother\tot_er\tq\tp\n")
    assert call("patch", FACTORY, "--pairs", pairs, "--depths", "1", "--json") == FINE
    told = json.loads(capsys.readouterr().out)
    assert told["sequences"] == 3
    pairs.write_text("one\ttwo\nthree\tfour\n")
    assert call("patch", FACTORY, "--pairs", pairs) == USAGE
    assert "the texts of pair 2 have 5 and 4 tokens; expected as many" in capsys.readouterr().err
    pairs.write_text("one\ttwo\nthree\n")
    assert call("patch", FACTORY, "--pairs", pairs) == USAGE
    assert "lines of 1, 2 fields" in capsys.readouterr().err
    assert call("patch", FACTORY, "--pairs", pairs, "--clean", "a") == USAGE
    assert "give one of the two" in capsys.readouterr().err
    assert call("patch", FACTORY, "--clean", "ab", "--corrupted", "ac", "--answer", "xy") == USAGE
    assert "the answer 'xy' is 2 tokens (x | y), expected one" in capsys.readouterr().err
