# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume as the rest of the system uses it: open, list, read, and commit in two steps.

A volume is used by one thread. It is *permanently failed* after any error at or past the point where the journal's
head may have reached the disk: what is on the disk then is the old or the new state, and only opening again tells
which. Before that point an error leaves the volume as it was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from svsm.abi.block import BlockDevice
from svsm.formats.errors import FormatError, StateError
from svsm.storage.cocoonfs import pending
from svsm.storage.cocoonfs.aux import NO_METADATA, AuxMetadata
from svsm.storage.cocoonfs.commit import PreparedCommit, Transaction
from svsm.storage.cocoonfs.decision import Decide, Decision, FoundJournal, always_yes
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.entities import Random
from svsm.storage.cocoonfs.expected import ANYTHING, Expected
from svsm.storage.cocoonfs.headers import CreationInfo, find_header, read_static_header
from svsm.storage.cocoonfs.image import Image, open_image
from svsm.storage.cocoonfs.index import iterate
from svsm.storage.cocoonfs.journal import is_active
from svsm.storage.cocoonfs.layout import (
    DEFAULT_LAYOUT,
    FIRST_USER_INODE,
    ImageLayout,
    StaticHeader,
)
from svsm.storage.cocoonfs.mkfs import plan_format
from svsm.storage.cocoonfs.provisioning import check_salt, context_of, create_announced, drop_stale_backup
from svsm.storage.cocoonfs.replay import ReplayPlan, plan_replay
from svsm.storage.cocoonfs.transaction import Change, CommitPlan, plan_commit

__all__ = [
    "FileInfo",
    "Volume",
]


class FileInfo(NamedTuple):
    """One file of a listing."""

    inode: int
    flags: int


class _Options(NamedTuple):
    """How a volume was opened."""

    random: Random
    decide: Decide
    trim: bool
    read_only: bool


