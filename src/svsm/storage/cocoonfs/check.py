# SPDX-License-Identifier: MIT OR Apache-2.0
"""Full verification of a volume, without writing: is every byte authentic, and is every block accounted for once?

Two questions of different kinds. What *authenticates* is exactly what somebody with the key wrote; nothing can be said
about it except yes or no. What is *consistent* can be wrong in an authentic volume too, by a fault of a program: a
block in two files, a block in none, an index that breaks its own rules. Findings say which it is, how bad it is,
where, and what a person can do.

The order is that of trust: opening (headers, a pending journal, root, bitmap); every data block against the tree; the
index from its root; each file's extents and padding; then the blocks that nobody claimed. A pending commit is looked at
as carried out. Files are read in pieces, so memory does not grow with them; findings of one kind are counted beyond the
first few.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from svsm.abi.block import BlockDevice
from svsm.formats.errors import FormatError, IntegrityError, SvsmError
from svsm.storage.cocoonfs.blockmap import BlockMap
from svsm.storage.cocoonfs.creation import backup_offset
from svsm.storage.cocoonfs.decision import Decide, Decision, FoundJournal, always_yes
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.entities import Crypt, strip_padding
from svsm.storage.cocoonfs.image import Image, preauth_chain
from svsm.storage.cocoonfs.index import Entry, Internal, Leaf, pointer_extent
from svsm.storage.cocoonfs.layout import AUTH_TREE_INODE, BITMAP_INODE, CREATION_MAGIC, FIRST_USER_INODE
from svsm.storage.cocoonfs.volume import Volume

__all__ = ["CheckReport", "Finding", "Progress", "Severity", "check", "check_image", "no_progress"]

Progress = Callable[[str, int, int], None]
"""Told what is looked at, and how much of it is done: (stage, done, all, or 0 where nobody knows)."""

_PIECE_BYTES = 1 << 20
_LISTED = 50
_CLEARED_BYTES = 128  # the smallest device block: what a program that takes a journal away zeroes at least


class Severity(enum.Enum):
    """How bad a finding is."""

    NOTE = "note"
    """Worth knowing, nothing is wrong."""
    WARNING = "warning"
    """No data is concerned; `repair` can mend it."""
    ERROR = "error"
    """Data is concerned, or may be soon. Nothing mends this but a copy."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: How bad it is.
        kind: A stable name for programs.
        place: What it concerns, in blocks (ab) or inode numbers.
        sentence: For a person: what it is and what to do.
        extent: The blocks that it concerns, where it concerns some.
    """

    severity: Severity
    kind: str
    place: str
    sentence: str
    extent: Extent | None = None


@dataclass(slots=True)
class CheckReport:
    """What a check found.

    Attributes:
        findings: In the order they were found; of each kind at most 50.
        more: How many of a kind there were beyond these.
        opened: Whether the volume opened at all.
        pending: Whether a commit is pending (and was looked at as carried out).
        counter: Update counter.
        root_digest: Root digest.
        files: Files that were read completely.
        data_blocks: Data blocks that were compared with the tree.
    """

    findings: list[Finding] = field(default_factory=list)
    more: Counter[str] = field(default_factory=Counter)
    opened: bool = False
    pending: bool = False
    counter: int = 0
    root_digest: bytes = b""
    files: int = 0
    data_blocks: int = 0

    @property
    def worst(self) -> Severity:
        """The gravest severity among the findings."""
        order = list(Severity)
        return max((finding.severity for finding in self.findings), key=order.index, default=Severity.NOTE)

    @property
    def is_good(self) -> bool:
        """Whether nothing needs to be done."""
        return self.opened and self.worst is Severity.NOTE

    def add(self, severity: Severity, kind: str, place: str, sentence: str, extent: Extent | None = None) -> None:
        """Note a finding."""
        if sum(finding.kind == kind for finding in self.findings) >= _LISTED:
            self.more[kind] += 1
            return
        self.findings.append(Finding(severity, kind, place, sentence, extent))

    def to_json(self) -> dict[str, object]:
        """For `--json`; keys are stable. The counter is decimal digits: JSON's readers may keep 53 bits."""
        return {
            "good": self.is_good,
            "opened": self.opened,
            "pending": self.pending,
            "counter": str(self.counter),
            "root_digest": self.root_digest.hex(),
            "files": self.files,
            "data_blocks": self.data_blocks,
            "findings": [{**asdict(finding), "severity": finding.severity.value} for finding in self.findings],
            "more": dict(self.more),
        }


