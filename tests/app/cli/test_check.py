"""check: findings in words and in JSON, and the exit code at the limit."""

from __future__ import annotations

import json

import pytest

from depthscope.app.cli.main import FINE, FOUND, main
from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.schema import COMPLETE
from depthscope.diagnostics.verdicts import VERDICTS
from tests.app.cli.conftest import METRICS


@pytest.fixture(scope="module")
def exploding(unmeasured, tmp_path_factory) -> str:
    """The HC run with every connection half as large again: 1.5 to the power of 6 is a gain above 10."""
    run = schema.open_run(unmeasured / "hc.zarr.zip").load()
    run["trace"].dataset = run["trace"].to_dataset().assign(h_res=1.5 * run["trace"]["h_res"])
    run["metrics"] = analyze(run, metrics=METRICS).assign_attrs({COMPLETE: True})
    return str(schema.save_run(run, tmp_path_factory.mktemp("runs") / "exploding.zarr.zip"))


def test_check_judges_and_exits_one_at_the_limit(exploding, saved, capsys):
    assert main(["check", exploding, "--fail-on", "warn", "--json"]) == FOUND
    printed = json.loads(capsys.readouterr().out)
    severities = {each["severity"] for each in printed["runs"][0]["findings"]}
    assert severities & {"WARN", "FAIL"}
    assert printed["failed"] == ["exploding"]
    code = main(["check", str(saved / "residual.zarr.zip"), "--fail-on", "warn", "--json"])
    printed = json.loads(capsys.readouterr().out)
    severe = [each for each in printed["runs"][0]["findings"] if each["severity"] in ("WARN", "FAIL")]
    assert (code == FOUND) == bool(severe) == bool(printed["failed"])


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
