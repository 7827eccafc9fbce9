"""probe: arguments reach the capture, the data are recorded, what cannot be probed is one line."""

from __future__ import annotations

import json
import os

import pytest
import torch
import xarray as xr

from depthscope import probes
from depthscope.app.cli.main import FINE, FOUND, USAGE, main
from depthscope.diagnostics import schema
from depthscope.diagnostics.errors import InputError
from depthscope.probes.checkpoints.load import LoadedModel


def _stand_in(monkeypatch, run: xr.DataTree):
    """A checkpoint that needs no weights: the capture gives a synthetic run."""
    seen = {}
    loaded = LoadedModel("model", None, "tiny", "sha256:0", "tiny")
    monkeypatch.setattr(
        "depthscope.probes.checkpoints.load.load_checkpoint",
        lambda spec, **more: seen.update(spec=spec, **more) or loaded,
    )
    monkeypatch.setattr(
        "depthscope.probes.checkpoints.text_batch.encode_text",
        lambda model, text, **more: (
            seen.update(text=text, **more) or {"input_ids": torch.zeros(2, 8, dtype=int)}
        ),
    )
    monkeypatch.setattr("depthscope.probes.checkpoints.text_batch.token_texts", lambda model, batch: None)

    def capture(model, batch, **more):
        seen.update(more)
        run.attrs.update(more["attrs"])
        return run

    monkeypatch.setattr(probes, "capture", capture)
    return seen


def test_probe_passes_everything_on_and_records_the_data(monkeypatch, tmp_path, make_run, capsys):
    seen = _stand_in(monkeypatch, make_run("residual", layers=2))
    (tmp_path / "t.txt").write_text("some words")
    out = tmp_path / "r.zarr.zip"
    words = ["probe", "tiny", "--text", str(tmp_path / "t.txt"), "--out", str(out), "--seed", "3"]
    assert (
        main(
            [*words, "--dtype", "float32", "--no-gradients", "--layers", "blocks", "--length", "64", "--json"]
        )
        == FINE
    )
    assert json.loads(capsys.readouterr().out)["sizes"]["run"]["depths"] == 3
    assert (seen["text"], seen["length"], seen["seed"], seen["dtype"]) == ("some words", 64, 3, "float32")
    assert (seen["gradients"], seen["layers"]) == (False, "blocks")
    with schema.open_run(out) as run:
        assert run.attrs["model"] == "tiny"
        assert run.attrs["data"] == "t.txt"
        assert run.attrs["data_digest"].startswith("sha256:")


def test_a_checkpoint_alone_is_probed_on_a_built_in_text_and_judged(monkeypatch, tmp_path, make_run, capsys):
    monkeypatch.chdir(tmp_path)
    seen = _stand_in(monkeypatch, make_run("residual", layers=2))
    assert main(["probe", "models/tiny.gguf"]) == FINE
    assert len(seen["text"]) > 100_000
    said = capsys.readouterr().out
    # What `check` says of the same run, without its summary.
    assert main(["check", "tiny.zarr"]) in (FINE, FOUND)
    checked = capsys.readouterr().out
    told = ("INFO", "WARN", "FAIL", "Nothing found")
    lines = [[line for line in of.splitlines() if line.startswith(told)] for of in (said, checked)]
    assert lines[0] == lines[1]
    with schema.open_run("tiny.zarr") as run:
        assert run.attrs["data"] == "pydoc_data.topics"
    assert main(["probe", "models/tiny.gguf"]) == USAGE
    assert "tiny.zarr exists; replace it" in capsys.readouterr().err
    assert main(["probe", "models/tiny.gguf", "--force", "--json"]) == FINE
    assert isinstance(json.loads(capsys.readouterr().out)["findings"], list)


@pytest.mark.parametrize(("content", "said"), [(b"\xff\xfe", "not UTF-8"), (b" \n", "contains no text")])
def test_text_must_be_text(content, said, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    assert main(["probe", "x", "--text", str(tmp_path / "t.txt"), "--out", "r.zarr.zip"]) == USAGE
    assert said in capsys.readouterr().err


def test_probe_describe_check_for_real(tmp_path, capsys):
    """One small model through the true probes: factory, capture, check."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    spec, out = "depthscope.app.demo.small_lm:residual", tmp_path / "r.zarr.zip"
    pytest.importorskip("depthscope.app.demo.small_lm")
    sizes = ["--sequences", "2", "--length", "32"]
    assert main(["probe", spec, "--text", str(tmp_path / "t.txt"), "--out", str(out), *sizes]) == FINE
    assert main(["describe", spec, "--json"]) == FINE
    assert "residual" in capsys.readouterr().out
    assert main(["check", str(out)]) in (FINE, FOUND)


def test_a_text_that_is_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "t.txt")
    words = ["probe", "tiny", "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "r.zarr.zip")]
    assert main(words) == USAGE
    assert "is no file; name one, or pipe the text into --text -" in capsys.readouterr().err


def test_probe_says_what_the_run_leaves_out_and_what_is_not_proven(monkeypatch, tmp_path, make_run, capsys):
    run = make_run("residual", layers=2)
    run.attrs["proof"] = "unproven: the axes of the state are rearranged"
    sentence = "vision (4 blocks of Block, 31% of the parameters): no chain of its states was found"
    run.attrs["not_covered"] = [{"module": "vision", "sentence": sentence}]
    _stand_in(monkeypatch, run)
    (tmp_path / "t.txt").write_text("some words")
    words = ["probe", "tiny", "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "r.zarr.zip")]
    assert main(words) == FINE
    printed = capsys.readouterr().out
    assert f"not covered: {sentence}" in printed
    assert run.attrs["proof"] in printed
    assert schema.open_run(tmp_path / "r.zarr.zip").attrs["not_covered"] == run.attrs["not_covered"]


def test_a_run_that_cannot_be_analysed_is_saved_and_that_is_said(monkeypatch, tmp_path, make_run, capsys):
    _stand_in(monkeypatch, make_run("residual", layers=2))

    def refuse(*_, **__):
        raise InputError("its states cannot be measured")

    for room in ("diagnostics", "app.readings.readings", "probes.settling"):
        monkeypatch.setattr(f"depthscope.{room}.analyze", refuse)
    out = tmp_path / "r.zarr.zip"
    assert main(["probe", "models/tiny.gguf", "--out", str(out)]) == FINE
    assert "is saved, and not judged: its states cannot be measured" in capsys.readouterr().err
    with schema.open_run(out) as run:
        assert "trace" in run.children
