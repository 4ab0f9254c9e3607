# SPDX-License-Identifier: MIT OR Apache-2.0
"""A watchdog over a target: an input that blocks is a finding, not the end of the run."""

from __future__ import annotations

import dataclasses
import signal
from types import FrameType

from svsm.fuzz.target import Target, TimeLimit

__all__ = ["watched"]


def watched(target: Target) -> Target:
    """The target under a watchdog. For the main thread only: it is a signal."""
    seconds = max(10.0, 5 * target.cpu_seconds)

    def bark(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimit(f"no end after {seconds:.0f} s")

    def run(data: bytes) -> None:
        before = signal.signal(signal.SIGALRM, bark)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            target.run(data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return dataclasses.replace(target, run=run)
