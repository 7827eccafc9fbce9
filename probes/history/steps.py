"""Of which training step is a checkpoint? From the file that a trainer leaves in it, else from its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from depthscope.diagnostics.errors import InputError

TRAINER_STATE = "trainer_state.json"
# The number after one of these words, wherever it is; else the last number of the name.
_WORDED = re.compile(r"(?:global_?step|step|iteration|iter|checkpoint|ckpt)[-_=. ]*(\d{1,15})", re.IGNORECASE)
_NUMBER = re.compile(r"\d{1,15}")
# Endings have numbers of their own (.mp4).
_ENDINGS = re.compile(r"(\.(safetensors|gguf|pt|pth|bin|ckpt|zip))+$", re.IGNORECASE)


def checkpoint_step(path: str | Path) -> int:
    """The training step of a checkpoint.

    Returns: ``global_step`` of its ``trainer_state.json``; else of its name the number after ``step``, ``iter``,
    ``checkpoint`` or ``ckpt``; else the last number of its name.

    Examples
    --------
    >>> [checkpoint_step(name) for name in ("step-00200", "epoch=1-step=40.ckpt", "checkpoint-7", "iter_0003.pt", "12")]
    [200, 40, 7, 3, 12]
    """
    path = Path(path)
    state = path / TRAINER_STATE
    if state.is_file():
        try:
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{state} has no global_step that can be read ({error}); repair or remove it"
            ) from None
        if isinstance(step, int) and step >= 0:
            return step
        raise InputError(f"{state} has the global_step {step!r}; expected a whole number")
    name = _ENDINGS.sub("", path.name)
    found = _WORDED.findall(name) or _NUMBER.findall(name)
    if not found:
        raise InputError(
            f"the name {path.name!r} has no step in it; expected such as step-1000 or checkpoint-1000"
        )
    return int(found[-1])


def in_order(paths: Iterable[str]) -> tuple[list[tuple[int, str]], dict[str, str]]:
    """Checkpoints by their steps, as numbers and not as text.

    Returns: (step, path) in order; and for those that have no step the reason.
    """
    steps: dict[int, str] = {}
    reasons: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        try:
            step = checkpoint_step(path)
        except ValueError as error:
            reasons[path] = str(error)
            continue
        if step in steps:
            raise InputError(
                f"{steps[step]} and {path} are both of step {step}; name one of them, or rename the other"
            )
        steps[step] = path
    return sorted(steps.items()), reasons


def expanded(paths: Sequence[str]) -> list[str]:
    """Checkpoints in place of a single folder that contains them; anything else as it is."""
    folder = Path(paths[0])
    if len(paths) > 1 or not folder.is_dir() or (folder / "config.json").exists():
        return list(paths)
    inside = [str(child) for child in folder.iterdir() if (child / "config.json").is_file()]
    return sorted(inside) or list(paths)
