# SPDX-License-Identifier: MIT OR Apache-2.0
"""Mending what can be mended without deciding anything: what is derivable, or outside authentication.

That is: carrying out (or, as the decision says, taking back) a pending commit; clearing a torn journal head; restoring
the second copy of auxiliary metadata; taking away what an interrupted creation left in the backup place; giving back
blocks that nothing uses, in a commit of its own. Where the check finds an *error*, nothing at all is written: what does
not authenticate cannot be made authentic, and guessing which of two claims on a block is right is not repair.
"""

from __future__ import annotations

from dataclasses import dataclass

from svsm.abi.block import BlockDevice
from svsm.formats.errors import StateError
from svsm.storage.cocoonfs.check import CheckReport, Finding, Progress, Severity, check, no_progress
from svsm.storage.cocoonfs.decision import Decide, Decision, always_yes
from svsm.storage.cocoonfs.provisioning import drop_stale_backup
from svsm.storage.cocoonfs.volume import Volume

__all__ = ["RepairReport", "repair"]


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did.

    Attributes:
        before: The check before it.
        done: One sentence for each thing that was mended, in order.
        after: The check after it; None where nothing was written.
    """

    before: CheckReport
    done: tuple[str, ...]
    after: CheckReport | None

    @property
    def is_good(self) -> bool:
        """Whether the volume is good now."""
        return (self.after or self.before).is_good

    def to_json(self) -> dict[str, object]:
        """For `--json`; keys are stable."""
        after = None if self.after is None else self.after.to_json()
        return {"good": self.is_good, "before": self.before.to_json(), "done": list(self.done), "after": after}


def _found(report: CheckReport, kind: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.kind == kind]


def _clear_torn_head(volume: Volume) -> None:
    context = volume.image.volume
    context.io.zero_first(context.places.journal_head[0])
    context.io.flush()


def _give_back(device: BlockDevice, key: bytes, volume: Volume, report: CheckReport, progress: Progress) -> int:
    """Free leaked blocks, as many commits as the report's bounded list of them needs; how many blocks."""
    released = 0
    while leaked := _found(report, "leaked"):
        extents = [finding.extent for finding in leaked if finding.extent is not None]
        prepared = volume.prepare({}, release=extents)
        if prepared.decide(volume.decide) is not Decision.YES:
            raise StateError(
                "giving back unused blocks was not decided with yes",
                code="cocoonfs-undecided",
                hint="the volume is as it was, or its commit waits for a decision",
            )
        released += sum(length for _, length in extents)
        if not report.more["leaked"]:
            break
        report = check(device, key, progress=progress)
    return released


def repair(
    device: BlockDevice, key: bytes, *, decide: Decide = always_yes, progress: Progress = no_progress
) -> RepairReport:
    """Check a volume, mend what can be mended, and check it again.

    Args:
        device: The disk, writable.
        key: The volume key.
        decide: About a pending commit, and about the commit that frees blocks.
        progress: Told how far the checks are.

    Raises:
        BackendError: ``block-io``.
        StateError: ``cocoonfs-undecided``, ``cocoonfs-full`` (no room for the journal of a commit).
        IntegrityError: ``cocoonfs-authentication``: the disk changed meanwhile.
    """
    before = check(device, key, decide=decide, progress=progress)
    if before.worst is Severity.ERROR or not before.opened:
        return RepairReport(before, (), None)
    if not before.pending and before.is_good:
        return RepairReport(before, (), None)
    done: list[str] = []
    volume = Volume.open(device, key, decide=decide, allow_weak=True)
    if before.pending:
        if volume.pending is not None:
            raise StateError(
                "a commit is pending, and nobody decides it",
                code="cocoonfs-undecided",
                hint="repair when the ledger can be reached",
            )
        done.append("The pending commit was ended as decided; the volume shows one of its two states wholly.")
    if _found(before, "aux-torn"):
        done.append("The auxiliary metadata's second copy was restored.")
    if _found(before, "torn-journal"):
        _clear_torn_head(volume)
        done.append("The torn beginning of a journal was cleared.")
    if _found(before, "stale-backup"):
        drop_stale_backup(device, volume.image.volume.io)
        done.append("What an earlier announcement left in the backup place was taken away.")
    released = _give_back(device, key, volume, before, progress)
    if released:
        done.append(f"{released} unused blocks were given back.")
    return RepairReport(before, tuple(done), check(device, key, progress=progress))
