"""What does depthscope show on a fresh machine? A real model, three small ones, findings, a paper, a dashboard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from depthscope.app.readings.readings import COMPLETE, Reading, read_runs
from depthscope.app.tables.findings import findings_text
from depthscope.app.text.terminal import command_line, progress_bar, remark, say, working
from depthscope.diagnostics import analyze, schema

SMOLLM2 = "SmolLM2-135M"
# Of training alone, for the three models together.
SECONDS, QUICK_SECONDS = 25.0, 10.0
# Gradients of 4 × 256 tokens of SmolLM2 peak at 3.5 GB; twice as many would not fit an 8 GB laptop comfortably.
SEQUENCES, LENGTH = 4, 256
# Of the first look, whose findings are on the screen before anything else is measured: seconds, without a backward.
FIRST_SEQUENCES, FIRST_LENGTH = 2, 64


@dataclass
class Steps:
    """The demo's steps with the time that each took."""

    total: int
    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print what is being done, and afterwards how long it took."""
        _print_progress(f"[{len(self.times) + 1}/{self.total}] {title}")
        started = time.perf_counter()
        try:
            yield
        finally:
            self.times[title] = time.perf_counter() - started
            _print_progress(f"      {self.times[title]:.1f} s")


def run_demo(out: Path, *, browser: bool = True, quick: bool = False, seeds: int = 1) -> None:
    """Probe a real model and three small ones, print the findings as they come, write a paper bundle, open the dashboard.

    With a browser, or without one on a terminal (a server that somebody is logged in to), the dashboard is
    served until Ctrl-C. Without a browser and without a terminal (continuous integration, a pipe) the demo ends
    after printing the command that serves it. What cannot be done is printed, and the rest goes on.

    ``out``: folder for ``runs/`` and ``paper/``; results of an earlier demo in it are replaced one by one, each only
    when the new one is complete.
    ``browser``: open the dashboard in the default browser.
    ``quick``: ten seconds of training and no SmolLM2.
    ``seeds``: how often the small models are trained, each time from another seed.
    """
    # Before the minutes that follow; the study looks at its own files.
    if not quick:
        schema.require_replaceable(out / "runs" / f"{SMOLLM2}.zarr")
    started = time.perf_counter()
    steps = Steps(total=3 if quick else 6)
    folder = out / "runs"
    paths = {} if quick else _probe_smollm2(steps, folder)
    paths.update(_train_small_models(steps, folder, QUICK_SECONDS if quick else SECONDS, seeds))
    with steps.step(f"Measuring {len(paths)} runs with every metric, and judging each: what was found"):
        runs = _measure_and_judge(paths)
    with steps.step("Writing figures, tables and sources for a paper"), working("drawing"):
        bundle = _write_paper(runs, out / "paper")
    for path in paths.values():
        say(f"run    {path}  ({path.stat().st_size / 1e6:.0f} MB)")
    for path in sorted(folder.glob("*-training")):
        say(f"run    {path}  (recorded by step while it learned)")
    if bundle is not None:
        say(f"paper  {bundle}  (figures, tables, sources; main.tex compiles it)")
    memory = peak_memory()
    used = "" if memory is None else f", peak memory {memory / 1e9:.1f} GB"
    _print_progress(f"{time.perf_counter() - started:.0f} s in all{used}")
    _show_dashboard(folder, browser=browser)


def _probe_smollm2(steps: Steps, folder: Path) -> dict[str, Path]:
    """The saved run of SmolLM2 by its name; nothing where its weights are not installed."""
    from depthscope import probes
    from depthscope.probes.checkpoints.load import load_checkpoint
    from depthscope.probes.checkpoints.text_batch import encode_text, sample_text, token_texts
    from depthscope.probes.checkpoints.weight_files import CheckpointError

    try:
        with steps.step(f"Loading {SMOLLM2} (the first time it is converted, about 20 s)"):
            loaded = load_checkpoint("smollm2")
    except CheckpointError as error:
        remark(f"{error}; going on without {SMOLLM2}")
        # Looking at it and probing it would have been two more.
        steps.total -= 2
        return {}
    text = sample_text()
    with steps.step(f"A first look at {SMOLLM2}, on {FIRST_SEQUENCES} × {FIRST_LENGTH} tokens"):
        batch = encode_text(loaded, text, sequences=FIRST_SEQUENCES, length=FIRST_LENGTH)
        # What is suspected is tried when the run that is saved is probed: it takes five times as long as the look.
        first = probes.capture(loaded.model, batch, settle=0, attrs={"model": loaded.name})
        _print_findings(SMOLLM2, read_runs({SMOLLM2: first}))
    title = f"Probing {SMOLLM2} on {SEQUENCES} × {LENGTH} tokens of Python's documentation"
    with steps.step(title), working("forward and backward"):
        batch = encode_text(loaded, text, sequences=SEQUENCES, length=LENGTH)
        run = probes.capture(
            loaded.model,
            batch,
            gradients=True,
            token_text=token_texts(loaded, batch),
            attrs={
                "model": loaded.name,
                "weights_digest": loaded.digest,
                # Comes with Python: no text has to be downloaded.
                "data": "pydoc_data.topics",
                "loss_reduction": "mean",
            },
        )
        return {SMOLLM2: schema.save_run(run, folder / f"{SMOLLM2}.zarr")}


def _train_small_models(steps: Steps, folder: Path, seconds: float, seeds: int) -> dict[str, Path]:
    from depthscope.app.study.study import run_seeds

    title = f"Training three small models that differ only in their connection, {seconds:.0f} s side by side"
    if seeds > 1:
        title += f", from each of {seeds} seeds"
    with steps.step(title):
        return run_seeds(folder, seeds=seeds, seconds=seconds)


def _measure_and_judge(paths: Mapping[str, Path]) -> dict[str, xr.DataTree]:
    """The runs with their metrics, saved again: neither the paper nor the dashboard has to compute them.

    The findings of each are printed as soon as they are known.
    """
    runs: dict[str, xr.DataTree] = {}
    for name, path in paths.items():
        run = schema.open_run(path)
        run.load()
        run.close()  # before the file is replaced
        # A bar for each run: the findings are printed between them.
        with progress_bar(f"measuring {name}") as show:
            runs[name] = with_metrics(run, lambda metric, done, count: show(done / count, metric))
        schema.save_run(runs[name], path)
        _print_findings(name, read_runs({name: runs[name]}))
    return runs


def _print_findings(name: str, readings: Sequence[Reading]) -> None:
    for reading in readings:
        say(f"\n{name}: {about(reading.attrs)}\n")
        say(findings_text(reading.findings))
    say()
    sys.stdout.flush()  # in a pipe they would otherwise come at the end


def with_metrics(run: xr.DataTree, progress: Callable[[str, int, int], None] | None = None) -> xr.DataTree:
    """A run of one chain with every metric of the catalogue that it can feed.

    ``progress``: called with (metric, number done, number in all).
    """
    metrics = analyze(run, progress=progress)
    parts = {name: schema.chain_dataset(run, name) for name in ("trace", "statistics")}
    attrs = {str(name): value for name, value in run.attrs.items()}
    return schema.create_run(**parts, metrics=metrics.assign_attrs({COMPLETE: True}), attrs=attrs)


def about(attrs: Mapping[str, Any]) -> str:
    """One line on a run: its family, and the result of its training where that is known.

    Returns: Such as ``mhc, 4 streams; held-out loss 2.39 nats per byte after 106 steps (byte frequencies alone: 3.14)``.
    """
    streams = attrs.get("n_streams", 1)
    text = f"{attrs.get('family')}, {streams} stream{'s' if streams != 1 else ''}"
    training = attrs.get("training")
    if not training:
        return text
    return (
        f"{text}; held-out loss {training['held_out_loss']:.2f} nats per byte after {training['steps']} steps "
        f"(byte frequencies alone: {training['unigram_entropy']:.2f})"
    )


def _write_paper(runs: Mapping[str, xr.DataTree], folder: Path) -> Path | None:
    from depthscope.app.paper.export import write_bundle

    try:
        # PDF alone, which LaTeX includes: `depthscope export` writes the other formats too.
        return write_bundle(runs, folder, formats=("pdf",), second_process=True)
    except ValueError as error:  # files there that somebody has edited are not overwritten
        remark(f"no paper bundle: {error}")
        return None


def _show_dashboard(folder: Path, *, browser: bool) -> None:
    if not browser and not sys.stdout.isatty():
        say(f"Browse them with: {command_line('dashboard', folder)}")
        return
    from depthscope.app.dashboard.server import launch

    launch([folder], open_browser=browser)


def peak_memory() -> float | None:
    """Largest resident memory of this process so far, in bytes; None on systems that do not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _print_progress(line: str) -> None:
    # Flushed: in a pipe a minute of training would otherwise pass without a sign.
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
