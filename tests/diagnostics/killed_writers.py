"""What is left of a file whose writer is killed at a random moment? ``python tests/diagnostics/killed_writers.py zarr``.

One process imports everything, builds what is written and writes it once elsewhere; every writer is a fork of it, which starts
in milliseconds and imports nothing more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SMALL = {"layers": 1, "tokens": 8, "features": 8}
# A write that nobody disturbs comes after every so many kills: it succeeds, and nothing is left of those that were killed.
UNDISTURBED = 10
FORMER, NEW, MISSING, HALF = STATES = ("former", "new", "missing", "half")


@dataclass
class Writer:
    """One kind of write: where to, how the former and the new content get there, and which of them is there."""

    target: Path
    write: Callable[[str], object]
    state: Callable[[], str]
    beside: tuple[str, ...] = ()
    """Other names that belong in the target's folder."""

    def litter(self) -> list[str]:
        known = {self.target.name, *self.beside}
        return sorted(name for name in os.listdir(self.target.parent) if name not in known)


# --- what is written


def _run_writer(folder: Path, suffix: str) -> Writer:
    from depthscope.diagnostics import schema
    from tests.models.synthetic_run import synthetic_run

    runs = {FORMER: synthetic_run("residual", **SMALL), NEW: synthetic_run("hc", seed=1, **SMALL)}
    target = folder / f"run{suffix}"
    return Writer(
        target, lambda which: schema.save_run(runs[which], target), lambda: _which_run(target, runs)
    )


def _which_run(target, runs) -> str:
    from depthscope.diagnostics import schema

    if not os.path.lexists(target):
        return MISSING
    try:
        with schema.open_run(target) as run:
            found = run.load()
            return next((which for which, expected in runs.items() if found.identical(expected)), HALF)
    except Exception:
        return HALF


def _analysis_writer(folder: Path) -> Writer:
    from depthscope.app.cli.main import main
    from depthscope.diagnostics import schema
    from tests.models.synthetic_run import synthetic_run

    run = synthetic_run("hc", **SMALL)
    target = folder / "run.nc"

    def write(which: str) -> None:
        if which == FORMER:
            schema.save_run(run, target)
            return
        # Without arguments, as the command line calls it: SIGTERM is handled then.
        sys.argv = ["depthscope", "analyze", str(target), "--metrics", "stream_cosine"]
        if main() != 0:
            raise RuntimeError("analyze failed")

    def state() -> str:
        if not os.path.lexists(target):
            return MISSING
        try:
            with schema.open_run(target) as found:
                same = found["trace"].load().identical(run["trace"])
                metrics = found["metrics"].load() if "metrics" in found.children else None
        except Exception:
            return HALF
        if not same or (metrics is not None and "stream_cosine" not in metrics):
            return HALF
        return FORMER if metrics is None else NEW

    return Writer(target, write, state)


