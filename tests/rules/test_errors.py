"""Does one ``except depthscope.DepthscopeError`` catch whatever the package raises, and is a missing extra named?"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import xarray as xr

import depthscope as ds
from tests.rules.test_names import modules


def _own_exceptions() -> dict[str, type[BaseException]]:
    found = {}
    for name in modules():
        if name.startswith("depthscope.app.dashboard"):
            continue
        for each in vars(importlib.import_module(name)).values():
            if (
                inspect.isclass(each)
                and issubclass(each, Exception)
                and each.__module__.startswith("depthscope.")
            ):
                found[f"{each.__module__}.{each.__name__}"] = each
    return found


def test_every_error_has_the_common_base_and_one_of_python():
    found = _own_exceptions()
    assert len(found) > 25
    for name, each in found.items():
        assert issubclass(each, ds.DepthscopeError), name
    kept = {"SchemaError": ValueError, "LayoutError": ValueError, "CaptureError": RuntimeError}
    for name, base in kept.items():
        assert issubclass(getattr(ds, name), base)


def test_what_users_get_wrong_is_caught_by_the_common_base(residual_run, tmp_path):
    (tmp_path / "mine.zarr.zip").write_text("no run")
    wrong = [
        lambda: ds.analyze(residual_run, ["effectiv_rank"]),
        lambda: ds.analyze("a.zarr.zip"),
        lambda: ds.judge(xr.Dataset()),
        lambda: ds.open_run(tmp_path / "none.zarr.zip"),
        lambda: ds.open_run(tmp_path / "mine.zarr.zip"),
        lambda: ds.save_run(residual_run, tmp_path / "run.txt"),
        lambda: ds.save_run(residual_run, tmp_path / ".zarr.zip"),
        lambda: ds.save_run(residual_run, tmp_path / "mine.zarr.zip"),
        lambda: ds.metrics.effective_rank(3),
        lambda: ds.kernels.mixing.sinkhorn([[1.0]], last="x"),
    ]
    for call in wrong:
        with pytest.raises(ds.DepthscopeError):
            call()


@pytest.mark.parametrize(
    ("missing", "name", "extra"),
    [("torch", "capture", "capture"), ("torch", "probes", "capture"), ("matplotlib", "figures", "paper")],
)
def test_a_missing_package_names_its_extra(missing, name, extra):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import depthscope as ds
try:
    ds.{name}
except ImportError as error:
    assert isinstance(error, ds.DepthscopeError), type(error)
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"depthscope.{name} needs {missing}" in done.stdout
    assert f"[{extra}]" in done.stdout
