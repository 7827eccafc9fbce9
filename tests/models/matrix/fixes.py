"""What do the rules not know? Per type of transformers: the fields to set, and the class where no table names the right one."""

from __future__ import annotations

from typing import Any

FIXES: dict[str, dict[str, Any]] = {}

CLASSES: dict[str, str] = {}