def _files(target: Path) -> dict[str, str]:
    paths = [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else [target]
    return {str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _file_writer(target: Path, write: Callable[[str], object], *beside: str) -> Writer:
    """A writer whose output is the same bytes each time: which they are is found out once."""
    expected = {}
    for which in (NEW, FORMER):
        if _in_child(partial(write, which)) != 0:
            raise RuntimeError(f"the {which} content cannot be written")
        expected[which] = _files(target)

    def state() -> str:
        if not os.path.lexists(target):
            return MISSING
        found = _files(target)
        return next((which for which in (FORMER, NEW) if found == expected[which]), HALF)

    return Writer(target, write, state, beside)


def _export_writer(folder: Path) -> Writer:
    from depthscope.app.paper import contents, export
    from depthscope.app.paper.contents import draw_all
    from tests.models.synthetic_run import synthetic_run

    # All of them take half a minute.
    contents.draw_all = lambda readings, view: draw_all(readings, view)[:2]
    export.QUESTIONS = dict(list(export.QUESTIONS.items())[:1])
    runs = {FORMER: {"a": synthetic_run("residual", **SMALL)}, NEW: {"b": synthetic_run("hc", **SMALL)}}
    target = folder / "paper"
    target.mkdir()
    _in_child(lambda: export.write_bundle(runs[FORMER], target))
    (target / "figures" / "mine.pdf").write_text("drawn by hand")
    (target / "notes").mkdir()
    (target / "notes" / "mine.txt").write_text("read before submitting")
    return _file_writer(target, lambda which: export.write_bundle(runs[which], target))


def _report_writer(folder: Path) -> Writer:
    from depthscope.app.paper import contents
    from depthscope.app.paper.contents import draw_all
    from depthscope.app.report.report import write_report
    from tests.models.synthetic_run import synthetic_run

    contents.draw_all = lambda readings, view: draw_all(readings, view)[:2]
    runs = {FORMER: {"a": synthetic_run("residual", **SMALL)}, NEW: {"b": synthetic_run("hc", **SMALL)}}
    target = folder / "report.html"
    return _file_writer(target, lambda which: write_report(runs[which], target))


def _study_writer(folder: Path) -> Writer:
    from depthscope.app.study import study
    from depthscope.app.study.corpus import split_corpus
    from depthscope.app.study.learner import create_learner
    from depthscope.app.study.recipe import Recipe
    from depthscope.app.study.small_lm import Size
    from depthscope.probes.checkpoints.text_batch import sample_text

    size = Size(layers=2, width=16, heads=2)
    recipe = Recipe(steps=1, batch=2, length=8, size=size, probed_sequences=2, probed_length=16)
    corpus = split_corpus(sample_text())
    learners = {}
    for seed, which in enumerate((FORMER, NEW)):
        learner = create_learner("residual", study.replace(recipe, seed=seed))
        learner.losses.append(5.0)
        learners[which] = learner
    target = folder / "residual.safetensors"
    return _file_writer(
        target,
        lambda which: study._save(learners[which], corpus, recipe, folder / "residual.nc", 1.0),
        "residual.nc",
    )


def _cache_writer(folder: Path) -> Writer:
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from depthscope.probes.checkpoints import gguf

    os.environ["XDG_CACHE_HOME"] = str(folder)
    file = folder.parent / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip
    built = {}
    for which in (FORMER, NEW):
        torch.manual_seed(len(built))
        built[which] = transformers.LlamaForCausalLM(config).eval()

    def write(which: str) -> None:
        gguf._convert = lambda _file: (built[which], tokenizer)
        # A copy of another version of transformers is made anew.
        transformers.__version__ = {FORMER: "5.0.1", NEW: "5.0.2"}[which]
        gguf.load_gguf(file)

    (folder / "depthscope").mkdir(mode=0o700)
    _in_child(partial(write, FORMER))
    (target,) = (folder / "depthscope").glob("tiny-*")
    return _file_writer(target, write)


KINDS: dict[str, Callable[[Path], Writer]] = {
    "nc": partial(_run_writer, suffix=".nc"),
    "zarr": partial(_run_writer, suffix=".zarr"),
    "zarr.zip": partial(_run_writer, suffix=".zarr.zip"),
    "analyze": _analysis_writer,
    "export": _export_writer,
    "report": _report_writer,
    "study": _study_writer,
    "cache": _cache_writer,
}


# --- writers are forks


def _fork(work: Callable[[], object]) -> int:
    """Do some work in a fork of this process; its exit status is 0 where it succeeded."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("SHOW_ERRORS"):
            os.dup2(null, 1)
            os.dup2(null, 2)
        result = work()
        status = result if isinstance(result, int) and not isinstance(result, bool) else 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        if os.environ.get("SHOW_ERRORS"):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _in_child(work: Callable[[], object]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_fork(work), 0)[1])


def _state(writer: Writer) -> str:
    return STATES[_in_child(lambda: STATES.index(writer.state()))]


def kill_writers(kind: str, moments: int, seed: int = 0) -> dict[str, object]:
    """Kill so many writers of one kind at random moments, and count what was left.

    Between them, and at the end, is a write that nobody disturbs.
    """
    place = Path(tempfile.mkdtemp(prefix="killed-writers-"))
    try:
        for name in ("warm", "folder"):
            (place / name).mkdir()
        warm = KINDS[kind](place / "warm")
        for which in (FORMER, NEW):
            warm.write(which)
        writer = KINDS[kind](place / "folder")
        if _in_child(lambda: writer.write(FORMER)) != 0 or _state(writer) != FORMER:
            raise RuntimeError(f"{kind}: the former content cannot be written")
        started = time.perf_counter()
        status = _in_child(lambda: writer.write(NEW))
        seconds = time.perf_counter() - started
        if status != 0 or _state(writer) != NEW:
            raise RuntimeError(f"{kind}: the new content cannot be written")
        counts: Counter[str] = Counter()
        chance = random.Random(seed)
        for moment in range(moments):
            if moment % UNDISTURBED == 0:
                counts.update(_write_undisturbed(writer))
            # The next one replaces what is there now.
            before = _state(writer)
            which = NEW if before == FORMER else FORMER
            number = (signal.SIGKILL, signal.SIGTERM)[moment % 2]
            counts.update(_kill_one(writer, which, chance.uniform(0, seconds), number))
        counts.update(_write_undisturbed(writer))
        return {
            "kind": kind,
            "moments": moments,
            "seconds": round(seconds, 3),
            **dict(sorted(counts.items())),
        }
    finally:
        shutil.rmtree(place)


def _kill_one(writer: Writer, which: str, delay: float, number: int) -> list[str]:
    litter = writer.litter()
    child = _fork(lambda: writer.write(which))
    time.sleep(delay)
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    state = _state(writer)
    # Relative to this write: NEW is what it wrote.
    seen = [f"exit {code}", state if state in (MISSING, HALF) else NEW if state == which else FORMER]
    if set(writer.litter()) - set(litter):
        seen.append(f"litter after {signal.Signals(number).name}")
    if state in (MISSING, HALF):
        _remove(writer, [writer.target.name])
        _in_child(lambda: writer.write(FORMER))
    return seen


def _write_undisturbed(writer: Writer) -> list[str]:
    seen = []
    if _in_child(lambda: writer.write(FORMER)) != 0:
        seen.append("next write failed")
    if _state(writer) != FORMER:
        seen.append("next write wrong")
    left = writer.litter()
    seen += ["litter that stays"] * len(left)
    _remove(writer, left)
    return seen


def _remove(writer: Writer, names: list[str]) -> None:
    for path in (writer.target.parent / name for name in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for each in options.kinds:
        # A process for each: what one kind imports or replaces, the next one has not.
        if len(options.kinds) > 1:
            os.spawnv(
                os.P_WAIT,
                sys.executable,
                [
                    sys.executable,
                    __file__,
                    each,
                    "--moments",
                    str(options.moments),
                    "--seed",
                    str(options.seed),
                ],
            )
        else:
            sys.stdout.write(json.dumps(kill_writers(each, options.moments, options.seed)) + "\n")
            sys.stdout.flush()
