# SPDX-License-Identifier: MIT OR Apache-2.0
"""Takes one check out of a driver and lets a fuzzer look for it, from nothing: no corpus, no seeds.

A finding that is there without the check, and not with it, means that the target's invariants see what the check is
for. Time is processor time, so that a busy machine finds as much as an idle one.
"""

from __future__ import annotations

import importlib
import time
from typing import Final

from svsm.fuzz.builtin import fuzz
from svsm.fuzz.target import Target, execute
from svsm.fuzz.watch import watched
from svsm.testing.review import Found, Review, Row, without

__all__ = ["find_removal"]

_EXECUTIONS: Final = 1500
"""Of one search."""


def find_removal(review: Review, row: Row, *, seconds: float, seed: int = 1) -> Found | None:
    """How the row's target finds that the row's check is gone, or None when it does not in that time.

    Args:
        review: The row's.
        row: One that has a target.
        seconds: Of processor time.
        seed: Of the random choices.

    Raises:
        Finding: What was found is there with the check as well.
    """
    name = review.target_of(row)
    whole = _target(review, name)
    with without(review, row, rebuilt=review.fuzzers):
        target, executions, started = watched(_target(review, name)), 0, time.process_time()
        findings: dict[str, tuple[bytes, str]] = {}
        while not findings and (left := started + seconds - time.process_time()) > 0:
            # From nothing again and again: what the first inputs happen to be decides much.
            run = fuzz(
                target,
                [],
                seed=seed,
                seconds=left,
                executions=_EXECUTIONS,
                clock=time.process_time,
                first_finding=True,
            )
            seed, executions, findings = seed + 1, executions + run.executions, run.findings
        spent = time.process_time() - started
    for data, _ in findings.values():
        execute(whole, data)
        return Found(name, executions, spent)
    return None


def _target(review: Review, name: str) -> Target:
    targets: tuple[Target, ...] = importlib.import_module(review.fuzzers[0]).ROWS
    return next(target for target in targets if target.name == name)
