"""Under which licences are the packages that depthscope installs? A table; exit 1 where one is not known to be permissive.

python .ci/licences.py [EXTRA…], of the environment that runs it: the core alone, or with some extras.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|HPND|Unlicense|0BSD|CC0|BSL|Public Domain)\b",
    re.I,
)
# Package → why it may be installed, where its licence is another one. The MPL asks for changes of its own files alone, and
# none is changed or copied here.
ALLOWED = dict.fromkeys(("certifi", "shtab", "tqdm", "orjson"), "MPL-2.0, used as it is")


def installed(extras: Iterable[str]) -> Iterator[importlib.metadata.Distribution]:
    """The requirements of depthscope, and theirs, as far as they are installed."""
    seen: set[tuple[str, str]] = set()
    waiting = [("depthscope", extra) for extra in ("", *extras)]
    done: set[str] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in done and name != "depthscope":
            yield found
        done.add(name)
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                own = canonicalize_name(needed.name)
                waiting += [(own, of) for of in ("", *needed.extras)]


def licence(found: importlib.metadata.Distribution) -> str:
    """What a package states: its SPDX expression, its classifiers, or the first line of its field."""
    expression = found.metadata.get("License-Expression")
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in found.metadata.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    field = (found.metadata.get("License") or "").strip().splitlines()
    return expression or ", ".join(classifiers) or (field[0] if field else "")


def main(extras: list[str]) -> int:
    """Print the table."""
    code = 0
    for found in sorted(installed(extras), key=lambda each: canonicalize_name(each.name)):
        name, text = canonicalize_name(found.name), licence(found)
        is_fine = name in ALLOWED or PERMISSIVE.search(text) is not None
        code = code if is_fine else 1
        remark = ALLOWED.get(name, "" if is_fine else "NOT allowed")
        sys.stdout.write(f"{name:28} {found.version:16} {text or 'not stated'}  {remark}".rstrip() + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
