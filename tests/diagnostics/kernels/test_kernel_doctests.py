"""Every public kernel has an example that runs, and the package needs no torch."""

import subprocess
import sys

import pytest

from depthscope.diagnostics import kernels
from tests.diagnostics.kernels.catalogue import public_kernels


@pytest.mark.parametrize("name", kernels.__all__)
def test_every_public_function_has_an_example_and_sections(name):
    found = public_kernels(name)
    assert found
    for key, value in found.items():
        doc = value.__doc__ or ""
        assert ">>>" in doc, f"{key} has no example"
        assert "Parameters\n" in doc, f"{key} has no parameters"


def test_no_torch_is_imported():
    code = "import sys; from depthscope.diagnostics import kernels; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".")
    assert done.stdout.strip() == "False"
