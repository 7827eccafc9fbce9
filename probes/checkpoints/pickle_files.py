"""How are tensors read from a pickle? Without running code, after its sizes are checked against the file."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from depthscope.probes.checkpoints.errors import CheckpointError, errors_of, first_line
from depthscope.probes.checkpoints.own_files import MiB, require_file

ZIP_BEGINNING = b"PK\x03\x04"  # how torch recognises its own format; all others are streams of pickles
# The pickle of a state dict has about 100 bytes a tensor; its opcodes are read one by one.
PICKLE_LIMIT = 64 * MiB
MOST_OPCODES = 1_000_000  # a tensor has about 30, each of which is followed here in 2 µs
DIRECTORY_LIMIT = 16 * MiB  # 200 000 entries, each of which becomes an object of Python
ZIP_ENDING = 66_000  # bytes; a comment of at most 65535, and the records before it
NUM_HEADER_PICKLES = (
    4  # before the storages of torch's older format: magic number, version, machine, contents
)
# A tuple that contains one tuple twice, and so on, is short in the file and takes 2ⁿ steps to hash or to print. Those of
# tensors have about ten entries.
LARGEST_TUPLE = 10**6


def load_pickle(file: Path) -> Any:
    """The contents of a ``.bin``, ``.pt`` or ``.pth`` file: tensors and plain values, no code.

    ``file``: what ``torch.save`` wrote, in either of its formats.
    Returns: Tensors are on the CPU, and memory-mapped where the format allows it.
    Raises CheckpointError: If it is no regular file, torn, has entries larger than the file, or would have to run code.
    """
    require_file(file)
    message = f"'{file}' cannot be read as torch weights"
    with errors_of("torch", message):
        is_zip = _check_zip(file) if _begins_as_zip(file) else _check_stream(file)
        try:
            with warnings.catch_warnings():
                # that it was written by another program, which is no reason to refuse it
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"'{file}' is a pickle that contains more than tensors and would have to run code to open, or it is torn; "
                "save the weights alone with torch.save(model.state_dict(), path), or ask for a .safetensors version"
            ) from error
        _check_tensors(content, file)
    return content


def _begins_as_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(ZIP_BEGINNING)) == ZIP_BEGINNING


def _check_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - ZIP_ENDING))
        if _directory_size(opened.read()) > DIRECTORY_LIMIT:
            raise CheckpointError(f"'{file}' lists more entries than a file of torch.save; save it again")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch.save never compresses: a compressed entry is another program's, and may unpack to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(
                f"'{file}' has compressed entries, which torch.save does not write; save it again"
            )
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise CheckpointError(
                f"'{file}' describes more bytes than the file has; copy or download it again"
            )
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > PICKLE_LIMIT:
                    raise CheckpointError(
                        f"'{file}' has a pickle above {PICKLE_LIMIT // MiB} MiB; save it again"
                    )
                _check_opcodes(io.BytesIO(archive.read(entry)), file)
    return True


def _directory_size(ending: bytes) -> int:
    """Size in bytes of the list of a zip file's entries, from the records at its end; 0 where there are none."""
    sizes = [0]
    # The format's records: four bytes of their own, then the size at a fixed place, in 4 or in 8 bytes.
    for beginning, place, width in ((b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8)):
        at = ending.rfind(beginning)
        size = int.from_bytes(ending[at + place : at + place + width], "little") if at >= 0 else 0
        sizes.append(0 if size == 256**width - 1 else size)  # all ones: the larger record has it
    return max(sizes)


def _check_stream(file: Path) -> bool:
    # The storages follow the pickles and are not read here.
    with file.open("rb") as opened:
        for _ in range(NUM_HEADER_PICKLES):
            if opened.tell() and opened.tell() == file.stat().st_size:
                break  # a plain pickle has one part
            _check_opcodes(opened, file)
    return False


def _check_opcodes(pickled: Any, file: Path) -> None:
    """Refuse a pickle whose tuples multiply; follows the stack of the pickle machine, with sizes instead of values."""
    stack: list[int | None] = []  # number of entries below each value; None is a mark
    memo: dict[int, int] = {}
    try:
        for number, (opcode, argument, position) in enumerate(pickletools.genops(pickled)):
            if number > MOST_OPCODES or (position or 0) > PICKLE_LIMIT:
                raise CheckpointError(
                    f"'{file}' has a pickle of more than {MOST_OPCODES} steps or {PICKLE_LIMIT // MiB} MiB; save the weights "
                    "alone with torch.save(model.state_dict(), path)"
                )
            _follow(opcode, argument, stack, memo)
            if stack and (stack[-1] or 0) > LARGEST_TUPLE:
                raise CheckpointError(
                    f"'{file}' has tuples of tuples without end; it is not a file of torch.save"
                )
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{file}' cannot be read as torch weights: no pickle ({first_line(error)}); copy it again"
        ) from error


def _follow(
    opcode: pickletools.OpcodeInfo, argument: Any, stack: list[int | None], memo: dict[int, int]
) -> None:
    if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}:
        memo[len(memo) if argument is None else int(argument)] = stack[-1] or 0
    elif opcode.name in {"GET", "BINGET", "LONG_BINGET"}:
        stack.append(memo[int(argument)])
    elif opcode.name == "MARK":
        stack.append(None)
    elif opcode.name == "DUP":
        stack.append(stack[-1])
    else:
        below = list(_popped(opcode, stack))
        size = 1 + sum(below) if "TUPLE" in opcode.name else 1
        stack.extend([size] * len(opcode.stack_after))


def _popped(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> Iterator[int]:
    before = list(opcode.stack_before)
    while before:
        wanted = before.pop()
        if wanted is pickletools.stackslice:
            while (value := stack.pop()) is not None:
                yield value
            before.pop()  # the mark itself
        else:
            yield stack.pop() or 0


def _check_tensors(content: Any, file: Path) -> None:
    size = file.stat().st_size
    for tensor in tensors_in(content):
        # a tensor without data, or whose elements share one number, would be as large as it states once it is copied
        if tensor.is_meta or (tensor.layout is torch.strided and tensor.nbytes > size):
            raise CheckpointError(
                f"'{file}' has a tensor of shape {tuple(tensor.shape)} that is larger than the file; save it again with "
                "tensor.contiguous()"
            )


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor among nested lists and dictionaries."""
    # by a list, since a file may nest deeper than Python's stack
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
