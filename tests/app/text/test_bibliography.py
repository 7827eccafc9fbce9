"""The bibliography: one reader, whose words are those of the entries."""

from __future__ import annotations

import tomllib
from pathlib import Path

from depthscope.app.text.bibliography import (
    bibliography,
    cited,
    cut,
    entries,
    keys_of,
    reference,
    source_words,
)

KEYS = list(entries(bibliography()))


def test_every_entry_has_authors_a_year_and_a_title_without_tex():
    for key in KEYS:
        found = reference(key)
        assert found.surnames
        assert found.year.isdigit()
        assert len(found.year) == 4
        for words in (found.author_year, found.title):
            assert words
            assert not set(words) & set("{}\\$")


def test_names_are_those_that_people_write():
    assert reference("marchenko1967distribution").author_year == "Marčenko & Pastur 1967"
    assert reference("golub2013matrix").author_year == "Golub & Van Loan 2013"
    assert reference("xie2025mhc").author_year == "Xie et al. 2025"


def test_a_link_is_the_preprint_else_the_doi_else_nothing():
    assert reference("dong2021attention").url == "https://arxiv.org/abs/2103.03404"
    assert reference("marchenko1967distribution").url.startswith("https://doi.org/10.1070/")
    assert reference("golub2013matrix").url == ""


def test_keys_in_sentences_become_words_and_others_stay():
    assert cited("above 10 (roy2007effective), not (nobody2020nothing)") == (
        "above 10 (Roy & Vetterli 2007), not (nobody2020nothing)"
    )
    assert source_words("roy2007effective, this project") == "Roy & Vetterli 2007; this project"


def test_a_cut_keeps_the_order_of_the_bibliography():
    assert list(entries(cut(reversed(KEYS)))) == KEYS
    assert keys_of(["this project", KEYS[1]]) == [KEYS[1]]


CHECKED = tomllib.loads(Path(__file__).with_name("checked_references.toml").read_text(encoding="utf-8"))


def letters(text: str) -> str:
    """Letters and digits alone: sources differ in capitals, dashes and signs."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def test_every_entry_was_compared_with_a_source():
    missing = [key for key in KEYS if key not in CHECKED]
    assert not missing, f"compare {missing} with a source and write what it says to checked_references.toml"
    assert not [key for key in CHECKED if key not in KEYS]


def test_an_entry_says_what_its_source_says():
    for key in KEYS:
        found, source = reference(key), CHECKED[key]
        assert letters(found.title) == letters(source["title"].replace(r"$\alpha$", "α"))
        assert len(found.surnames) == len(source["authors"])
        for name, said in zip(found.surnames, source["authors"], strict=True):
            # Of a team, such as OpenAI's, the last word is its surname.
            assert letters(name) in (letters(said), letters(said.split()[-1]))
        assert found.year == source["year"]
        assert source["source"]
        entry = entries(bibliography())[key]
        for identifier in source["identifiers"]:
            assert identifier in entry
        known = {*source["identifiers"], *source.get("not_found", ())}
        assert {found.eprint, found.doi} - {""} <= known
