"""A card says the verdict, where, why and what to do next in at most twelve lines, the same on every face."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from depthscope.app.cli.main import main
from depthscope.app.text.cards import (
    CARD_SCHEMA,
    MOST_BLOCKS,
    card_lines,
    card_of,
    cards_text,
    curve_blocks,
    curve_words,
    explanation,
)
from depthscope.app.text.terminal import encodable, say
from depthscope.diagnostics import CATALOGUE, Finding, Severity, save_run
from depthscope.diagnostics.verdicts import VERDICTS

SCHEMA = json.loads(
    (Path(__file__).parents[3] / "docs" / "schemas" / "finding.v1.json").read_text(encoding="utf-8")
)

FINDING = Finding(
    verdict="rank_collapse", severity=Severity.FAIL, sentence="The ratio is 0.02 at depth 5, below 0.1 (this project).",
    metric="effective_rank", value=0.02, threshold=0.1, source="this project", axis="depth", first=5, last=7,
    advice="Check the skips.", quantity="ratio",
)  # fmt: skip


def test_a_card_has_its_four_parts():
    assert card_lines(card_of(FINDING)) == [
        "FAIL  The tokens of a sequence become equal.",
        "      Where    depth 5–7",
        "      Why      The ratio is 0.02 at depth 5, below 0.1 (this project).",
        "      Next     Check the skips.",
    ]


def test_the_experiment_and_its_result_follow_the_advice():
    card = card_of(FINDING, experiment="depthscope ablate c --skip 5", result="Loss + 0.3 ± 0.1 nats.")
    assert card_lines(card)[-2:] == [
        "               depthscope ablate c --skip 5",
        "      Result   Loss + 0.3 ± 0.1 nats.",
    ]


def test_no_card_has_more_than_twelve_lines():
    for verdict in VERDICTS:
        long = "It is so here. " * 60
        known = VERDICTS[verdict]
        found = replace(
            FINDING, verdict=verdict, sentence=long, advice=known.advice, because="gain_explosion",
            proof="unproven: a branch was not seen", profile=tuple(range(1000)),
        )  # fmt: skip
        lines = card_lines(card_of(found, experiment="depthscope ablate " + "x" * 200, result=long))
        assert len(lines) <= 12  # a longer card is not read
        assert lines[0] == f"FAIL  {known.title}"
        assert "a branch was not seen" in "\n".join(lines)
        assert all(len(line) <= 100 for line in lines if "x" * 200 not in line)
        # What is cut is cut at the end of a sentence, and says so.
        why = " ".join(line.strip() for line in lines[2:6])
        assert why.endswith("It is so here. …")


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_card_fits_a_narrow_terminal_and_says_the_same(width):
    for verdict in VERDICTS:
        found = replace(
            FINDING, verdict=verdict, advice=VERDICTS[verdict].advice, because="gain_explosion", profile=(0.1, 0.5, 0.02)
        )  # fmt: skip
        card = card_of(
            found,
            experiment="depthscope ablate run.zarr.zip --do skip --depths 5-7 --out 'my effects.zarr.zip'",
        )
        lines = card_lines(card, width=width)
        assert max(map(len, lines)) <= width
        words = [word for line in lines for word in line.split() if word != "\\"]
        assert words == [word for line in card_lines(card) for word in line.split()]


def test_a_terminal_without_blocks_gets_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    found = replace(FINDING, profile=(0.1, 0.5, float("nan"), 0.02), sentence="Below 0.1 ± 0.02, σ₂ …")
    text = cards_text([card_of(found)], width=60, shown=encodable)
    say(text)
    stream.flush()
    printed = stream.buffer.getvalue().decode("ascii")
    assert printed == text + "\n"
    assert "\\u" not in printed
    (curve,) = [line for line in printed.splitlines() if line.startswith("      Curve")]
    assert len(curve.split()[1]) == 4


def test_the_advice_of_every_verdict_fits_on_its_card():
    for verdict in VERDICTS:
        lines = card_lines(card_of(replace(FINDING, verdict=verdict, advice=VERDICTS[verdict].advice)))
        assert "…" not in "\n".join(lines)


# --- machines


def test_the_json_is_what_the_published_schema_says(mhc_run, tmp_path, capsys):
    path = tmp_path / "mhc.zarr.zip"
    save_run(mhc_run, path)
    main(["check", str(path), "--json"])
    findings = json.loads(capsys.readouterr().out)["runs"][0]["findings"]
    assert findings
    for finding in findings:
        jsonschema.validate(finding, SCHEMA)
        assert finding["schema"] == CARD_SCHEMA == SCHEMA["title"]


# --- explanations


def test_everything_is_explained():
    for name in (*VERDICTS, *CATALOGUE):
        text = explanation(name)
        assert ".. math::" not in text
        assert ":math:" not in text
        assert "Source: " in text
        assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith(" "))


# --- the small curve

NAN = math.nan


def judged(profile, **facts):
    return replace(FINDING, **{"threshold": 0.5, "above": True, "profile": tuple(profile), **facts})


def test_the_words_of_a_curve_name_range_limit_side_and_gaps():
    assert curve_words(judged([0.1, NAN, 0.9])) == "depth 0–2: 0.100 to 0.900, worse above 0.5; 1 undefined"
    assert curve_words(judged([3.0, 2.0], above=False, axis="connection")) == (
        "connection 0–1: 2.00 to 3.00, worse below 0.5"
    )
    for profile in [(), (1.0,), (NAN, NAN), (NAN, 2.0), (math.inf, 1.0)]:
        assert (curve_words(judged(profile)), curve_blocks(judged(profile))) == ("", "")


def test_blocks_rise_with_the_numbers_and_keep_gaps_and_the_worst_one():
    assert curve_blocks(judged([0.0, NAN, 1.0])) == "▁·█"
    assert curve_blocks(judged([1.0, 10.0, 100.0])) == "▁▅█"
    assert curve_blocks(judged([1.0, 1.0 - 1e-16, 1.0])) == ""
    alike = judged([1.0 - 1e-6, 1.0 - 4e-5, 1.0 - 2e-6], threshold=0.99)
    assert curve_words(alike) == "depth 0–2: 1 − x from 1e-6 to 4e-5, worse below 0.01"
    assert max(curve_blocks(alike)) == curve_blocks(alike)[1] > curve_blocks(alike)[0]
    values = np.zeros(5000)
    values[3333] = 7.0
    blocks = curve_blocks(judged(values))
    assert len(blocks) == MOST_BLOCKS
    assert blocks.count("█") == 1
    assert curve_blocks(judged(10 - values, above=False)).count("▁") == 1
