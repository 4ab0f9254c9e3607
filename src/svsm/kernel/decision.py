# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whether a commit shall happen: the kernel's one question to whoever keeps a ledger of the volume's states.

The volume asks about each commit whose journal is durable: about one that a power cut left behind when it is opened,
and about every other before it is applied. Both go to the same `DecisionSource`. There is no ledger yet, so the
answer is always yes; a ledger at the broker would be another source, and nothing else would change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from svsm.storage.volume import Decision, FoundJournal

__all__ = ["AlwaysYes", "DecisionSource", "decide_at_open"]


class DecisionSource(Protocol):
    """Who decides."""

    def decide(self, counter: int, root: bytes, answer: Callable[[Decision], None]) -> None:
        """Call `answer` once, before this returns or later.

        Args:
            counter: The update counter after the commit.
            root: The root digest after the commit.
            answer: Takes `Decision.UNKNOWN` where the ledger cannot be reached: the same question comes again.
        """


class AlwaysYes:
    """The source without a ledger."""

    def decide(self, counter: int, root: bytes, answer: Callable[[Decision], None]) -> None:
        """Yes."""
        del counter, root
        answer(Decision.YES)


def decide_at_open(source: DecisionSource) -> Callable[[FoundJournal], Decision]:
    """What `Volume.open` asks. Nothing is served yet that could wait, so no answer at once is an unknown one."""

    def decide(found: FoundJournal) -> Decision:
        answers: list[Decision] = []
        source.decide(found.counter, found.root_digest, answers.append)
        return answers[0] if answers else Decision.UNKNOWN

    return decide