def no_progress(stage: str, done: int, whole: int) -> None:
    """Tells nobody."""
    del stage, done, whole


def _blocks(extent: Extent) -> str:
    begin, length = extent
    return f"blocks {begin}..{begin + length - 1}" if length > 1 else f"block {begin}"


class _Padding:
    """The padding at a file's end, found while its contents pass by in pieces.

    Args:
        decrypt: Of the file's key.
        block_bytes: Of the cipher.
    """

    def __init__(self, decrypt: Crypt, block_bytes: int) -> None:
        self._decrypt, self._block = decrypt, block_bytes
        self._chained = b""
        self._end = b""
        self._zeros = 0

    def feed(self, raw: bytes) -> None:
        """The next piece, whole cipher blocks; the first one starts with the IV."""
        plain = self._decrypt(self._chained + raw)
        self._chained = raw[-self._block :]
        seen = self._end + bytes(min(self._zeros, 2 * self._block)) + plain
        kept = seen.rstrip(b"\0")
        self._zeros = len(seen) - len(kept)
        self._end = kept[-2 * self._block :]

    def finish(self) -> None:
        """Raises `FormatError` ``cocoonfs-format`` where it is not as it must be."""
        strip_padding(self._end, "file")


class _Check:
    def __init__(self, image: Image, report: CheckReport, progress: Progress) -> None:
        self.image, self.report, self.progress = image, report, progress
        self.layout = image.volume.layout
        self.claimed = BlockMap(self.layout, image.image_ab)
        self.entries: list[Entry] = []

    def run(self) -> None:
        """Everything behind the opening."""
        self._journal_head()
        self._stale_backup()
        self._aux()
        self._data_blocks()
        for extent in self.image.uncounted():
            self._claim(extent, "headers, journal, metadata or tree")
        for extent in self.image.bitmap_extents:
            self._claim(extent, "the bitmap")
        self._index()
        self._files()
        if not any(finding.severity is Severity.ERROR for finding in self.report.findings):
            self._leaks()  # after an error, what nobody claims may belong to what could not be read

    # -- places that have protection of their own ----------------------------------------------------------------

    def _journal_head(self) -> None:
        io, extent = self.image.volume.io, self.image.volume.places.journal_head
        if not self.report.pending and any(io.read(extent)[:_CLEARED_BYTES]):
            self.report.add(
                Severity.WARNING,
                "torn-journal",
                _blocks(extent),
                "An interrupted commit left the beginning of a journal, which is not valid and harms nothing. The next "
                "commit clears it, and so does a repair.",
                extent,
            )

    def _stale_backup(self) -> None:
        """An announcement's backup copy in the middle of a volume: it would matter only if the static header went."""
        device = self.image.volume.io.device
        place = backup_offset(device.size_bytes)
        if place is None:
            return
        size, block = self.layout.ab_bytes, device.block_size_bytes
        begin = place // block * block
        data = device.read([(begin, block)])[0][place - begin :]
        if data[:8] == CREATION_MAGIC and not self.image.used.any_used(place // size, place // size + 1):
            self.report.add(
                Severity.WARNING,
                "stale-backup",
                f"byte {place}",
                "The backup of an announcement is still there. Were the volume's first block destroyed, the volume "
                "would look as if it were to be created anew. A repair takes it away.",
            )

    def _aux(self) -> None:
        area = self.image.aux
        try:
            if not area.is_settled():
                self.report.add(
                    Severity.WARNING,
                    "aux-torn",
                    "auxiliary metadata",
                    "An interrupted change left one copy of the auxiliary metadata incomplete. Opening the volume for "
                    "writing restores it from the other copy.",
                )
            area.read()
        except FormatError as error:
            self.report.add(
                Severity.ERROR,
                "aux-damaged",
                "auxiliary metadata",
                f"No copy of the auxiliary metadata is whole ({error}). The files are not concerned. Write it anew.",
            )

    def _pieces(self) -> Iterator[tuple[int, Extent]]:
        geometry, unit = self.image.tree.geometry, self.layout.data_ab
        step = max(1, _PIECE_BYTES // (unit * self.layout.ab_bytes))
        for first in range(0, geometry.data_blocks, step):
            yield from geometry.runs(first, min(step, geometry.data_blocks - first))

    def _data_blocks(self) -> None:
        whole = self.image.tree.geometry.data_blocks
        unit = self.layout.data_ab
        for first, (begin, length) in self._pieces():
            count = length // unit
            if not self._is_authentic((begin, length)):
                for number in range(count):
                    at = (begin + number * unit, unit)
                    if not self._is_authentic(at):
                        self._not_authentic(at)
            self.report.data_blocks += count
            self.progress("data blocks", first + count, whole)

    def _is_authentic(self, extent: Extent) -> bool:
        try:
            self.image.read_checked(extent[0], extent[0] + extent[1])
        except IntegrityError:
            return False
        return True

    def _not_authentic(self, extent: Extent) -> None:
        self.report.add(
            Severity.ERROR,
            "not-authentic",
            _blocks(extent),
            "These blocks, or the tree's nodes above them, are not what was written with the key. What they hold is "
            "lost; restore the disk from a copy.",
            extent,
        )

    # -- who claims which block --------------------------------------------------------------------------------

    def _claim(self, extent: Extent, owner: str) -> None:
        begin, length = extent
        states = self.claimed.states(begin, begin + length)
        if 1 in states:
            self.report.add(
                Severity.ERROR,
                "double-allocated",
                owner,
                f"{_blocks(extent)} belong to something else as well. A change of either would destroy the other: "
                "export the files and make a new volume.",
                extent,
            )
        if not self.image.used.all_used(extent):
            self.report.add(
                Severity.ERROR,
                "unallocated",
                owner,
                f"{_blocks(extent)} are in use but marked as free; the next commit may overwrite them. Export the "
                "files and make a new volume.",
                extent,
            )
        self.claimed.set((extent,), 1)

    def _leaks(self) -> None:
        unit = 4096
        leaked: list[Extent] = []
        for number in self.image.used.differing(self.claimed, unit):
            begin, end = number * unit, (number + 1) * unit
            pairs = zip(self.image.used.states(begin, end), self.claimed.states(begin, end), strict=True)
            for at, (used, claimed) in enumerate(pairs, begin):
                if not used or claimed:
                    continue
                if leaked and sum(leaked[-1]) == at:
                    leaked[-1] = (leaked[-1][0], leaked[-1][1] + 1)
                else:
                    leaked.append((at, 1))
        for extent in leaked:
            self.report.add(
                Severity.WARNING,
                "leaked",
                _blocks(extent),
                "These blocks are marked as in use, and nothing uses them. A repair gives them back.",
                extent,
            )

    # -- index and files ---------------------------------------------------------------------------------------

    def _broken_index(self, place: str, what: str) -> None:
        self.report.add(
            Severity.ERROR,
            "index",
            place,
            f"The index of files is wrong here: {what}. Files may be missing or show twice; restore a copy.",
        )

    def _index(self) -> None:
        image = self.image
        leaves: list[tuple[int, Leaf]] = []

        def walk(block: int, level: int, low: int, high: int, *, top: bool) -> None:
            try:
                node = image.load(block, level)
            except (FormatError, IntegrityError) as error:
                self._broken_index(f"block {block}", str(error))
                return
            if self.claimed.any_used(block, block + 1):
                self._broken_index(f"block {block}", "two nodes lead to the same block, or it is something else")
                return
            self._claim((block, image.format.node_ab(node)), "an index node")
            keys = [entry.inode for entry in node.entries] if isinstance(node, Leaf) else node.keys
            if any(not low <= key < high for key in keys):
                self._broken_index(f"block {block}", "a key is outside the range of its node")
            least = image.format.leaf_minimum if isinstance(node, Leaf) else image.format.internal_minimum
            if not top and len(keys) < least:
                self.report.add(
                    Severity.NOTE,
                    "index-fill",
                    f"block {block}",
                    "An index node holds fewer entries than it should. It works; space is wasted.",
                    (block, 1),
                )
            if isinstance(node, Internal):
                bounds = [low, *node.keys, high]
                for slot, child in enumerate(node.children):
                    walk(child, level - 1, bounds[slot], bounds[slot + 1], top=False)
            else:
                leaves.append((block, node))

        walk(*image.root, 0, 1 << 64, top=True)
        following = [place for place, _ in leaves[1:]]
        if [leaf.following for _, leaf in leaves] != [*following, None] or leaves[0][0] != image.entry_leaf:
            self._broken_index("the chain of leaves", "it does not lead through all leaves in order")
        self.entries = [entry for _, leaf in leaves for entry in leaf.entries]

    def _special_list(self, entry: Entry) -> None:
        extent, indirect = pointer_extent(entry, self.image.image_ab)
        if not indirect:
            return
        volume = self.image.volume
        chain = preauth_chain(volume.layout, volume.keys, entry.inode)
        decrypt = volume.keys.decryptor(entry.inode, extents_list=True)
        for place in chain.decode(decrypt, extent, volume.io.read, limit_ab=self.image.image_ab)[1]:
            self._claim(place, "the list of the tree's or the bitmap's extents")

    def _files(self) -> None:
        for number, entry in enumerate(self.entries, 1):
            owner = f"inode {entry.inode:#x}"
            try:
                if entry.inode in (AUTH_TREE_INODE, BITMAP_INODE):
                    self._special_list(entry)
                elif entry.inode >= FIRST_USER_INODE:
                    self._file(entry, owner)
            except (FormatError, IntegrityError) as error:
                self.report.add(
                    Severity.ERROR,
                    "file",
                    owner,
                    f"This file cannot be read: {error}. The others are not concerned; restore it from a copy.",
                )
            self.progress("files", number, len(self.entries))

    def _file(self, entry: Entry, owner: str) -> None:
        extents, lists = self.image.extents_of(entry)
        for extent in (*extents, *lists):
            self._claim(extent, owner)
        if not extents:
            raise FormatError("a file has no extents", code="cocoonfs-format", field="extents list")
        padding = _Padding(self.image.volume.keys.decryptor(entry.inode), self.layout.cipher.block_bytes)
        step = max(self.layout.data_ab, _PIECE_BYTES // self.layout.ab_bytes)
        for begin, length in extents:
            for at in range(begin, begin + length, step):
                padding.feed(self.image.read((at, min(step, begin + length - at))))
        padding.finish()
        self.report.files += 1


def check_image(image: Image, report: CheckReport, progress: Progress = no_progress) -> CheckReport:
    """Check an opened image; findings are added to `report`.

    Raises:
        BackendError: ``block-io``.
    """
    report.opened = True
    report.counter, report.root_digest = image.counter, image.header.root_hmac
    _Check(image, report, progress).run()
    return report


def check(
    device: BlockDevice,
    key: bytes,
    *,
    decide: Decide = always_yes,
    progress: Progress = no_progress,
    allow_weak: bool = True,
) -> CheckReport:
    """Check a volume without writing to it.

    Args:
        device: The disk; it may be read-only.
        key: The volume key.
        decide: About a pending commit: which of the two states is looked at.
        progress: Told how far it is.
        allow_weak: Whether weak algorithms are looked at as well, instead of refused.

    Raises:
        BackendError: ``block-io``: the disk itself failed.
    """
    report = CheckReport()

    def decided(found: FoundJournal) -> Decision:
        report.pending = True
        report.add(
            Severity.NOTE,
            "journal-pending",
            "the journal",
            f"A commit (update counter {found.counter}) is pending. Opening the volume for writing carries it out.",
        )
        return decide(found)

    try:
        volume = Volume.open(device, key, decide=decided, read_only=True, allow_weak=allow_weak)
    except SvsmError as error:
        if error.code == "block-io":
            raise
        hint = f" {error.hint[0].upper()}{error.hint[1:]}." if error.hint else ""
        report.add(Severity.ERROR, "does-not-open", "the volume", f"It does not open ({error.code}): {error}.{hint}")
        return report
    return check_image(volume.image, report, progress)
