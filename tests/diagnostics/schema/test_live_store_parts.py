"""The parts of a live store: a row without a variable, texts, shapes, limits, and what stays in memory of what was read."""

from __future__ import annotations

import numpy as np
import pytest

from depthscope.diagnostics.errors import InputError
from depthscope.diagnostics.schema import (
    FollowedStore,
    SchemaError,
    live_store,
    live_store_following,
    live_store_history,
)
from depthscope.diagnostics.schema.live_store import LiveStore
from depthscope.diagnostics.schema.live_store_history import History, read_history
from depthscope.diagnostics.schema.live_store_statements import as_json, declared_of, parsed
from tests.diagnostics.schema.live_logs import row


def test_a_variable_that_a_row_lacks_takes_no_later_one_with_it(tmp_path):
    store = LiveStore(tmp_path / "a")
    store.append(0, row(1.0))
    lacking = {name: value for name, value in row(2.0).items() if name != "statistics/sequence_count"}
    store.append(1, lacking)
    store.close()

    history = read_history(tmp_path / "a")

    np.testing.assert_array_equal(history.values("statistics/sequence_count"), [1.0, np.nan])
    np.testing.assert_array_equal(history.values("statistics/norm_sum")[:, 0, 0], [1.0, 2.0])


@pytest.mark.parametrize("text", ["half \ud800", "nul \0"])
def test_texts_of_a_frame_can_be_printed_and_saved(text):
    (found,) = parsed(as_json({"note": text})).values()
    assert "\0" not in found.encode().decode()


@pytest.mark.parametrize("shape", ["12", [-1], [2.0], [True], None])
def test_a_shape_is_a_list_of_counts(shape):
    fields = {"dims": ["x"] * len(shape or ()), "shape": shape, "dtype": "<f4", "attrs": {}}
    with pytest.raises(InputError, match="statistics/x has the shape"):
        declared_of("statistics/x", fields)


def test_as_many_variables_as_are_allowed_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(live_store_history, "MAX_VARIABLES", 3)
    store = LiveStore(tmp_path / "a")
    store.append(0, row(1.0))
    with pytest.raises(InputError, match="more than 3 variables"):
        store.append(1, {**row(2.0), "metrics/x": ((), 1.0)})
    store.close()


def test_declarations_count_together(tmp_path, monkeypatch):
    store = LiveStore(tmp_path / "a")
    store.append(0, row(1.0))
    for number in range(20):
        store.append(1 + number, {**row(1.0), f"metrics/{'x' * 100}{number}": ((), 1.0)})
    store.close()
    read_history(tmp_path / "a")
    monkeypatch.setattr(live_store_history, "MAX_JSON", 2500)
    with pytest.raises(ValueError, match="more than 2500 bytes of declarations"):
        read_history(tmp_path / "a")


def test_columns_stay_in_memory_up_to_a_limit(tmp_path, monkeypatch):
    store = LiveStore(tmp_path / "a")
    for step in range(3):
        store.append(step, row(float(step)))
    store.close()
    followed, names = FollowedStore(tmp_path / "a"), ("statistics/token_count", "statistics/sequence_count")
    read = []
    values = History.values
    monkeypatch.setattr(
        History, "values", lambda self, name, *a, **k: read.append(name) or values(self, name, *a, **k)
    )

    def asked_twice() -> int:
        read.clear()
        for name in names * 2:
            np.testing.assert_array_equal(followed.column(name), values(followed._history, name))
        return len(read)

    assert asked_twice() == 2
    monkeypatch.setattr(live_store_following, "KEPT_BYTES", 1)
    assert asked_twice() >= 3


@pytest.mark.parametrize("name", ["depthscope-rows.log", "columns/000001.cols"])
def test_no_byte_that_is_another_one_passes_for_data(name, tmp_path, monkeypatch):
    monkeypatch.setattr(live_store, "MAX_LOG_ROWS", 4)
    store = LiveStore(tmp_path / "a")
    for step in range(6):
        store.append(step, row(float(step)))
    store.close()
    file = tmp_path / "a" / name
    content = file.read_bytes()
    refused = 0
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            history = read_history(tmp_path / "a")
            steps = history.steps().tolist()
            found = {variable: history.values(variable).tolist() for variable in row(0.0)}
        except SchemaError:
            refused += 1
            continue
        rows = [row(float(step)) for step in range(history.num_rows)]
        assert steps == list(range(history.num_rows)), at
        assert found == {
            variable: [np.asarray(of[variable][1]).tolist() for of in rows] for variable in row(0.0)
        }, at
    assert refused > 0.8 * len(content)  # the last row may pass for a torn one