class Volume:
    """An opened volume. Made by `open` or `create`."""

    def __init__(self, image: Image, options: _Options, *, head_is_clean: bool, is_decided: bool = True) -> None:
        self._image = image
        self._options = options
        self._head_is_clean = head_is_clean
        self._failed = False
        self._pending: PreparedCommit | None = None
        if is_decided and not (options.read_only or image.volume.io.device.read_only):
            self._settle_aux()

    def _settle_aux(self) -> None:
        """Mend what an interrupted change of auxiliary metadata without the key left; its contents stay."""
        try:
            self._image.aux.settle(self._image.volume.io)
        except FormatError:
            return  # both copies are damaged; `aux` says so, and the files are not concerned

    @classmethod
    def open(
        cls,
        device: BlockDevice,
        key: bytes,
        *,
        random: Random = os.urandom,
        decide: Decide = always_yes,
        trim: bool = False,
        read_only: bool = False,
        expected: Expected = ANYTHING,
        first_use: bool = False,
        allow_weak: bool = False,
    ) -> Volume:
        """Open a volume; a pending commit is decided first.

        Args:
            device: The disk.
            key: The volume key, any length.
            random: Source of randomness for later commits.
            decide: Asked about a pending commit, and about each later `Transaction.commit`. After
                `Decision.UNKNOWN` the volume shows the old state, and takes no commit before `decide_again`.
            trim: Whether the device may give up blocks that are free. The host then sees which ones are.
            read_only: Write nothing. A pending commit that is decided with yes is shown as carried out, in memory.
            expected: What the volume has to be; see `Expected`.
            first_use: Whether a volume that is only announced is made now (see `provisioning`); without it, refused.
            allow_weak: Whether the volume may use SHA-1 or TDES.

        Raises:
            IntegrityError: ``cocoonfs-authentication``: wrong key or changed contents; nothing was written.
                ``cocoonfs-decided-other``: the state after the commit is not the one that was decided on.
            FormatError: ``cocoonfs-no-magic``, ``cocoonfs-creation-info``, ``cocoonfs-header``, ``cocoonfs-truncated``,
                ``cocoonfs-unsupported-…``, ``cocoonfs-format``.
            PolicyError: ``cocoonfs-unexpected``, ``cocoonfs-weak``; nothing was written.
            StateError: ``cocoonfs-journal-pending`` on a read-only device (without `read_only`);
                ``cocoonfs-half-applied``: the old state is wanted, and gone.
            BackendError: ``block-io``.
        """
        header = find_header(device)
        if isinstance(header, CreationInfo):
            if not first_use:
                raise FormatError(
                    "this volume was announced, but not created yet",
                    code="cocoonfs-creation-info",
                    hint="nothing is on it yet; `svsm volume write --first-use` (or batch, import) and its key make it",
                )
            create_announced(device, key, header, expected=expected, allow_weak=allow_weak, random=random)
            header = read_static_header(device)
        expected.check_header(header.layout, header.salt)
        if not allow_weak:
            header.layout.refuse_weak()
        context = context_of(device, key, header, expected)
        head = context.io.read(context.places.journal_head)
        journal = is_active(context.layout, head)
        options = _Options(random, decide, trim, read_only)
        if journal is None:
            clean = not any(head[: context.io.first_bytes])
            return cls(open_image(context), options, head_is_clean=clean)
        if device.read_only and not read_only:
            raise StateError(
                "a commit is pending, and the device is read-only",
                code="cocoonfs-journal-pending",
                hint="open the volume for writing once",
            )
        plan = plan_replay(context, journal)
        answer = decide(plan.found)
        if answer is Decision.YES:
            image = pending.look_ahead(context, plan) if read_only else pending.carry_out(context, plan)
            return cls(image, options, head_is_clean=True)
        image = pending.old_state(context, plan)
        volume = cls(image, options, head_is_clean=True, is_decided=answer is not Decision.UNKNOWN)
        if answer is Decision.UNKNOWN:
            volume._pending = PreparedCommit(plan.found, lambda yes: volume._settle(plan, yes=yes))
        elif not read_only:
            volume._clear_head()
        return volume

    @classmethod
    def create(
        cls,
        device: BlockDevice,
        key: bytes,
        *,
        salt: bytes,
        size_bytes: int | None = None,
        layout: ImageLayout = DEFAULT_LAYOUT,
        aux: AuxMetadata = NO_METADATA,
        allow_weak: bool = False,
        random: Random = os.urandom,
        trim: bool = False,
    ) -> Volume:
        """Make an empty volume and open it. Whatever was on the device is lost.

        Args:
            device: The disk.
            key: The volume key.
            salt: At most 255 bytes, stored in clear; makes the keys differ between volumes of one key.
            size_bytes: How much of the device to use; all of it by default.
            layout: The configuration.
            aux: Auxiliary metadata, and what to reserve for it.
            allow_weak: Whether SHA-1 and TDES may be used.
            random: Source of randomness.
            trim: As for `open`.

        Raises:
            FormatError: ``cocoonfs-too-small``, ``cocoonfs-salt``, ``cocoonfs-device-blocks``, ``cocoonfs-layout``,
                ``cocoonfs-unsupported-…``.
            PolicyError: ``cocoonfs-weak``.
            BackendError: ``block-io``.
        """
        check_salt(salt)
        layout.validate()
        if not allow_weak:
            layout.refuse_weak()
        size = device.size_bytes if size_bytes is None else size_bytes
        if size > device.size_bytes:
            raise FormatError("the device is smaller than that", code="cocoonfs-too-small", got=device.size_bytes)
        volume = context_of(device, key, StaticHeader(layout, salt))
        plan = plan_format(volume, size_bytes=size, metadata=aux, random=random)
        drop_stale_backup(device, volume.io)
        plan.write()
        return cls.open(device, key, allow_weak=allow_weak, random=random, trim=trim)

    @property
    def counter(self) -> int:
        """The update counter: one more with each commit."""
        return self._image.counter

    @property
    def root_digest(self) -> bytes:
        """The MAC over the whole state, 32 bytes by default."""
        return self._image.header.root_hmac

    @property
    def size_bytes(self) -> int:
        """Size of the image (not of the device)."""
        return self._image.image_ab * self._image.volume.layout.ab_bytes

    @property
    def free_bytes(self) -> int:
        """Unallocated space; a file can use a little less."""
        return self._image.used.free_ab * self._image.volume.layout.ab_bytes

    @property
    def layout(self) -> ImageLayout:
        """The configuration."""
        return self._image.volume.layout

    @property
    def salt(self) -> bytes:
        """The salt."""
        return self._image.volume.static.salt

    @property
    def aux(self) -> AuxMetadata:
        """Auxiliary metadata. Not authenticated: anybody with the disk may have written it.

        Raises:
            FormatError: ``cocoonfs-aux``.
            BackendError: ``block-io``.
        """
        return self._usable().aux.read()

    @property
    def image(self) -> Image:
        """What is behind it, for the other modules of this package."""
        return self._usable()

    @property
    def failed(self) -> bool:
        """Whether the volume must be opened again."""
        return self._failed

    def _usable(self) -> Image:
        if self._failed:
            raise StateError(
                "the volume failed during a commit and must be opened again",
                code="cocoonfs-failed",
                hint="start again; opening the volume finds the state before or after that commit",
            )
        return self._image

    def list(self) -> list[FileInfo]:
        """All files, by inode number."""
        image = self._usable()
        entries = iterate(image.load, image.entry_leaf, image.image_ab)
        return [FileInfo(entry.inode, entry.flags) for entry in entries if entry.inode >= FIRST_USER_INODE]

    def exists(self, inode: int) -> bool:
        """Whether there is a file with this number."""
        return inode >= FIRST_USER_INODE and self._usable().find(inode) is not None

    def read(self, inode: int) -> bytes:
        """A file's contents.

        Raises:
            StateError: ``cocoonfs-no-such-file``, ``cocoonfs-failed``.
            IntegrityError: ``cocoonfs-authentication``.
            FormatError: ``cocoonfs-format``.
            BackendError: ``block-io``.
        """
        image = self._usable()
        entry = image.find(inode) if inode >= FIRST_USER_INODE else None
        if entry is None:
            raise StateError("there is no such file in the volume", code="cocoonfs-no-such-file", inode=inode)
        return image.read_file(entry)

    def inodes(self) -> set[int]:
        """The numbers of all files. Raises what `list` raises."""
        return {info.inode for info in self.list()}

    @property
    def decide(self) -> Decide:
        """Who is asked about commits."""
        return self._options.decide

    @property
    def pending(self) -> PreparedCommit | None:
        """The commit that waits for its decision, if there is one."""
        return self._pending

    def decide_again(self) -> Decision:
        """Put the question about the commit that waits once more, and do what the answer says.

        Raises:
            StateError: ``cocoonfs-commit-ended`` where none waits; ``cocoonfs-read-only``, ``cocoonfs-failed``.
            IntegrityError, BackendError: As for `PreparedCommit.apply`.
        """
        self._writable()
        if self._pending is None:
            raise StateError("no commit waits for a decision", code="cocoonfs-commit-ended")
        return self._pending.decide(self._options.decide)

    def transaction(self) -> Transaction:
        """Begin to collect changes."""
        self._usable()
        return Transaction(self)

    def close(self) -> None:
        """Close the device."""
        self._image.volume.io.device.close()

    # -- commit ------------------------------------------------------------------------------------------------

    def _writable(self) -> Image:
        image = self._usable()
        if self._options.read_only:
            raise StateError(
                "the volume was opened for reading only",
                code="cocoonfs-read-only",
                hint="open it without read_only to change it",
            )
        if image.volume.io.device.read_only:
            raise StateError("the device is read-only", code="block-read-only")
        return image

    def prepare(self, changes: dict[int, Change], *, release: Sequence[Extent] = ()) -> PreparedCommit:
        """Make a journal durable that leads to these changes, by inode. For `Transaction`, `CommitGroup` and `repair`.

        Args:
            changes: By inode.
            release: Extents that the bitmap says are in use, and nothing uses: they become free.

        Raises:
            StateError: ``cocoonfs-full``, ``cocoonfs-no-such-file``, ``cocoonfs-commit-pending``,
                ``cocoonfs-read-only``, ``block-read-only``, ``cocoonfs-failed``.
            IntegrityError: ``cocoonfs-authentication``.
            BackendError: ``block-io``.
        """
        image = self._writable()
        if self._pending is not None:
            raise StateError(
                "another commit waits for its decision",
                code="cocoonfs-commit-pending",
                hint="apply or cancel it, or have it decided again",
            )
        for inode, change in changes.items():
            if change.data is None and image.find(inode) is None:
                raise StateError("there is no such file in the volume", code="cocoonfs-no-such-file", inode=inode)
        plan = plan_commit(image, changes, self._options.random, trim=self._options.trim, release=release)
        io, head = image.volume.io, image.volume.places.journal_head[0]
        if not self._head_is_clean:
            with self._final():
                io.zero_first(head)
                io.flush()
            self._head_is_clean = True
        io.write([*plan.in_place, *plan.staging, *plan.log_tails])
        tail = io.write_tail(head, plan.head)
        if tail is not None:
            io.write_bytes([tail])
        with self._final():
            io.flush()  # what the journal points at, before the journal
            io.write_first(head, plan.head)
            io.flush()  # the journal, before anything it would have to mend
        found = FoundJournal(plan.counter, plan.header.root_hmac)
        self._pending = PreparedCommit(found, lambda yes: self._finish(plan, yes=yes))
        return self._pending

    def _finish(self, plan: CommitPlan, *, yes: bool) -> None:
        image = self._usable()
        io = image.volume.io
        with self._final():
            if yes:
                io.write(plan.targets)
                io.flush()  # the new state, before the journal that leads to it goes
            self._clear_head()
            if yes:
                io.discard(plan.discards)
        if yes:
            plan.adopt(image)
        self._pending = None

    def _settle(self, plan: ReplayPlan, *, yes: bool) -> None:
        """End a commit that was found at open and not decided then."""
        image = self._writable()
        with self._final():
            if yes:
                self._image = pending.carry_out(image.volume, plan)
            else:
                self._clear_head()
            self._settle_aux()
        self._pending = None

    def _clear_head(self) -> None:
        image = self._image
        image.volume.io.zero_first(image.volume.places.journal_head[0])
        image.volume.io.flush()  # the end of the journal, before its space is used again

    def _final(self) -> _FailsForGood:
        return _FailsForGood(self)

    def _fail(self) -> None:
        self._failed = True


class _FailsForGood:
    """Around what must not be tried twice: an exception inside makes the volume unusable."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._volume._fail()
