"""A card says the verdict, where, why and what to do next in at most twelve lines, the same on every face."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from depthscope.app.cli.main import main
from depthscope.app.text.cards import (
    CARD_SCHEMA,
    MOST_LINES,
    card_lines,
    card_of,
    cards_text,
    explanation,
    names,
)
from depthscope.app.text.terminal import encodable, say
from depthscope.diagnostics import Finding, Severity, save_run
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
        assert len(lines) <= MOST_LINES
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


@pytest.mark.parametrize(
    "change", [{"severity": "fatal"}, {"value": "large"}, {"schema": "depthscope.finding/2"}]
)
def test_the_schema_refuses_what_it_does_not_mean(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(card_of(FINDING).as_dict() | change, SCHEMA)


# --- explanations


def test_everything_is_explained():
    for name in names():
        text = explanation(name)
        assert ".. math::" not in text
        assert ":math:" not in text
        assert "Source: " in text
        assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith(" "))
