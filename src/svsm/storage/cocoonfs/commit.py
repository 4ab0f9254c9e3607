# SPDX-License-Identifier: MIT OR Apache-2.0
"""What users hold in their hands to change a volume: a transaction, and a commit that waits for its decision.

A transaction only remembers; nothing is laid out, let alone written, before `Transaction.prepare`. It also notes what
was looked at, so that transactions can be put together into one commit (see `group`) where that changes nothing for
any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.decision import Decide, Decision, FoundJournal, refused, undecided
from svsm.storage.cocoonfs.layout import FIRST_USER_INODE
from svsm.storage.cocoonfs.transaction import AUX_CHANGE, Change

__all__ = ["PreparedCommit", "Target", "Transaction"]

_MAX_INODE = (1 << 64) - 1


class PreparedCommit:
    """A commit whose journal is durable: after a power cut the volume opens in the new state unless `decide` says no.

    Exactly one of `apply` and `cancel` ends it; until then the volume shows the old state and takes no other commit.

    Args:
        found: The state that it leads to.
        finish: Carries it out (True) or takes it away (False).
    """

    def __init__(self, found: FoundJournal, finish: Callable[[bool], None]) -> None:
        self._finish: Callable[[bool], None] | None = finish
        self.found = found

    @property
    def counter(self) -> int:
        """Update counter after it."""
        return self.found.counter

    @property
    def root_digest(self) -> bytes:
        """Root digest after it."""
        return self.found.root_digest

    def _take(self) -> Callable[[bool], None]:
        finish, self._finish = self._finish, None
        if finish is None:
            raise StateError("this commit has ended", code="cocoonfs-commit-ended")
        return finish

    def apply(self) -> None:
        """Put everything into place; the new state is the volume's from now on.

        Raises:
            BackendError: ``block-io``; the volume has failed then.
            IntegrityError: ``cocoonfs-decided-other``, for one that was found at open; the volume has failed then.
            StateError: ``cocoonfs-commit-ended``, ``cocoonfs-failed``.
        """
        self._take()(True)

    def cancel(self) -> None:
        """Take the journal away; the old state stays.

        Raises:
            BackendError: ``block-io``; the volume has failed then.
            StateError: ``cocoonfs-commit-ended``, ``cocoonfs-failed``.
        """
        self._take()(False)

    def decide(self, decide: Decide) -> Decision:
        """Ask, and do what the answer says; after `Decision.UNKNOWN` the commit still waits.

        Raises:
            What `apply` and `cancel` raise.
        """
        if self._finish is None:
            raise StateError("this commit has ended", code="cocoonfs-commit-ended")
        answer = decide(self.found)
        if answer is Decision.YES:
            self.apply()
        elif answer is Decision.NO:
            self.cancel()
        return answer


class Target(Protocol):
    """What a transaction needs of its volume."""

    @property
    def decide(self) -> Decide:
        """Asked about each commit."""

    def inodes(self) -> set[int]:
        """The files that there are."""

    def exists(self, inode: int) -> bool:
        """Whether there is this file."""

    def read(self, inode: int) -> bytes:
        """Its contents."""

    @property
    def aux(self) -> AuxMetadata:
        """The auxiliary metadata."""

    def prepare(self, changes: dict[int, Change]) -> PreparedCommit:
        """Make a journal of these changes durable."""


def _no_such_file(inode: int) -> StateError:
    return StateError("there is no such file in the volume", code="cocoonfs-no-such-file", inode=inode)


def _check_inode(inode: int) -> None:
    if not FIRST_USER_INODE <= inode <= _MAX_INODE:
        raise StateError(
            "this inode number is not for files",
            code="cocoonfs-inode",
            hint=f"a file has a number that you choose: {FIRST_USER_INODE} or more, at most 64 bits",
            inode=inode,
        )


class Transaction:
    """Changes to several files that happen together or not at all.

    As a context manager it commits at the end of the block (prepare, decide, apply), and forgets everything where the
    block raises.
    """

    def __init__(self, volume: Target) -> None:
        self._volume = volume
        self._changes: dict[int, Change] | None = {}
        self._seen: set[int] = set()
        self._saw_all = False

    def _open(self) -> dict[int, Change]:
        if self._changes is None:
            raise StateError("this transaction has ended", code="cocoonfs-transaction-ended")
        return self._changes

    def write(self, inode: int, data: bytes | bytearray | memoryview, flags: int = 0) -> None:
        """Create or replace a file.

        Args:
            inode: At least 16.
            data: All of its contents.
            flags: One byte, the application's.

        Raises:
            StateError: ``cocoonfs-inode``, ``cocoonfs-flags``, ``cocoonfs-transaction-ended``.
        """
        _check_inode(inode)
        if not 0 <= flags <= 0xFF:
            raise StateError("flags are one byte", code="cocoonfs-flags", got=flags)
        self._open()[inode] = Change(bytes(data), flags)

    def unlink(self, inode: int) -> None:
        """Remove a file.

        Raises:
            StateError: ``cocoonfs-no-such-file``, ``cocoonfs-inode``, ``cocoonfs-transaction-ended``.
        """
        _check_inode(inode)
        changes = self._open()
        known = changes.get(inode)
        stored = self._volume.exists(inode)
        self._seen.add(inode)
        if (known is None and not stored) or (known is not None and known.data is None):
            raise _no_such_file(inode)
        if stored:
            changes[inode] = Change(None)
        else:
            del changes[inode]

    def exists(self, inode: int) -> bool:
        """Whether there is a file with this number as this transaction leaves it.

        Raises:
            StateError: ``cocoonfs-transaction-ended``.
        """
        known = self._open().get(inode)
        if known is not None:
            return known.data is not None
        self._seen.add(inode)
        return self._volume.exists(inode)

    def inodes(self) -> list[int]:
        """The numbers of all files as this transaction leaves them, ascending.

        Raises:
            StateError: ``cocoonfs-transaction-ended``.
        """
        changes = self._open()
        self._saw_all = True
        found = self._volume.inodes()
        found |= {inode for inode, change in changes.items() if change.data is not None and inode != AUX_CHANGE}
        return sorted(found - {inode for inode, change in changes.items() if change.data is None})

    def read(self, inode: int) -> bytes:
        """A file's contents as this transaction leaves it.

        Raises:
            StateError: ``cocoonfs-no-such-file``, ``cocoonfs-transaction-ended``.
        """
        known = self._open().get(inode)
        if known is None:
            self._seen.add(inode)
            return self._volume.read(inode)
        if known.data is None:
            raise _no_such_file(inode)
        return known.data

    @property
    def aux(self) -> AuxMetadata:
        """The auxiliary metadata as this transaction leaves it.

        Raises:
            FormatError: ``cocoonfs-aux``.
            StateError: ``cocoonfs-transaction-ended``.
        """
        known = self._open().get(AUX_CHANGE)
        if known is not None:
            return AuxMetadata.parse(known.data or b"")
        self._seen.add(AUX_CHANGE)
        return self._volume.aux

    def set_aux(self, metadata: AuxMetadata) -> None:
        """Replace the auxiliary metadata; it gets new storage with the reserve that it asks for.

        Raises:
            StateError: ``cocoonfs-transaction-ended``.
        """
        self._open()[AUX_CHANGE] = Change(metadata.pack())

    def depends_on(self, inodes: set[int]) -> bool:
        """Whether it looked at one of these files (beyond what it wrote itself)."""
        return bool(inodes) and (self._saw_all or not inodes.isdisjoint(self._seen))

    def take(self) -> dict[int, Change]:
        """The changes; the transaction ends.

        Raises:
            StateError: ``cocoonfs-transaction-ended``.
        """
        changes = self._open()
        self._changes = None
        return changes

    def prepare(self) -> PreparedCommit:
        """Make the journal durable; the transaction ends.

        Raises:
            StateError: ``cocoonfs-full``: nothing was changed; ``cocoonfs-commit-pending``, ``cocoonfs-read-only``,
                ``cocoonfs-failed``.
            BackendError: ``block-io``.
        """
        return self._volume.prepare(self.take())

    def commit(self) -> None:
        """`prepare`, ask the volume's `decide`, `apply`; nothing at all where nothing was changed.

        Raises:
            StateError: What `prepare` raises; ``cocoonfs-undecided``: the commit waits, see `Volume.decide_again`.
            PolicyError: ``cocoonfs-refused``: the decision was no.
            BackendError: ``block-io``.
        """
        if not self._open():
            self._changes = None
            return
        answer = self.prepare().decide(self._volume.decide)
        if answer is Decision.UNKNOWN:
            raise undecided()
        if answer is Decision.NO:
            raise refused()

    def abandon(self) -> None:
        """Forget the changes."""
        self._changes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        elif self._changes is not None:
            self.commit()
