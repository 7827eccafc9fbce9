"""Is every damaged file answered by one sentence, or read as what was saved, in bounded time and memory?"""

from __future__ import annotations

import gc
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import gguf
import numcodecs
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from depthscope.app.cli.main import main
from depthscope.diagnostics import analyze, schema
from depthscope.diagnostics.errors import AbsentError, TakenError
from depthscope.probes.checkpoints.errors import CheckpointError
from depthscope.probes.checkpoints.gguf_header import check_gguf
from depthscope.probes.checkpoints.load import load_checkpoint
from depthscope.probes.checkpoints.pickle_files import load_pickle, tensors_in
from depthscope.probes.checkpoints.weight_files import state_dict
from tests.damage import damaged_file, damaged_files
from tests.diagnostics.schema.live_logs import row, written
from tests.models.small_models import llama, lucidrains
from tests.models.synthetic_run import synthetic_run
from tests.probes.static.dialect_files import CASES
from tests.probes.static.written_files import write_gguf
from tests.thoroughness import sample_or_every

REFUSALS = (schema.SchemaError, CheckpointError, AbsentError, TakenError)
NOISE = ("Exception ignored", "Traceback (most recent call last)")
SECONDS, MIB = 20, 700


@contextmanager
def limited() -> Iterator[None]:
    """Whatever computes for longer, or takes more memory than that, raises."""

    def ring(number: int, frame: Any) -> None:
        raise AssertionError(f"more than {SECONDS} s of processor time")

    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now = int(fields["VmData"].split()[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (now + (MIB << 20), hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def command(*words: str) -> str:
    """Run a command: it ends with 0 or 1, or with 2 and one line, which is returned."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as ended:
            code = ended.code
        gc.collect()  # what is closed by the collector may print, as zipfile does
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("depthscope: ")]
    assert not any(noise in err.getvalue() for noise in NOISE), err.getvalue()
    assert code in (0, 1, None) or (code, len(lines), out.getvalue()) == (2, 1, ""), (code, err.getvalue())
    return lines[0] if code == 2 else ""


# --- what is read, and what must hold of it; `files` are those of a folder, or of "" alone


@cache
def analysed() -> xr.DataTree:
    run = synthetic_run("hc", layers=2, samples=2, tokens=6, features=4)
    parts = {name: run[name].to_dataset() for name in ("trace", "statistics")}
    found = analyze(run, metrics=["effective_rank", "residual_norm"]).assign_attrs(complete=True)
    return schema.create_run(**parts, metrics=found, attrs={str(k): v for k, v in run.attrs.items()})


def save_run(path: Path) -> None:
    schema.save_run(analysed(), path)


def open_run(path: Path) -> None:
    with schema.open_run(path) as run:
        assert run.load().identical(analysed())
    assert not command("check", str(path))


def save_live(path: Path) -> None:
    run = synthetic_run("residual", layers=2, samples=2, tokens=4, features=8)
    run.attrs["step"] = int(run.statistics.step.values[-1])
    written(path, run, range(6)).close()


def open_live(path: Path) -> None:
    """The rows are the first of those that were written: the last one may pass for a torn one."""
    rows = schema.LiveRows(path)
    assert rows.steps.tolist() == list(range(rows.num_rows))
    for step in range(rows.num_rows):
        for name, expected in row(float(step)).items():
            np.testing.assert_array_equal(rows.row(step)[name][1], expected[1])


def write_small_gguf(path: Path) -> None:
    case = CASES["gguf_of_deepseek"]()
    write_gguf(path.parent, case.tensors, case.config, case.settings).rename(path)


def write_gguf_header(path: Path) -> None:
    """Some of each kind of value, and little else."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_token_types([1, 1, 3])
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_gguf_header(path: Path) -> None:
    found = check_gguf(path)
    assert found.num_elements <= 8 * path.stat().st_size * found.num_tensors


TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.zeros(5, dtype=torch.bfloat16),
    "c": torch.ones(()),
}


def open_safetensors(path: Path) -> None:
    """A state dict of no more bytes than the file."""
    assert sum(tensor.nbytes for tensor in state_dict(path).values()) <= path.stat().st_size


def save_pickle(path: Path, *, new: bool = True) -> None:
    torch.save(
        {"a": torch.ones(2, 3), "nested": {"b": [torch.ones(2)]}}, path, _use_new_zipfile_serialization=new
    )


def open_pickle(path: Path) -> None:
    assert all(tensor.nbytes <= path.stat().st_size for tensor in tensors_in(load_pickle(path)))


def save_streams(path: Path) -> None:
    save_file({name: value.clone() for name, value in lucidrains("mhc").state_dict().items()}, path)


Write, Read = Callable[[Path], object], Callable[[Path], object]
KINDS: dict[str, tuple[Write, Read]] = {
    **{f"run{suffix}": (save_run, open_run) for suffix in schema.SUFFIXES},
    "live": (save_live, open_live),
    "header.gguf": (write_gguf_header, open_gguf_header),
    "m.gguf": (write_small_gguf, lambda path: command("describe", str(path))),
    "m.safetensors": (lambda path: save_file(TENSORS, path, metadata={"format": "pt"}), open_safetensors),
    "streams.safetensors": (save_streams, lambda path: command("describe", str(path), "--weights-only")),
    "new.pt": (save_pickle, open_pickle),
    "old.pt": (lambda path: save_pickle(path, new=False), open_pickle),
    "folder": (lambda path: llama().save_pretrained(path), lambda path: load_checkpoint(str(path))),
    "sharded": (
        lambda path: llama().save_pretrained(path, max_shard_size="30KB"),
        lambda path: command("describe", str(path)),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """The content of a whole file of a kind, or of the files of its folder."""
    known: dict[str, dict[str, bytes]] = {}

    def of(kind: str) -> dict[str, bytes]:
        if kind not in known:
            path = tmp_path_factory.mktemp("whole") / kind
            KINDS[kind][0](path)
            files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
            known[kind] = {str(each.relative_to(path)): each.read_bytes() for each in files}
        return known[kind]

    return of


# Headers and logs take milliseconds; with a command, or a library that loads a model, seconds.
QUICK = ("live", "header.gguf", "m.safetensors", "new.pt", "old.pt")
LONG = [kind for kind in KINDS if kind not in QUICK]


def examples(number: int) -> settings:
    return settings(
        max_examples=sample_or_every(number, 2000),
        deadline=None,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )


@pytest.mark.parametrize("kind", QUICK)
@examples(150)
@given(data=st.data())
def test_damage_is_refused_in_a_sentence_or_changes_nothing(kind, whole, data):
    read_damaged(kind, whole(kind), data)


@pytest.mark.slow(more=2)
@pytest.mark.parametrize("kind", LONG)
@examples(8)
@given(data=st.data())
def test_damage_of_what_takes_long_to_read_is_refused_too(kind, whole, data):
    read_damaged(kind, whole(kind), data)


def read_damaged(kind: str, files: dict[str, bytes], data: st.DataObject) -> None:
    # Of a live store what has its rows: the states are runs.
    chosen = {name: content for name, content in files.items() if name.endswith(".log")} or files
    damaged = data.draw(damaged_file(files["."]) if list(files) == ["."] else damaged_files(chosen))
    sentence = read(kind, {name: files[name] for name in files.keys() - chosen.keys()} | damaged)
    assert sentence is None or (sentence and "\n" not in sentence)


def read(kind: str, files: dict[str, bytes]) -> str | None:
    """Read files; the sentence of the refusal, where there is one."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Safety must not hang on a default of a dependency: here unpickling is allowed, as a careless environment may have it.
        patch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True)
        path = Path(folder, kind)
        for name, content in files.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        try:
            with limited():
                KINDS[kind][1](path)
        except REFUSALS as error:
            return str(error)
    return None


@pytest.mark.slow(but=len(QUICK))
@pytest.mark.parametrize("kind", [*QUICK, *LONG])
def test_what_is_not_damaged_is_read(kind, whole):
    assert read(kind, whole(kind)) is None


# --- the limits themselves


def test_what_takes_too_long_or_too_much_raises(monkeypatch):
    with pytest.raises(MemoryError), limited():
        bytearray((MIB + 100) << 20)
    monkeypatch.setitem(globals(), "SECONDS", 0.05)
    with pytest.raises(AssertionError, match="processor time"), limited():
        sum(1 for _ in count())  # of bytecode, between which a signal is answered
