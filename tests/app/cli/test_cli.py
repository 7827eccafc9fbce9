"""The command line: what loads, what is said, on which channel, with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import xarray as xr

from depthscope import probes
from depthscope.app.cli.command import FINE, FOUND, INTERRUPTED, USAGE
from depthscope.app.cli.commands import COMMANDS
from depthscope.app.cli.main import main
from depthscope.app.figures import CHOICES
from depthscope.app.readings.readings import read_runs
from depthscope.diagnostics import schema
from depthscope.diagnostics.verdicts import VERDICTS
from tests.models.stream_models import deepseek_v4

HEAVY = ("torch", "streamlit", "plotly", "matplotlib", "xarray", "numpy", "rich")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_run):
    folder = tmp_path_factory.mktemp("runs")
    for family in ("residual", "hc", "mhc"):
        schema.save_run(make_run(family, layers=3), folder / f"{family}.nc")
    return folder


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from depthscope.app.cli.main import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    printed = " ".join(done.stdout.split())
    assert all(f" {command.name} {command.help} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_and_runs_the_function_that_it_declares(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command.name, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: depthscope {command.name}" in printed
    assert "--debug" in printed
    assert command.run.__module__ == f"depthscope.app.cli.commands.{command.name}"


def test_the_options_of_a_slice_name_every_label(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = capsys.readouterr().out
    for name in ("scope", "tokens", "centering", "reduction"):
        assert f"--{name} {'|'.join(CHOICES[name])}" in printed


def test_bare_call_prints_help(capsys):
    assert main([]) == 0
    assert "depthscope demo" in capsys.readouterr().out


def test_version_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("depthscope ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chek"], "closest: 'check'"),
        (["zzz"], "expected one of demo, probe"),
        (["export", "a.nc"], "the following arguments are required: --out"),
        (["probe", "x", "--text", "t", "--out", "r.nc", "--length", "0"], "0 is not positive"),
        (["probe", "x", "--text", "t", "--out", "r.nc", "--length", "ten"], "'ten' is no whole number"),
        (["analyze", "a.nc", "--metrics", ""], "argument --metrics: '' names nothing; give one name or"),
        (["compare", "a.nc", "--metrics", " , "], "argument --metrics: ' , ' names nothing"),
        (["check", "a.nc", "--fail-on", ""], "argument --fail-on: '' names nothing"),
    ],
)
def test_wrong_usage_is_one_line_and_two(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check", "missing.nc"], "missing.nc"),
        (["check", "RUNS/hc.nc", "--fail-on", "rank_colapse"], "closest: 'rank_collapse'"),
        (["analyze", "RUNS/hc.nc", "--metrics", "efective_rank"], "closest: 'effective_rank'"),
        (["compare", "RUNS", "--tokens", "some"], "expected one of all, ordinary"),
        (["export", "RUNS", "--out", "OUT/paper", "--width", "a4"], "expected icml, neurips, full"),
        (["report", "RUNS", "--out", "OUT/report.pdf"], "expected such as report.html"),
        (["probe", "x", "--text", "missing.txt", "--out", "r.nc"], "missing.txt: no such file"),
        (["probe", "x", "--text", "missing.txt", "--out", "r.npy"], "ends in .nc, .zarr, .zarr.zip"),
    ],
)
def test_bad_input_is_one_clear_line_and_two(words, said, saved, tmp_path, capsys):
    words = [word.replace("RUNS", str(saved)).replace("OUT", str(tmp_path)) for word in words]
    assert main(words) == USAGE
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_foreign_file_is_no_run(tmp_path, capsys):
    (tmp_path / "torn.nc").write_bytes(b"not a netCDF file")
    assert main(["check", str(tmp_path / "torn.nc")]) == USAGE
    assert "cannot be read" in capsys.readouterr().err


def test_folder_without_runs_says_how_to_make_one(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == USAGE
    assert "depthscope probe CHECKPOINT" in capsys.readouterr().err


def test_missing_extra_names_the_install_line(monkeypatch, capsys, saved):
    def absent(paths, **options):
        raise ModuleNotFoundError("No module named 'streamlit'", name="streamlit.web")

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", absent)
    assert main(["dashboard", str(saved)]) == USAGE
    assert capsys.readouterr().err.strip() == (
        "depthscope dashboard needs streamlit: pip install 'depthscope[app]'"
    )


def test_missing_module_of_no_extra_is_our_fault_and_raises(monkeypatch, saved):
    def broken(paths, **options):
        raise ModuleNotFoundError("No module named 'depthscope.app.nowhere'", name="depthscope.app.nowhere")

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", broken)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        main(["dashboard", str(saved)])


def test_interrupt_is_130(monkeypatch, saved, capsys):
    def interrupted(paths, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("depthscope.app.dashboard.server.launch", interrupted)
    assert main(["dashboard", str(saved)]) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_dashboard_hands_its_arguments_on(monkeypatch, saved):
    seen = {}
    monkeypatch.setattr(
        "depthscope.app.dashboard.server.launch", lambda paths, **more: seen.update(more, paths=paths)
    )
    assert main(["dashboard", str(saved), "--port", "8600", "--no-browser"]) == FINE
    assert seen == {"paths": [saved], "port": 8600, "open_browser": False}


def test_analyze_writes_metrics_into_the_run(saved, tmp_path, capsys):
    path = schema.save_run(schema.open_run(saved / "mhc.nc"), tmp_path / "m.nc")
    assert main(["analyze", str(path), "--json"]) == FINE
    told = json.loads(capsys.readouterr().out)
    with schema.open_run(path) as run:
        assert set(run["metrics"].data_vars) == set(told["metrics"])
        assert "residual" in run["trace"]
        assert run.attrs["family"] == "mhc"
        first = run["metrics"]["effective_rank"].sel(
            scope="sequence", tokens="all", centering="raw", stream="mean"
        )
        assert told["depth"]["m"][0]["effective_rank"] == pytest.approx(float(first[0, 0]))
    assert told["connection"]["m"][0]["composite_gain_forward"] == pytest.approx(1.0, abs=1e-3)
    assert told["depth"]["m"][0]["adjacent_cka"] is None  # undefined, not zero


def test_analyze_out_leaves_the_run_alone(saved, tmp_path, capsys):
    before = (saved / "residual.nc").read_bytes()
    out = tmp_path / "metrics.nc"
    words = [
        "analyze",
        str(saved / "residual.nc"),
        "--metrics",
        "effective_rank,token_cosine",
        "--out",
        str(out),
    ]
    assert main(words) == FINE
    assert (saved / "residual.nc").read_bytes() == before
    with schema.open_run(out) as run:
        assert "trace" not in run.children
        assert {"effective_rank", "token_cosine"} <= set(run["metrics"].data_vars)
        assert "participation_ratio" not in run["metrics"]
    assert "effective rank" in capsys.readouterr().out


WRONG_OPTIONS = {
    "scope": (["--scope", "nonsense"], "expected one of sequence, data"),
    "metric": (["--metrics", "effective_rank,nonsense"], "no metric 'nonsense'"),
    "decay": (["--decay", "0.5"], "expected --initial CHECKPOINT too"),
    "out": (["--out", "metrics.npy"], "expected a name that ends in .nc, .zarr, .zarr.zip"),
    "empty out": (["--out", ""], "expected a name that ends in .nc, .zarr, .zarr.zip"),
    "out of the run": (["--out", "RUN"], "is the run itself"),
}


@pytest.mark.parametrize(("options", "said"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_wrong_option_of_analyze_writes_nothing(saved, tmp_path, capsys, options, said):
    path = tmp_path / "r.nc"
    path.write_bytes((saved / "residual.nc").read_bytes())
    before = path.read_bytes(), path.stat().st_ino
    words = ["analyze", str(path), *(option.replace("RUN", str(path)) for option in options)]
    assert main(words) == USAGE
    assert said in capsys.readouterr().err
    assert (path.read_bytes(), path.stat().st_ino) == before
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_that_a_run_holds_stay_beside_those_measured_again(saved, tmp_path):
    path = schema.save_run(schema.open_run(saved / "mhc.nc"), tmp_path / "m.nc")
    assert main(["analyze", str(path), "--jackknife"]) == FINE
    first = schema.open_run(path)["metrics"].to_dataset().load()
    assert main(["analyze", str(path), "--metrics", "effective_rank,composite_gain,rbf_cka"]) == FINE
    second = schema.open_run(path)["metrics"].to_dataset().load()
    assert set(second.data_vars) - set(first.data_vars) == {"rbf_cka"}
    xr.testing.assert_allclose(second.drop_vars("rbf_cka"), first)
    assert second.attrs["complete"] is True
    assert second["effective_rank_stderr"].sel(scope="data").notnull().any()
    assert "rbf_cka" in first.attrs["on_request"]
    assert "rbf_cka" not in second.attrs["on_request"]
    for attr in ("not_computed", "notes"):
        assert second.attrs[attr] == first.attrs[attr]


def test_what_a_part_leaves_is_not_complete(saved, tmp_path):
    path = schema.save_run(schema.open_run(saved / "residual.nc"), tmp_path / "r.nc")
    for name in ("token_cosine", "effective_rank"):
        assert main(["analyze", str(path), "--metrics", name]) == FINE
    stored = schema.open_run(path)["metrics"]
    assert {"token_cosine", "effective_rank"} <= set(stored.data_vars)
    assert stored.attrs["complete"] is False


def test_every_chain_keeps_its_metrics(make_run, tmp_path):
    part = make_run("residual", layers=2)["trace"].to_dataset()
    run = schema.create_run({"encoder": part, "decoder": part}, attrs={"family": "residual", "n_streams": 1})
    path = schema.save_run(run, tmp_path / "r.nc")
    for name in ("residual_norm", "curvature"):
        assert main(["analyze", str(path), "--metrics", name]) == FINE
    stored = schema.open_run(path)
    for chain in ("encoder", "decoder"):
        assert {"residual_norm", "curvature"} <= set(stored[f"metrics/{chain}"].data_vars)
        assert "residual" in stored[f"trace/{chain}"]


def test_metrics_of_another_trace_are_not_mixed(saved, tmp_path, capsys):
    run = schema.open_run(saved / "residual.nc").load()
    run["metrics"] = xr.Dataset({"token_cosine": ("step", [0.0, 1.0])}, {"step": [5, 6]})
    path = schema.save_run(run, tmp_path / "r.nc")
    before = path.read_bytes()
    assert main(["analyze", str(path), "--metrics", "residual_norm"]) == USAGE
    assert "their step is not that of its trace" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_analyze_says_where_the_tables_over_pairs_are(saved, tmp_path, capsys):
    path = schema.save_run(schema.open_run(saved / "mhc.nc"), tmp_path / "m.nc")
    asked = ["analyze", str(path), "--metrics", "cka,pair_gain,curvature"]
    assert main(asked) == FINE
    said = " ".join(capsys.readouterr().out.split())
    assert "not printed: cka (estimator × tokens × depth × other depth), pair_gain (" in said
    assert "curvature (" in said
    assert f"they are in /metrics of {path}, in --json, and in: depthscope dashboard {path}" in said
    assert main([*asked, "--json"]) == FINE
    told = json.loads(capsys.readouterr().out)["apart"]["m"]
    assert told["cka"]["dims"] == ["depth", "other_depth"]
    stored = schema.open_run(path)["metrics"]["cka"].sel(estimator="unbiased", tokens="all")
    assert told["cka"]["values"][1] == pytest.approx(stored[0, 1].values.tolist())
    assert told["pair_gain"]["labels"]["other_connection"] == [0, 1, 2, 3, 4, 5]


def test_metrics_computed_on_request_stand_beside_the_others(saved, tmp_path):
    path = schema.save_run(schema.open_run(saved / "residual.nc"), tmp_path / "r.nc")
    assert main(["analyze", str(path), "--metrics", "intrinsic_dimension"]) == FINE
    (reading,) = read_runs({"r": schema.open_run(path)})
    assert {"effective_rank", "intrinsic_dimension"} <= set(reading.analysis)
    assert "intrinsic_dimension" not in reading.analysis.attrs["on_request"]
    assert "rbf_cka" in reading.analysis.attrs["on_request"]


def test_errors_of_pooled_metrics_are_a_choice(saved, tmp_path, capsys):
    out = tmp_path / "m.nc"
    asked = ["analyze", str(saved / "residual.nc"), "--metrics", "cka", "--out", str(out)]
    assert main([*asked, "--jackknife"]) == FINE
    assert "cka_stderr" in schema.open_run(out)["metrics"]
    assert main(asked) == FINE
    assert "cka_stderr" not in schema.open_run(out)["metrics"]


def test_the_logits_that_training_began_with_stand_in_a_run(tmp_path, capsys):
    model = deepseek_v4(2)
    model.save_pretrained(tmp_path / "initial")
    ids = torch.arange(24).reshape(2, 12) + 1
    path = str(schema.save_run(probes.capture(model, {"input_ids": ids}), tmp_path / "r.nc"))
    asked = ["analyze", path, "--metrics", "initial_distance,replay_distance"]
    assert main([*asked, "--decay", "0.5"]) == USAGE
    assert "expected --initial CHECKPOINT too" in capsys.readouterr().err
    assert main([*asked, "--initial", str(tmp_path / "initial"), "--decay", "0.5"]) == FINE
    run = schema.open_run(path)
    assert run["trace"]["initial_logits"].attrs["decay"] == 0.5
    assert set(run["metrics"].data_vars) == {"initial_distance", "replay_distance"}
    assert set(run.children) == {"trace", "statistics", "coverage", "metrics"}
    again = ["analyze", path, "--metrics", "mixing_gain", "--initial", str(tmp_path / "initial")]
    assert main(again) == FINE  # with another decay: what rested on the old one no longer holds
    assert set(schema.open_run(path)["metrics"].data_vars) == {"mixing_gain"}
    assert main([*asked, "--initial", str(tmp_path / "nowhere")]) == USAGE
    assert "no checkpoint at" in capsys.readouterr().err


def test_partial_metrics_in_a_run_are_not_taken_for_all(saved, tmp_path, capsys):
    path = schema.save_run(schema.open_run(saved / "hc.nc"), tmp_path / "h.nc")
    assert main(["analyze", str(path), "--metrics", "effective_rank"]) == FINE
    capsys.readouterr()
    assert main(["compare", str(path), "--metrics", "composite_gain", "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["aligned"][0]["metric"] == "composite_gain"


@pytest.fixture(scope="module")
def exploding(saved) -> str:
    """The HC run with every connection half as large again: 1.5 to the power of 6 is a gain above 10."""
    run = schema.open_run(saved / "hc.nc").load()
    run["trace"].dataset = run["trace"].to_dataset().assign(h_res=1.5 * run["trace"]["h_res"])
    return str(schema.save_run(run, saved.parent / "exploding.nc"))


def test_check_judges_and_exits_one_at_the_limit(exploding, saved, capsys):
    assert main(["check", exploding, "--fail-on", "warn", "--json"]) == FOUND
    told = json.loads(capsys.readouterr().out)
    severities = {each["severity"] for each in told["runs"][0]["findings"]}
    assert severities & {"WARN", "FAIL"}
    assert told["failed"] == ["exploding"]
    code = main(["check", str(saved / "residual.nc"), "--fail-on", "warn", "--json"])
    told = json.loads(capsys.readouterr().out)
    severe = [each for each in told["runs"][0]["findings"] if each["severity"] in ("WARN", "FAIL")]
    assert (code == FOUND) == bool(severe) == bool(told["failed"])


def test_check_by_verdict_name(exploding, capsys):
    main(["check", exploding, "--json"])
    found = json.loads(capsys.readouterr().out)["runs"][0]["findings"]
    name = next(each["verdict"] for each in found if each["severity"] in ("WARN", "FAIL"))
    other = next(verdict for verdict in VERDICTS if verdict not in {each["verdict"] for each in found})
    assert main(["check", exploding, "--fail-on", name]) == FOUND
    assert main(["check", exploding, "--fail-on", other]) == FINE


def test_check_text_names_run_and_result(saved, capsys):
    code = main(["check", str(saved)])
    out = capsys.readouterr().out
    assert all(f"{name} (synthetic-{name}, {name})" in out for name in ("residual", "hc", "mhc"))
    assert ("check --fail-on fail: passed" in out) == (code == FINE)
    assert "\x1b[" not in out  # plain where stdout is no terminal


def test_compare_aligns_by_relative_depth(saved, capsys):
    assert main(["compare", str(saved), "--metrics", "residual_norm", "--points", "3", "--json"]) == FINE
    told = json.loads(capsys.readouterr().out)
    assert [row["relative depth"] for row in told["aligned"]] == [0.0, 0.5, 1.0]
    assert {row["run"] for row in told["summary"]} == {"residual", "hc", "mhc"}
    with schema.open_run(saved / "hc.nc") as run:
        from depthscope.diagnostics import analyze

        last = analyze(run)["residual_norm"].sel(stream="mean").isel(step=-1, depth=-1)
    assert told["aligned"][-1]["hc"] == pytest.approx(float(last))


def test_compare_warns_of_other_token_counts(saved, tmp_path, make_run, capsys):
    other = schema.save_run(make_run("residual", layers=2, tokens=24), tmp_path / "long.nc")
    assert main(["compare", str(saved / "residual.nc"), str(other)]) == FINE
    assert "different numbers of tokens" in capsys.readouterr().err


def test_same_names_in_two_folders_stay_apart(saved, tmp_path, make_run, capsys):
    (tmp_path / "b").mkdir()
    other = schema.save_run(make_run("residual", layers=2), tmp_path / "b" / "hc.nc")
    assert main(["compare", str(saved / "hc.nc"), str(other), "--json"]) == FINE
    names = {row["run"] for row in json.loads(capsys.readouterr().out)["summary"]}
    assert names == {f"{saved.name}/hc", "b/hc"}


def _stand_in(monkeypatch, run: xr.DataTree):
    """A checkpoint that needs no weights: the capture gives a synthetic run."""
    seen = {}
    loaded = SimpleNamespace(model="model", tokenizer=None, name="tiny", digest="sha256:0", source="tiny")
    monkeypatch.setattr(
        "depthscope.probes.checkpoints.load.load_checkpoint",
        lambda spec, **more: seen.update(spec=spec, **more) or loaded,
    )
    monkeypatch.setattr(
        "depthscope.probes.checkpoints.text_batch.encode_text",
        lambda model, text, **more: seen.update(text=text, **more) or {},
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
    out = tmp_path / "r.nc"
    words = [
        "probe",
        "tiny",
        "--text",
        str(tmp_path / "t.txt"),
        "--out",
        str(out),
        "--seed",
        "3",
        "--dtype",
        "float32",
    ]
    assert main([*words, "--no-gradients", "--layers", "blocks", "--length", "64", "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["sizes"]["run"]["depths"] == 3
    assert (seen["text"], seen["length"], seen["seed"], seen["dtype"]) == ("some words", 64, 3, "float32")
    assert (seen["gradients"], seen["layers"]) == (False, "blocks")
    with schema.open_run(out) as run:
        assert run.attrs["model"] == "tiny"
        assert run.attrs["data"] == "t.txt"
        assert run.attrs["data_digest"].startswith("sha256:")


def test_refused_capture_is_a_line(monkeypatch, tmp_path, make_run, capsys):
    from depthscope.probes.model.arguments import CaptureError

    _stand_in(monkeypatch, make_run("residual", layers=2))

    def refuse(*_, **__):
        raise CaptureError("no residual stream was found; give layers=")

    monkeypatch.setattr(probes, "capture", refuse)
    (tmp_path / "t.txt").write_text("some words")
    assert main(["probe", "x", "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "r.nc")]) == USAGE
    assert "no residual stream was found" in capsys.readouterr().err
    assert not (tmp_path / "r.nc").exists()


@pytest.mark.parametrize(("content", "said"), [(b"\xff\xfe", "not UTF-8"), (b" \n", "holds no text")])
def test_text_must_be_text(content, said, tmp_path, capsys):
    (tmp_path / "t.txt").write_bytes(content)
    assert main(["probe", "x", "--text", str(tmp_path / "t.txt"), "--out", "r.nc"]) == USAGE
    assert said in capsys.readouterr().err


def test_probe_describe_check_for_real(tmp_path, capsys):
    """One small model through the true probes: factory, capture, check."""
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    spec, out = "depthscope.app.study.small_lm:residual", tmp_path / "r.nc"
    pytest.importorskip("depthscope.app.study.small_lm")
    sizes = ["--sequences", "2", "--length", "32"]
    assert main(["probe", spec, "--text", str(tmp_path / "t.txt"), "--out", str(out), *sizes]) == FINE
    assert main(["describe", spec, "--json"]) == FINE
    assert "residual" in capsys.readouterr().out
    assert main(["check", str(out)]) in (FINE, FOUND)
