"""Every public kernel has an example that runs, and the package needs no torch."""

import doctest
import importlib
import inspect
import subprocess
import sys

import pytest

MODULES = ["rank", "geometry", "similarity", "mixing", "gradients", "meanfield"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(f"diagnostics.kernels.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_an_example_and_sections(name):
    module = importlib.import_module(f"diagnostics.kernels.{name}")
    for key, value in inspect.getmembers(module, inspect.isfunction):
        if not key.startswith("_") and value.__module__ == module.__name__:
            doc = value.__doc__ or ""
            assert ">>>" in doc, f"{name}.{key} has no example"
            assert "Parameters\n" in doc, f"{name}.{key} has no parameters"


def test_no_torch_is_imported():
    code = "import sys; from diagnostics import kernels; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".")
    assert done.stdout.strip() == "False"
