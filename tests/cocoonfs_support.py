# SPDX-License-Identifier: MIT OR Apache-2.0
"""What tests of volumes share: contents and randomness that are the same in each run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

__all__ = ["content", "fixed_random"]


def content(seed: str, length: int) -> bytes:
    """Bytes that only this seed gives."""
    return hashlib.shake_128(seed.encode()).digest(length)


def fixed_random(seed: str = "random") -> Callable[[int], bytes]:
    """A source that gives the same bytes in the same order each time."""
    counter = 0

    def draw(length: int) -> bytes:
        nonlocal counter
        counter += 1
        return content(f"{seed} {counter}", length)

    return draw
