# SPDX-License-Identifier: MIT OR Apache-2.0
"""Several transactions in one commit: the flushes of one serve all of them.

The result is the same as committing one after the other in the order they were added. A transaction that looked at a
file which an earlier one of the group changes would have seen something else then, so it is not taken: it gets
``cocoonfs-conflict`` and its owner does it again. Where the whole group does not fit into the volume, its parts are
committed one after the other, so that one that is too large does not take the others with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.formats.errors import StateError, SvsmError
from svsm.storage.cocoonfs.commit import Transaction
from svsm.storage.cocoonfs.decision import Decision, refused, undecided
from svsm.storage.cocoonfs.transaction import Change
from svsm.storage.cocoonfs.volume import Volume

__all__ = ["CommitGroup"]


class CommitGroup:
    """Transactions of one volume that are waiting for a commit.

    Args:
        volume: The volume.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._waiting: list[Transaction] = []

    def transaction(self) -> Transaction:
        """Begin a transaction on the volume as it is now; `add` it when it is complete."""
        return self._volume.transaction()

    def add(self, transaction: Transaction) -> int:
        """Let a transaction take part in the next commit; its place among the results of `commit`."""
        self._waiting.append(transaction)
        return len(self._waiting) - 1

    def commit(self) -> list[SvsmError | None]:
        """Commit all that were added; for each, in order, None or why it did not happen.

        ``cocoonfs-undecided`` among the results means that this one's commit waits (see `Volume.decide_again`);
        those behind it were not begun and get ``cocoonfs-commit-pending``.
        """
        waiting, self._waiting = self._waiting, []
        results: list[SvsmError | None] = [None] * len(waiting)
        taken: list[tuple[int, dict[int, Change]]] = []
        changed: set[int] = set()
        for place, transaction in enumerate(waiting):
            try:
                changes = transaction.take()
            except StateError as error:
                results[place] = error
                continue
            if transaction.depends_on(changed):
                results[place] = StateError(
                    "another transaction of the group changed what this one looked at",
                    code="cocoonfs-conflict",
                    hint="do it again on the new state",
                )
            elif changes:
                taken.append((place, changes))
                changed |= set(changes)
        self._commit(taken, results)
        return results

    def _commit(self, taken: Sequence[tuple[int, dict[int, Change]]], results: list[SvsmError | None]) -> None:
        if not taken:
            return
        merged: dict[int, Change] = {}
        for _, changes in taken:
            merged.update(changes)
        try:
            answer = self._volume.prepare(merged).decide(self._volume.decide)
            outcome: SvsmError | None = {Decision.YES: None, Decision.NO: refused(), Decision.UNKNOWN: undecided()}[
                answer
            ]
        except SvsmError as error:
            if error.code == "cocoonfs-full" and len(taken) > 1:
                middle = len(taken) // 2
                self._commit(taken[:middle], results)
                self._commit(taken[middle:], results)
                return
            outcome = error
        for place, _ in taken:
            results[place] = outcome
