# SPDX-License-Identifier: MIT OR Apache-2.0
"""Picks the few inputs of a large corpus that the repository keeps: smallest first, each for lines that are new.

Lines are counted with `sys.settrace`, which is slow and needs no engine. Only our own code counts, not the targets.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from svsm.fuzz.target import Finding, Target, execute

__all__ = ["MAX_INPUT_BYTES", "MAX_TOTAL_BYTES", "distilled", "lines_of"]

MAX_INPUT_BYTES = 4096
MAX_TOTAL_BYTES = 16 << 10
"""Of one target's corpus in the repository."""


def lines_of(action: Callable[..., object], *arguments: object) -> set[tuple[str, int]]:
    """(module, line) of everything of svsm, except svsm.fuzz, that `action` runs through, with these arguments."""
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("svsm.") or name.startswith("svsm.fuzz."):
            return None
        seen.add((name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action(*arguments)
    finally:
        sys.settrace(before)
    return seen


def distilled(target: Target, inputs: Iterable[bytes]) -> list[bytes]:
    """The inputs to keep, in the order of their size; what the target's seeds reach already counts as known."""
    known: set[tuple[str, int]] = set()

    def run(data: bytes) -> None:
        with contextlib.suppress(Finding):
            execute(target, data)

    for seed in target.seeds():
        run(seed)  # imports and caches are no coverage
        known |= lines_of(run, seed)
    kept: list[bytes] = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        if len(data) > MAX_INPUT_BYTES or sum(map(len, kept)) + len(data) > MAX_TOTAL_BYTES:
            continue
        new = lines_of(run, data) - known
        if new:
            known |= new
            kept.append(data)
    return kept
