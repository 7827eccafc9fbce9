"""The table of verdicts: the worst run first, seeds in one row, and what was not judged is no pass."""

from depthscope.app.readings.kept_readings import Summary, summary_of
from depthscope.app.readings.readings import read_runs
from depthscope.app.readings.standings import NOT_JUDGED, Standing
from depthscope.app.tables.verdict_table import groupable, has_seeds, verdict_table
from depthscope.diagnostics import Finding, Severity, save_run
from depthscope.diagnostics.verdicts import VERDICTS


def summary(name, told=(), **attrs):
    standings = {verdict: Standing("PASS") for verdict in VERDICTS}
    standings["stream_collapse"] = Standing(NOT_JUDGED, reason="one stream")
    for verdict, severity, first, last in told:
        finding = Finding(
            verdict, Severity[severity], "It is.", "m", 1.0, 2.0, "this project", "depth", first, last, "Do."
        )
        standings[verdict] = Standing(severity, finding)
    return Summary(name, {"model": "m", **attrs}, standings, 12)


HEALTHY = summary("healthy", seed=0)
WARNED = summary("warned", [("rank_collapse", "WARN", 3, 5)], width=2)
FAILED = summary("failed", [("dead_state", "FAIL", 7, 7)], width=4)


def test_the_worst_run_is_first_and_a_cell_says_where():
    table = verdict_table([HEALTHY, WARNED, FAILED])
    assert table.cells["run"].tolist() == ["failed", "warned", "healthy"]
    assert table.cells["live states"].tolist() == ["✕ 7", "✓", "✓"]
    assert table.cells["no rank collapse"].tolist() == ["✓", "▲ 3–5", "✓"]
    assert table.depths[0] == {"live states": 7}
    assert "not judged" in table.cells["other verdicts"][0]
    assert list(table.states.columns) == list(table.cells.columns)
    worst = [each.finding.verdict if each else None for each in table.worst]
    assert worst == ["dead_state", "rank_collapse", None]


def test_not_judged_is_shown_as_neither_passed_nor_failed():
    told = summary("streams", [("stream_collapse", "FAIL", 0, 3)])
    table = verdict_table([HEALTHY, told])
    assert table.cells["distinct streams"].tolist() == ["✕ 0–3", "–"]
    assert table.states["distinct streams"].tolist() == ["FAIL", NOT_JUDGED]


def test_the_counts_are_those_of_the_terminal_and_a_connection_opens_the_depth_it_writes(
    make_run, tmp_path, capsys
):
    from depthscope.app.cli.main import main

    path = tmp_path / "mhc.zarr.zip"
    save_run(make_run("mhc"), path)
    main(["check", str(path)])
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  verdicts ")]
    (reading,) = read_runs({"mhc": make_run("mhc")})
    found = summary_of(reading)
    table = verdict_table([found])
    assert said.removeprefix("  verdicts ").partition(" (")[0] in table.cells["other verdicts"][0]
    outs = reading.analysis["depth_out"].values
    placed = {
        name: standing
        for name, standing in found.standings.items()
        if standing.finding is not None and standing.finding.axis == "connection"
    }
    assert placed
    for standing in placed.values():
        assert standing.depth == outs[standing.finding.worst]


def test_a_cell_about_connections_opens_its_worst_depth():
    finding = Finding(
        "stream_collapse",
        Severity.FAIL,
        "It is.",
        "m",
        1.0,
        2.0,
        "this project",
        "connection",
        7,
        15,
        "Do.",
        worst=12,
    )
    told = summary("streams")
    told.standings["stream_collapse"] = Standing("FAIL", finding, depth_out=13)
    table = verdict_table([told])
    assert table.cells["distinct streams"].tolist() == ["✕ connection 7–15"]
    assert table.depths == [{"distinct streams": 13}]


def test_groups_stand_together_and_only_attributes_with_few_values_group():
    assert groupable([HEALTHY, WARNED, FAILED]) == ["width"]
    many = [summary(f"r{i}", digest=str(i)) for i in range(30)]
    assert groupable(many) == []
    table = verdict_table([HEALTHY, WARNED, FAILED], group_by="width")
    assert table.cells["width"].tolist() == ["2", "4", "–"]


def test_seeds_of_one_experiment_fold_into_a_row_that_counts_them():
    seeds = [summary(f"s{seed}", seed=seed) for seed in range(3)]
    seeds[1] = summary("s1", [("rank_collapse", "WARN", 4, 4)], seed=1)
    other = summary("other", seed=0, num_blocks=3)
    assert has_seeds([*seeds, other])
    table = verdict_table([*seeds, other], fold_seeds=True)
    assert table.runs == [["s0", "s1", "s2"], ["other"]]
    assert table.cells["run"][0] == "s0 and 2 more seeds"
    assert table.cells["no rank collapse"].tolist() == ["▲ 4 (1 of 3)", "✓"]


def test_two_runs_of_one_seed_are_two_rows():
    twice = [summary("a", seed=0), summary("b", seed=0)]
    assert not has_seeds(twice)
    assert len(verdict_table(twice, fold_seeds=True).runs) == 2
