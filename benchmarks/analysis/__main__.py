"""Are the analyzers right, and how fast? Beside the named peers, at equal answers: ``python -m benchmarks.analysis``.

Every tool first answers the same questions, and is held against a float64 reference. Then all are timed in turn, several
rounds, and the medians are given as ratios in the same process. Peers that are not installed are rows that say so. Every
goal is printed with the number that was found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.analysis import goals, measure, page
from benchmarks.analysis.question import Question
from benchmarks.shared import process, tables

TOPICS = ("cka", "one_pass", "ranks", "mixing", "others", "steps")
PEERS = (
    *("torch-cka", "cka-pytorch", "pytorch-cka", "ckatorch", "repsim", "torchlens"),
    *("scikit-dimension", "dimensionality", "rsatoolbox"),
)


def main() -> None:
    """Measure, print the tables, and write what was asked for."""
    arguments = parsed()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    found = asked(arguments)
    results = {"questions": found, "goals": goals.judged(found), "rounds": arguments.rounds}
    results |= tables.circumstances("benchmarks.analysis", (*page.PACKAGES, *PEERS))
    print(json.dumps(results, indent=1) if arguments.json else page.text(results))
    if arguments.markdown:
        tables.put_section(arguments.markdown, "benchmarks.analysis", page.markdown(results))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=TOPICS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, two rounds, one process a question: only to see it run",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path, help="write its part of this page, docs/analyzers.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = min(arguments.rounds, 2) if arguments.quick else arguments.rounds
    return arguments


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Question to its title, note, baseline and rows; each group of tools in a process of its own."""
    found = {}
    for topic in arguments.topics:
        for name, question in questions(topic, quick=arguments.quick).items():
            found[name] = {
                "title": question.title,
                "note": question.note,
                "baseline": question.baseline,
                "rows": rows(topic, name, question, arguments),
            }
    return found


def questions(topic: str, *, quick: bool) -> dict[str, Question]:
    return importlib.import_module(f"benchmarks.analysis.{topic}").questions(quick)


def rows(topic: str, name: str, question: Question, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every tool's row, in the order in which the question names them."""
    found: dict[str, Any] = {}
    for names in [list(question.tools)] if arguments.quick else question.groups():
        print(f"{name}: {'; '.join(names)}", file=sys.stderr)
        task = {"topic": topic, "question": name, "names": names}
        answer = process.ask(
            "benchmarks.analysis", task | {"rounds": arguments.rounds, "quick": arguments.quick}
        )
        if "reason" in answer:
            answer = dict.fromkeys(names, answer)
        found = answer | found  # the baseline's row is that of the first group
    return {tool: found[tool] for tool in question.tools}


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What a worker process does: the rows of some tools for one question."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    question = questions(task["topic"], quick=task["quick"])[task["question"]]
    return measure.rows(question, task["names"], task["rounds"])


if __name__ == "__main__":
    main()
