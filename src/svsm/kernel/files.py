# SPDX-License-Identifier: MIT OR Apache-2.0
"""The files of the volume, as services see them: read one, replace several atomically.

A replacement completes when its commit is applied, and never before. Commits are split into *prepare* (the journal
head is durable), *decide* and *apply*; the decision comes through a callback, so that a ledger at the broker can take
its time while the kernel serves others. After *no* the change is refused; after *unknown* it stays unanswered, no
other commit starts, and the question is put again. Changes that arrive while a decision is under way wait and go into
the next commit together: the flushes of one commit then serve all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from svsm.abi.errors import PolicyError, SvsmError
from svsm.kernel.decision import DecisionSource
from svsm.storage.volume import Decision, PreparedCommit, Volume

__all__ = ["ASK_AGAIN_SECONDS", "VolumeFiles"]

ASK_AGAIN_SECONDS: Final = 1.0
"""From an unknown answer to the next question about the same commit."""

Done = Callable[[SvsmError | None], None]


class VolumeFiles:
    """A `svsm.kernel.objects.FileStore` on the opened volume.

    Args:
        volume: The volume, with no commit pending; only this object commits to it.
        source: Asked between prepare and apply.
        later: Calls once, after so many seconds: the event loop's.
        on_failure: Told when a commit failed, for the log.
    """

    def __init__(
        self,
        volume: Volume,
        *,
        source: DecisionSource,
        later: Callable[[float, Callable[[], None]], object],
        on_failure: Callable[[SvsmError], None] = lambda _error: None,
    ) -> None:
        self._volume = volume
        self._source = source
        self._later = later
        self._on_failure = on_failure
        self._waiting: list[tuple[dict[int, bytes], Done]] = []
        self._deciding = False
        self._working = False

    def read(self, inode: int) -> bytes | None:
        """A file's contents, None when there is none. Raises what the volume raises."""
        return self._volume.read(inode) if self._volume.exists(inode) else None

    def replace_many(self, changes: Mapping[int, bytes], done: Done) -> None:
        """Replace whole files, all or none; `done` gets None once the new state is durable, else why it is not."""
        self._waiting.append((dict(changes), done))
        self._work()

    def _work(self) -> None:
        """Commit what waits, until a decision has to be waited for."""
        if self._working:
            return  # called back from below: the loop goes on by itself, and the stack does not grow with what waits
        self._working = True
        try:
            while self._waiting and not self._deciding:
                self._commit()
        finally:
            self._working = False

    def _commit(self) -> None:
        most = len(self._waiting)
        while True:
            batch = self._waiting[:most]
            try:
                prepared = self._prepare(batch)
                break
            except SvsmError as error:
                if error.code == "cocoonfs-full" and most > 1:
                    most //= 2  # one change that does not fit must not take the others with it
                    continue
                del self._waiting[:most]
                self._finish(batch, error)
                return
        del self._waiting[:most]
        self._deciding = True
        self._ask(prepared, batch)

    def _prepare(self, batch: Sequence[tuple[dict[int, bytes], Done]]) -> PreparedCommit:
        transaction = self._volume.transaction()
        for changes, _ in batch:
            for inode, data in changes.items():
                transaction.write(inode, data)
        return transaction.prepare()

    def _ask(self, prepared: PreparedCommit, batch: list[tuple[dict[int, bytes], Done]]) -> None:
        def answer(decision: Decision) -> None:
            if decision is Decision.UNKNOWN:
                self._later(ASK_AGAIN_SECONDS, lambda: self._ask(prepared, batch))
            else:
                self._decided(prepared, batch, decision)

        self._source.decide(prepared.counter, prepared.root_digest, answer)

    def _decided(
        self, prepared: PreparedCommit, batch: list[tuple[dict[int, bytes], Done]], decision: Decision
    ) -> None:
        failure: SvsmError | None = None
        try:
            if decision is Decision.YES:
                prepared.apply()
            else:
                prepared.cancel()
                failure = PolicyError("the ledger does not accept this change", code="files-refused")
        except SvsmError as error:
            failure = error
        self._deciding = False
        self._finish(batch, failure)
        self._work()

    def _finish(self, batch: list[tuple[dict[int, bytes], Done]], failure: SvsmError | None) -> None:
        if failure is not None:
            self._on_failure(failure)
        for _, done in batch:
            done(failure)
