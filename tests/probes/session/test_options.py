"""The options of four verbs are declared once: what they take, show in `help`, and refuse."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from depthscope import LayoutError, jacobian, probes
from depthscope.probes.session.options import CaptureOptions, ModelOptions, Options, SiteOptions

TAKES = {
    probes.capture: CaptureOptions,
    probes.record: CaptureOptions,
    probes.describe: SiteOptions,
    jacobian: ModelOptions,
}


@pytest.mark.parametrize("verb", TAKES, ids=lambda verb: verb.__name__)
def test_each_verb_shows_its_options_in_signature_and_help(verb):
    names = TAKES[verb].__optional_keys__
    parameters = inspect.signature(verb).parameters
    assert names <= set(parameters)
    assert "options" not in parameters
    lines = inspect.getdoc(verb).splitlines()
    defaults = inspect.signature(Options).parameters
    for name in names:
        assert parameters[name].default == defaults[name].default
        assert sum(line.startswith(f"{name} : ") for line in lines) == 1
    assert not any(line.startswith("**") for line in lines)


@pytest.mark.parametrize(
    ("verb", "name", "advice"),
    [
        (probes.capture, "gradient", "; closest: 'gradients'"),
        (probes.record, "layer", "; closest: 'layers'"),
        (probes.describe, "gradients", ""),
        (jacobian, "sites", ""),
    ],
)
def test_a_name_that_is_no_option_is_refused_before_the_model_runs(verb, name, advice):
    with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) got an unexpected .*'{name}'{advice}"):
        verb(None, None, **{name: True})


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"max_sequences": 0}, ValueError, "max_sequences is 0; expected at least 1"),
        ({"streams": 0}, ValueError, "streams is 0; expected at least 1"),
        ({"layout": "B X"}, LayoutError, "layout 'B X' cannot be read"),
        ({"layers": [1]}, ValueError, "expected module paths"),
        ({"mask": np.ones((2, 3))}, ValueError, "mask is of type ndarray; expected a tensor"),
        ({"sites": "middle"}, probes.SiteError, "closest: 'mid'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_value_that_no_model_could_take_is_refused_at_once(option, error, message):
    with pytest.raises(error, match=message):
        Options(**option)


def test_an_iterable_of_names_is_read_once():
    options = Options(layers=(f"h.{i}" for i in range(2)), sites=iter(["mid"]))
    assert options.blocks == ("h.0", "h.1")
    assert [request.name for request in options.selection.requests] == ["mid"]
    with pytest.raises(FrozenInstanceError):
        options.seed = 1
