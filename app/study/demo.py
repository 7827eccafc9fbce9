"""What does depthscope show on a fresh machine? A real model, three small ones, findings, a paper, a dashboard."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from depthscope.app.readings.readings import COMPLETE, read_runs
from depthscope.app.tables.findings import findings_text
from depthscope.app.text.terminal import remark, say, working
from depthscope.diagnostics import analyze, schema

SMOLLM2 = "SmolLM2-135M"
SECONDS, QUICK_SECONDS = 60.0, 10.0
# Gradients of 4 × 256 tokens of SmolLM2 peak at 3.5 GB; twice as many would not fit an 8 GB laptop comfortably.
SEQUENCES, LENGTH = 4, 256


@dataclass
class Steps:
    """The demo's steps with the time that each took."""

    total: int
    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Say what is being done, and afterwards how long it took.

        Parameters
        ----------
        what : str
            In plain words.

        Yields
        ------
        None
            While it is done.
        """
        _tell(f"[{len(self.times) + 1}/{self.total}] {what}")
        started = time.perf_counter()
        try:
            yield
        finally:
            self.times[what] = time.perf_counter() - started
            _tell(f"      {self.times[what]:.1f} s")


def run_demo(out: Path, *, browser: bool = True, quick: bool = False) -> int:
    """Probe a real model and three small ones, print the findings, write a paper bundle, open the dashboard.

    With a browser, or without one on a terminal (a server that somebody is logged in to), the dashboard is
    served until Ctrl-C. Without a browser and without a terminal (continuous integration, a pipe) the demo ends
    after printing the command that serves it.

    Parameters
    ----------
    out : Path
        Folder for ``runs/`` and ``paper/``; results of an earlier demo in it are replaced one by one, each only
        when the new one is whole.
    browser : bool
        Open the dashboard in the default browser.
    quick : bool
        Ten seconds of training and no SmolLM2.

    Returns
    -------
    int
        0; what could not be done is said and the rest goes on.
    """
    started = time.perf_counter()
    steps = Steps(total=4 if quick else 6)
    folder = out / "runs"
    probed = {} if quick else _probe_smollm2(steps, folder)
    probed |= _train_study(steps, folder, QUICK_SECONDS if quick else SECONDS)
    with steps.step(f"Measuring {len(probed)} runs with every metric"):
        runs = _analysed(probed)
    with steps.step("Judging them: what was found"):
        _print_findings(runs)
    with steps.step("Writing figures, tables and sources for a paper"), working("drawing"):
        bundle = _write_paper(runs, out / "paper")
    _print_results(probed, bundle)
    _tell(_summary(time.perf_counter() - started))
    _show(folder, browser=browser)
    return 0


def _probe_smollm2(steps: Steps, folder: Path) -> dict[str, Path]:
    from depthscope.probes.checkpoints.load import load_checkpoint
    from depthscope.probes.checkpoints.weight_files import CheckpointError

    try:
        with steps.step(f"Loading {SMOLLM2} (the first time it is converted, about 20 s)"):
            loaded = load_checkpoint("smollm2")
    except CheckpointError as error:
        remark(f"{error}; going on without {SMOLLM2}")
        steps.total -= 1
        return {}
    with steps.step(f"Probing {SMOLLM2} on {SEQUENCES} × {LENGTH} tokens of Python's documentation"):
        return {SMOLLM2: _probe(loaded, folder / f"{SMOLLM2}.nc")}


def _probe(loaded: Any, path: Path) -> Path:
    from depthscope import probes
    from depthscope.probes.checkpoints.text_batch import encode_text, sample_text, token_texts

    batch = encode_text(loaded, sample_text(), sequences=SEQUENCES, length=LENGTH)
    attrs = {
        "model": loaded.name,
        "weights_digest": loaded.digest,
        "data": "pydoc_data.topics",
        "loss_reduction": "mean",
    }
    with working("forward and backward"):
        run = probes.capture(
            loaded.model, batch, gradients=True, token_text=token_texts(loaded, batch), attrs=attrs
        )
    return schema.save_run(run, path)


def _train_study(steps: Steps, folder: Path, seconds: float) -> dict[str, Path]:
    from depthscope.app.study.study import run_study

    what = f"Training three small models that differ only in their connection, {seconds:.0f} s side by side"
    with steps.step(what):
        return run_study(folder, seconds=seconds)


def _analysed(probed: Mapping[str, Path]) -> dict[str, xr.DataTree]:
    """The runs with their metrics, saved again: neither the paper nor the dashboard has to wait for them."""
    runs: dict[str, xr.DataTree] = {}
    with _bar(len(probed)) as show:
        for number, (name, path) in enumerate(probed.items()):
            run = schema.open_run(path)
            run.load()
            run.close()  # before the file is replaced
            runs[name] = with_metrics(run, partial(show, number, name))
            schema.save_run(runs[name], path)
    return runs


def with_metrics(run: xr.DataTree, progress: Callable[[str, int, int], None] | None = None) -> xr.DataTree:
    """A run of one chain with the whole catalogue measured.

    Parameters
    ----------
    run : DataTree
        With a trace.
    progress : callable, optional
        Told (metric, number done, number in all).

    Returns
    -------
    DataTree
        The same groups, and /metrics.
    """
    metrics = analyze(run, progress=progress)
    parts = {name: schema.chain_dataset(run, name) for name in ("trace", "statistics")}
    attrs = {str(name): value for name, value in run.attrs.items()}
    return schema.create_run(**parts, metrics=metrics.assign_attrs({COMPLETE: True}), attrs=attrs)


@contextmanager
def _bar(num_runs: int) -> Iterator[Callable[[int, str, str, int, int], None]]:
    columns = TextColumn("measuring"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=num_runs)

        def show(number: int, name: str, metric: str, done: int, count: int) -> None:
            bar.update(task, completed=number + done / count, description=f"{name} {metric}")

        yield show


def _print_findings(runs: Mapping[str, xr.DataTree]) -> None:
    for reading in read_runs(runs):
        say(f"\n{reading.name}: {about(reading.attrs)}\n")
        say(findings_text(reading.findings))
    say()


def about(attrs: Mapping[str, Any]) -> str:
    """One line on a run: its family, and what its training came to where that is known.

    Parameters
    ----------
    attrs : mapping
        The run's attributes.

    Returns
    -------
    str
        Such as ``mhc, 4 streams; held-out loss 2.39 nats a byte after 106 steps (unigram 3.14)``.
    """
    streams = attrs.get("n_streams", 1)
    words = f"{attrs.get('family')}, {streams} stream{'s' if streams != 1 else ''}"
    training = attrs.get("training")
    if not training:
        return words
    return (
        f"{words}; held-out loss {training['held_out_loss']:.2f} nats a byte after {training['steps']} steps "
        f"(byte frequencies alone: {training['unigram_entropy']:.2f})"
    )


def _write_paper(runs: Mapping[str, xr.DataTree], bundle: Path) -> Path | None:
    from depthscope.app.paper.export import write_bundle

    try:
        return write_bundle(runs, bundle)
    except ValueError as error:  # files that somebody edited there are not written over
        remark(f"no paper bundle: {error}")
        return None


def _print_results(probed: Mapping[str, Path], bundle: Path | None) -> None:
    for path in probed.values():
        say(f"run    {path}  ({path.stat().st_size / 1e6:.0f} MB)")
    if bundle is not None:
        say(f"paper  {bundle}  (figures, tables, sources; main.tex compiles it)")


def _show(folder: Path, *, browser: bool) -> None:
    if not browser and not sys.stdout.isatty():
        say(f"Browse them with: depthscope dashboard {shlex.quote(str(folder))}")
        return
    from depthscope.app.dashboard.server import launch

    launch([folder], open_browser=browser)


def peak_memory() -> float | None:
    """Largest resident memory of this process so far, in bytes; None on systems that do not tell.

    Returns
    -------
    float or None
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _summary(seconds: float) -> str:
    memory = peak_memory()
    return f"{seconds:.0f} s in all" + ("" if memory is None else f", peak memory {memory / 1e9:.1f} GB")


def _tell(line: str) -> None:
    """Progress is for people and goes to stderr at once, also into a pipe."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
