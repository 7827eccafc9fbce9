"""`depthscope describe`: the family, blocks, streams, layout and sites that are found in a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from depthscope.app.cli.main import FINE
from depthscope.app.cli.options import Json, ModelAndText, capture_errors_for_users, names, with_model
from depthscope.app.text.terminal import emit, say, working
from depthscope.diagnostics.errors import InputError


# One small forward: it finds the structure and proves the connections, and measures nothing.
@with_model(sequences=2, length=32)
def describe(
    model: ModelAndText,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Read the connections from safetensors or GGUF (folder or file), and build no model.",
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Describe a checkpoint: family, blocks, streams, proof."""
    if weights_only:
        return _describe_weights(model, json=json)
    loaded = model.load()
    from depthscope import probes

    batch = model.batch(loaded, model.read_text())
    with capture_errors_for_users():
        found = probes.describe(loaded.model, batch, sites=names(model.sites), **model.read_as)
    if json:
        emit(
            {"checkpoint": model.checkpoint, "name": loaded.name, "digest": loaded.digest, **found.as_dict()}
        )
    else:
        say(str(found))
    return FINE


def _describe_weights(model: ModelAndText, *, json: bool) -> int:
    given = [
        name
        for name in ("weights", "layers", "layout", "streams", "sites", "dtype", "text")
        if getattr(model, name) is not None
    ]
    if given:
        raise InputError(
            f"--{given[0]} and --weights-only do not go together: no model is built or run; leave one out"
        )
    with working("importing torch"):
        from depthscope.probes.static.describe import describe_weights
    found = describe_weights(model.checkpoint)
    if json:
        emit(found.as_dict())
    else:
        say(str(found))
    return FINE
