"""How does each damaged file end? Every case is damaged and opened in a forked process, by the number of the case alone."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.fuzz.damage import damaged_copy
from tests.fuzz.isolation import in_child
from tests.fuzz.material import contents, write_checkpoints, write_runs
from tests.fuzz.outcomes import (
    CLEAR,
    DIFFERENT,
    EQUAL,
    FAILURES,
    SECONDS,
    UNVERIFIED,
    Answer,
    as_json,
    of_call,
    of_command,
    of_process,
)

MIB = 700
"""Memory of a case above that of the process it is forked from: building a model is part of it."""
MORE = (["analyze", "--json"], ["compare"], ["report", "--out", "report.html"], ["export", "--out", "paper"])
"""Commands that are tried with some of the runs too."""


def open_run(path: Path, expected: Path, rng: Random) -> list[Answer]:
    """Answers of `open_run` with all arrays read, of `check`, and of one more command where the run is refused."""
    from depthscope.diagnostics import schema

    def call() -> tuple[str, str]:
        with schema.open_run(path) as run:
            found, integrity = contents(run.load()), schema.integrity(run)
        if found == pickle.loads(expected.read_bytes()):
            return EQUAL, integrity
        return (UNVERIFIED if integrity.startswith("not verified") else DIFFERENT), integrity

    answers = [of_call("open_run", call)]
    if answers[0].outcome != CLEAR:  # what is accepted is analysed, which takes seconds
        return answers
    words = rng.choice(MORE)
    return [*answers, of_command(["check", str(path)]), of_command([words[0], str(path), *words[1:]])]


def _material(folder: Path) -> dict[str, list[str]]:
    """Whole files by kind and path, with what the command that reads them needs."""
    (folder / "runs").mkdir()
    (folder / "checkpoints").mkdir()
    checkpoints = write_checkpoints(folder / "checkpoints")
    return {str(path): ["run"] for path in write_runs(folder / "runs")} | {
        str(path): ["describe", *words] for path, words in checkpoints.items()
    }


def run_cases(seeds: range, *, keep: Path | None = None) -> Iterator[tuple[int, str, str, str]]:
    """For each case its number, its outcome, what was damaged, and the worst answer."""
    # Not TemporaryDirectory: a case runs Python's exit functions, and these would remove the folder.
    material = Path(tempfile.mkdtemp(prefix="depthscope-fuzz-"))
    try:
        made = in_child(lambda: _material(material), seconds=300)
        if made.answer is None:
            raise RuntimeError(f"the files to damage could not be written: {made.stderr[-2000:]}")
        _import_all(next(path for path in made.answer if path.endswith(".nc")))
        for seed in seeds:
            yield seed, *_run_case(seed, made.answer, keep)
    finally:
        shutil.rmtree(material, ignore_errors=True)


def _run_case(seed: int, material: dict[str, list[str]], keep: Path | None) -> tuple[str, str, str]:
    rng = Random(seed)
    source, words = list(material.items())[seed % len(material)]
    folder = Path(tempfile.mkdtemp(prefix="depthscope-fuzz-case-"))
    try:
        # In a process of its own: a library that was used on nonsense is not the one that opens the file.
        made = in_child(
            lambda: [str(part) for part in damaged_copy(Path(source), folder, rng, rng.choice((1, 1, 3)))],
            seconds=60,
        )
        if made.answer is None:
            raise RuntimeError(f"case {seed} could not be damaged: {made.stderr[-1500:]}")
        path, what = made.answer

        def opened() -> list[dict[str, str]]:
            os.chdir(folder)
            if words == ["run"]:
                return as_json(open_run(Path(path), Path(f"{source}.expected"), rng))
            return as_json([of_command([words[0], path, *words[1:]])])

        ended = in_child(opened, seconds=3 * SECONDS, exit_functions=True)
        outcome, answers = of_process(ended, mib=MIB)
        if outcome in FAILURES and keep is not None:
            # Not shutil: pipes and sparse files are copied as what they are.
            os.system(f"cp -a --sparse=always '{folder}' '{keep / str(seed)}'")
        worst = next(answer for answer in answers if answer.outcome == outcome)
        return outcome, f"{Path(source).name}: {what}", f"{worst.door}: {worst.message}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _import_all(run: str) -> None:
    """Import what the cases import, and nothing that starts a thread: a fork would stop it."""
    import numcodecs
    import safetensors.torch
    import torch
    import transformers

    from depthscope import diagnostics, probes
    from depthscope.app.cli import main
    from depthscope.app.tables import tables

    assert all((safetensors.torch, torch, transformers.LlamaForCausalLM, probes, main, tables))
    # Safety must not hang on the default of a dependency: unpickling is allowed here, as a careless environment may have it.
    numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE = True
    with diagnostics.schema.open_run(Path(run)) as opened:  # imports inside functions
        diagnostics.judge(diagnostics.analyze(opened.load()))
