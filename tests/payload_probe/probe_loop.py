# SPDX-License-Identifier: MIT OR Apache-2.0
"""Inside a payload process: runs what a test sends, so that the test sees the process from within."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

__all__ = ["executable_paths", "origins", "serve"]


def serve(descriptor: int, names: dict[str, Any]) -> int:
    """Evaluate one expression a line until the other end closes."""
    with socket.socket(fileno=descriptor) as control, control.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            try:
                answer: dict[str, Any] = {"value": eval(json.loads(line), names)}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer, default=repr) + "\n")
            lines.flush()
    return 0


def origins() -> dict[str, str | None]:
    """Where every loaded module comes from."""
    return {name: getattr(getattr(module, "__spec__", None), "origin", None) for name, module in sys.modules.items()}


def executable_paths(maps: str) -> list[str]:
    """The files behind executable mappings of a /proc/PID/maps text; "" for memory without one."""
    fields = [line.split(None, 5) for line in maps.splitlines()]
    return sorted({row[5] if len(row) > 5 else "" for row in fields if "x" in row[1]})
