"""The other process of `open_in_trial`: it reads all of a run, prints what came of it, and may die."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from depthscope.diagnostics.schema.content_digest import content_digest
from depthscope.diagnostics.schema.opening import integrity, open_here, unreadable
from depthscope.diagnostics.schema.validation import SchemaError

# Memory beyond what this process has after its imports, in addition to twice the file (a heuristic of ours).
_FREE_BYTES = 1 << 30


def _answer(request: dict[str, Any]) -> dict[str, str]:
    path = Path(request["path"])
    _limit_resources(request["seconds"], path.stat().st_size)
    try:
        with open_here(path, verify=request["verify"], max_bytes=request["max_bytes"]) as run:
            if not request["verify"]:
                # Read nevertheless: the caller is about to, where a crash or a loop would take its own process along.
                content_digest(run)
            return {"integrity": integrity(run)}
    except SchemaError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": unreadable(path, error)}


def _limit_resources(seconds: float, size: int) -> None:
    """End this process where the library loops or allocates without end; where the system has no limits, only time ends it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Path("/proc/self/statm")
    if pages.exists():
        mapped = int(pages.read_text().split()[0]) * resource.getpagesize()
        limit = mapped + _FREE_BYTES + 2 * size
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    # Only after all is read: what the libraries print must not precede the answer.
    answer = _answer(json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(answer))
