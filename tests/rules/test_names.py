"""Is every name one thing? One import name, no module hidden by a function, no class twice."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import depthscope

ROOT = Path(__file__).parents[2]
PACKAGES = ("probes", "diagnostics", "app")
SCRIPTS = ("depthscope.app.dashboard.navigation.",)  # run by Streamlit, not imported
# `import depthscope` is to take milliseconds, and runs are read where none of these is installed.
HEAVY = ("torch", "streamlit", "plotly", "matplotlib", "transformers")


def modules() -> list[str]:
    return sorted(
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages([str(ROOT / package)], f"depthscope.{package}.")
        if not module.name.startswith(SCRIPTS)
    )


def parsed(package: str) -> list[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in files]


def test_importing_is_light_and_saved_runs_are_read_and_judged_without_torch():
    names = "open_run, save_run, analyze, judge, CATALOGUE, training_curves, kernels, metrics"
    code = (
        f"import sys, depthscope; print([name for name in {HEAVY!r} if name in sys.modules]); "
        f"from depthscope import {names}; metrics.effective_rank; print('torch' in sys.modules)"
    )
    # A fresh process: in this one other tests have imported them.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_every_public_name_is_there():
    for name in depthscope.__all__:
        # Names are loaded when they are first used; dir() lists them before that, for completion.
        assert getattr(depthscope, name) is not None
        assert name in dir(depthscope)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'captur'.*capture"):
        _ = depthscope.captur


def test_a_module_is_a_module_wherever_it_is_asked_for():
    for name in modules():
        module = importlib.import_module(name)
        parent, _, leaf = name.rpartition(".")
        assert isinstance(module, ModuleType)
        assert getattr(importlib.import_module(parent), leaf) is module, f"{parent} shows another {leaf}"


def test_verbs_are_functions():
    for verb in ("capture", "record", "describe", "analyze", "judge", "open_run"):
        assert callable(getattr(depthscope, verb))
        assert not isinstance(getattr(depthscope, verb), ModuleType)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_public_classes_share_a_name_and_every_module_says_which_question_it_answers(package):
    modules = parsed(package)
    # The classes of a module are in its body, or in that of an `if`; none of a function is public.
    names = Counter(
        node.name
        for _, tree in modules
        for part in tree.body
        for node in [part, *(part.body if isinstance(part, ast.If) else ())]
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    )
    assert [name for name, count in names.items() if count > 1] == []
    assert [str(path) for path, tree in modules if not ast.get_docstring(tree)] == []
