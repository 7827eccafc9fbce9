"""Which files may be read for a checkpoint? Regular ones of its own folder, of a size that is checked first."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from depthscope.diagnostics.atomic_writes import kind_of
from depthscope.probes.checkpoints.errors import CheckpointError, first_line, printable

MiB = 1 << 20
# Bytes. The largest configuration of a public model has 2 MB, the index of one with 10⁵ tensors 10 MB.
JSON_LIMIT = 64 * MiB
# Read by the tokenizers of transformers next to the files of the folder itself.
TEMPLATES = "additional_chat_templates"


def given_path(spec: str | Path) -> Path:
    """The path that a user gave, with ``~`` as their home.

    Raises CheckpointError: If it names the home of a user that there is not.
    """
    try:
        return Path(spec).expanduser()
    except RuntimeError as error:
        raise CheckpointError(
            f"'{printable(str(spec))}' names no home folder; give the whole path"
        ) from error


def require_file(path: Path) -> Path:
    """The path of a regular file; everything else is refused before it is opened, since a pipe or a device may block.

    ``path``: A file, or a link to one.
    Raises CheckpointError: If it is missing, a folder, a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(
            f"'{path}' cannot be read: {_reason(error)}; complete the checkpoint"
        ) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"'{path}' is {kind_of(mode)}; expected a regular file")
    return path


def _reason(error: BaseException) -> str:
    return ((isinstance(error, OSError) and error.strerror) or first_line(error)).lower()


def own_file(folder: Path, name: object) -> Path:
    """The path of a file that a checkpoint names.

    ``name``: what an index or a configuration gives.
    Returns: In ``folder``. The file may be missing.
    Raises CheckpointError: If it is no name of a file in the folder, or a link to what is outside.
    """
    # Windows splits at / and \, and knows drives.
    if not isinstance(name, str) or name in ("", "..") or "\0" in name or PureWindowsPath(name).name != name:
        raise CheckpointError(
            f"'{folder}' names {_shown(name)} as a file, which may lead out of it; expected the name of one in it"
        )
    path = folder / name
    require_inside(folder, path)
    return path


def require_inside(folder: Path, path: Path) -> None:
    """Refuse a path that a link leads out of the checkpoint's folder.

    The cache of the Hugging Face hub, where ``models--a--b/snapshots/REVISION/*`` are links to files in
    ``models--a--b/blobs``, is one checkpoint: of such a folder these links are its own.
    """
    try:
        target, own = path.resolve(), folder.resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise CheckpointError(f"'{path}' cannot be followed: {_reason(error)}") from error
    roots = [own, *(root / "blobs" for root in own.parents if _is_hub_repository(root, own))]
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{_shown(path.name)} leads out of the checkpoint's folder '{folder}'; only files of the folder are read: copy it "
            "there"
        )


def _is_hub_repository(root: Path, folder: Path) -> bool:
    return root.name.startswith("models--") and folder.relative_to(root).parts[0] == "snapshots"


def _shown(name: object) -> str:
    text = ascii(name)  # no newline or escape sequence of the file reaches the terminal
    return text if len(text) <= 80 else f"{text[:77]}…'"


def check_folder(folder: Path) -> None:
    """Refuse a folder with an entry that a loader could open and should not: a pipe, a device, a link to outside.

    Every file counts, since which ones a tokenizer opens depends on its class. Folders in it are not entered.
    """
    templates = folder / TEMPLATES
    for entry in (*list_folder(folder), *(list_folder(templates) if templates.is_dir() else ())):
        if entry.is_dir() and entry.name != TEMPLATES:
            continue
        require_inside(folder, entry)
        if entry.name != TEMPLATES:
            require_file(entry)


def list_folder(folder: Path) -> list[Path]:
    """What a folder contains, sorted."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' cannot be read: {_reason(error)}; change its permissions"
        ) from error


def read_json(file: Path, expected: str) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    ``expected``: what it should be, for the message.
    Raises CheckpointError: If it is no regular file, too large, no JSON, nested too deeply, or no object.
    """
    size = require_file(file).stat().st_size
    if size > JSON_LIMIT:
        raise CheckpointError(
            f"'{file}' has {size / MiB:.0f} MiB; expected {expected} of {JSON_LIMIT // MiB} at most"
        )
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise CheckpointError(
            f"'{file}' is not JSON ({reason}), so it is not a {expected}; copy or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"'{file}' is not a {expected}: it holds a {type(content).__name__}; copy or download it again"
        )
    return content


@contextmanager
def offline() -> Iterator[None]:
    """Have the libraries of Hugging Face fetch nothing, as long as a checkpoint is loaded.

    ``local_files_only`` asks the same of transformers, but not of everything that an architecture or a tokenizer calls.
    """
    try:
        from huggingface_hub import constants
    except ImportError:  # nor is there anything that would fetch
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
