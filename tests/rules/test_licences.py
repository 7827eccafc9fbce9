"""The licences of what is installed with depthscope are listed, and one that nobody looked at fails."""

from __future__ import annotations

import importlib.util
from email.message import Message
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / ".ci" / "licences.py"


@pytest.fixture
def licences():
    spec = importlib.util.spec_from_file_location("licences", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Package:
    version = "1.0"

    def __init__(self, name: str, **fields: str):
        self.name, self.metadata = name, Message()
        for field, value in fields.items():
            self.metadata[field.replace("_", "-")] = value


def test_everything_that_is_installed_may_be(licences, capsys):
    assert licences.main(["capture", "models", "app", "paper", "demo", "dask"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"numpy", "torch", "transformers", "streamlit"} <= set(names)
    assert names == sorted(set(names))


@pytest.mark.parametrize(
    ("package", "code"),
    [
        (Package("a", License_Expression="MIT OR Apache-2.0"), 0),
        (Package("a", Classifier="License :: OSI Approved :: BSD License"), 0),
        (Package("a", License="GPL-3.0"), 1),
        (Package("a"), 1),
        (Package("shtab", License="MPL-2.0"), 0),
    ],
)
def test_a_licence_that_is_not_permissive_fails(licences, monkeypatch, capsys, package, code):
    monkeypatch.setattr(licences, "installed", lambda extras: [package])
    assert licences.main([]) == code
    assert ("NOT allowed" in capsys.readouterr().out) == bool(code)
