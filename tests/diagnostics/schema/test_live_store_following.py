"""Is a growing live store followed exactly: what `open_run` reads as a whole, read bit by bit?"""

import numpy as np
import pytest

from depthscope.diagnostics import schema
from depthscope.diagnostics.schema import FollowedStore, SchemaError, live_store
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.diagnostics.schema.live_store_history import History


def numbers(step: int) -> dict:
    draw = np.random.default_rng(step)
    return {
        "statistics/token_count": ((), 5.0),
        "statistics/sequence_count": ((), 1.0),
        "statistics/loss": ((), float(step)),
        "statistics/norm_sum": (("depth", "stream"), draw.random((4, 1))),
    }


def same_as_opened(followed: FollowedStore, path) -> None:
    run = schema.open_run(path)
    opened = run["statistics"].to_dataset(inherit=False)
    np.testing.assert_array_equal(followed.steps, opened["step"].values)
    np.testing.assert_array_equal(
        followed.column("statistics/loss"), opened["loss"].values.astype(np.float32)
    )
    np.testing.assert_array_equal(
        followed.column("statistics/norm_sum", (None, 0)),
        opened["norm_sum"].values[:, :, 0].astype(np.float32),
    )
    for position in {0, len(followed.steps) // 2, len(followed.steps) - 1}:
        dims, values = followed.row(position)["statistics/norm_sum"]
        assert dims == ("depth", "stream")
        np.testing.assert_array_equal(values, opened["norm_sum"].values[position])
    run.close()


@pytest.fixture
def small_logs(monkeypatch):
    monkeypatch.setattr(live_store, "MAX_LOG_ROWS", 7)


@pytest.fixture
def begun(tmp_path, make_run):
    store = LiveStore(tmp_path / "a")
    run = make_run("residual", layers=3)
    run.attrs["step"] = int(run.statistics.step.values[-1])
    store.save_state(run)
    yield store, tmp_path / "a"
    store.close()


def test_rows_files_of_columns_and_resumed_trainings_are_followed(begun, small_logs):
    store, path = begun
    store.append(0, numbers(0))
    followed = FollowedStore(path)
    for step in range(1, 16):
        same_as_opened(followed, path)
        assert not followed.refresh()
        store.append(step, numbers(step))
        assert followed.refresh()
    # Rows from step 6 on are superseded, by others of the same steps.
    for step in range(6, 10):
        store.append(step, numbers(100 + step))
        followed.refresh()
        same_as_opened(followed, path)
    assert followed.steps[-1] == 9
    assert followed.status().state == "growing"
    store.finish()
    assert followed.refresh()
    assert followed.status().state == "finished"


def test_only_new_bytes_are_read(begun, monkeypatch):
    store, path = begun
    for step in range(100):
        store.append(step, numbers(step))
    followed = FollowedStore(path)
    followed.column("statistics/loss")
    read = []
    replay = History.replay
    monkeypatch.setattr(History, "replay", lambda self, added: read.append(len(added)) or replay(self, added))
    store.append(100, numbers(100))
    followed.refresh()
    (size,) = read
    assert size < 300
    assert followed.column("statistics/loss")[-1] == 100.0


def test_half_a_row_waits_for_its_end_and_damage_is_refused(begun):
    store, path = begun
    store.append(0, numbers(0))
    followed = FollowedStore(path)
    log = path / schema.LOG
    before = log.stat().st_size
    store.append(1, numbers(1))
    store.append(2, numbers(2))
    content = log.read_bytes()
    with log.open("r+b") as file:
        file.truncate(before + 20)
        assert not followed.refresh()
        assert followed.steps.tolist() == [0]
        file.seek(0)
        file.write(content)
        file.flush()
        assert followed.refresh()
        assert followed.steps.tolist() == [0, 1, 2]
        file.write(b"?" + content[before:])
        file.flush()
        with pytest.raises(SchemaError, match="damaged at byte"):
            followed.refresh()


def test_what_is_no_live_store_is_refused(begun, tmp_path):
    _, path = begun
    (path / "notes.txt").write_text("mine")
    with pytest.raises(SchemaError, match="is not a part of a live run"):
        FollowedStore(path)
    with pytest.raises(FileNotFoundError):
        FollowedStore(tmp_path / "nothing")
