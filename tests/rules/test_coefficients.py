"""How many files does one more coefficient of connections take? One row of the table, and what lists coefficients has it."""

from __future__ import annotations

from depthscope.diagnostics import schema
from tests.rules.test_contributing import checkout, run

TABLE = "diagnostics/schema/coefficients.py"
ROW = """    Coefficient(
        "h_gate",
        "H_gate",
        ("stream",),
        "B",
        "gate of each stream on what the branch writes",
        of_streams=True,
        summed=True,
        remedy="the family has no gates on its writes",
    ),
"""
CHECK = '''
import sys
from pathlib import Path

import numpy as np
import xarray as xr

from depthscope import diagnostics
from depthscope.app.readings.close_up import read_close_up
from depthscope.app.readings.training_history import cells_of
from depthscope.app.readings.standings import OF_STREAMS
from depthscope.diagnostics import schema
from depthscope.diagnostics.metrics.declaration import metric
from depthscope.diagnostics.quantities.registry import Quantities, Unavailable
from tests.models.synthetic_run import synthetic_run

run = synthetic_run("mhc", layers=2)
plain = synthetic_run("residual", layers=2)


@metric(symbol="g", dims="connection", cite="this project", basis="stream", null=1.0, estimator="mean over tokens")
def mean_gate(h_gate):
    """Mean gate of a connection."""
    return h_gate.mean(("sample", "token", "stream"))


for each, words in ((run, "no gates on its writes"), (plain, "more than one stream")):
    try:
        Quantities(each["trace"].to_dataset()).call(mean_gate.function)
        raise SystemExit("it has no gates")
    except Unavailable as reason:
        assert words in str(reason), reason

trace, statistics = (run[group].to_dataset() for group in ("trace", "statistics"))
shape = [trace.sizes[dim] for dim in schema.TRACE["h_gate"].dims]
gates = xr.Variable(schema.TRACE["h_gate"].dims, np.full(shape, 0.5, np.float32))
sums = xr.Variable(schema.STATISTICS["h_gate_sum"].dims, np.full((1, shape[0], shape[-1]), 0.5) * 28)
counted = statistics.assign(h_gate_sum=sums, token_count=("step", [28.0]))
for name in ("h_res", "h_pre", "h_post"):
    total = trace[name].where(trace["mask"]).sum(("sample", "token")).expand_dims("step")
    counted[f"{name}_sum"] = total.transpose(*schema.STATISTICS[f"{name}_sum"].dims)
made = diagnostics.create_run(trace.assign(h_gate=gates), statistics=counted, attrs=run.attrs)
path = diagnostics.save_run(made, Path(sys.argv[1]) / "a.zarr.zip")
opened = diagnostics.open_run(path)
np.testing.assert_allclose(mean_gate(opened), 0.5)
np.testing.assert_allclose(mean_gate(opened.trace["h_gate"]), 0.5)
cells = cells_of(opened["statistics"].to_dataset())
np.testing.assert_allclose(cells.sel(cell=["H_gate 0", "H_gate 3"]), 0.5)
assert "h_gate" in OF_STREAMS
assert read_close_up(path)._trace["h_gate"].shape == tuple(shape)
'''


def test_the_table_is_what_the_schema_and_its_readers_list():
    for of in schema.COEFFICIENTS:
        assert schema.TRACE[of.name].dims == (*schema.ROUTE, *of.axes)
        assert of.role in ("A", "B", "C")
    for of in schema.SUMMED:
        assert schema.STATISTICS[of.total].dims == ("step", "connection", *of.axes)
        assert of.counted_by in schema.STATISTICS


def test_a_gate_on_the_write_is_one_row(tmp_path):
    folder = checkout(tmp_path / "copy")
    table = folder / TABLE
    text = table.read_text(encoding="utf-8")
    place = text.index('    Coefficient(\n        "read",')
    table.write_text(text[:place] + ROW + text[place:], encoding="utf-8")
    (folder / "check.py").write_text(CHECK, encoding="utf-8")
    run(folder, "check.py", str(tmp_path))
