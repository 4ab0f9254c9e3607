# SPDX-License-Identifier: MIT OR Apache-2.0
"""A commit that was found at open: carrying it out, showing it without writing, or showing the state before it.

The state before is whole as long as nobody began to carry the commit out. An earlier attempt that a power cut ended
leaves neither state, only the journal that leads to the new one; then the old state must not be shown, and the journal
must not be taken away. That is found out by reading everything that the commit touches.
"""

from __future__ import annotations

from svsm.formats.errors import FormatError, IntegrityError
from svsm.storage.cocoonfs.decision import FoundJournal, half_applied
from svsm.storage.cocoonfs.encoding import Extent
from svsm.storage.cocoonfs.image import Image, VolumeContext, open_image
from svsm.storage.cocoonfs.replay import ReplayPlan

__all__ = ["carry_out", "look_ahead", "old_state"]


def _state(image: Image) -> FoundJournal:
    return FoundJournal(image.counter, image.header.root_hmac)


def _opened(volume: VolumeContext, plan: ReplayPlan) -> Image:
    """The image after the commit; it must be in the state that was decided on."""
    image = open_image(volume)
    if _state(image) != plan.found:
        raise IntegrityError(
            "the volume is not in the state that its pending commit was to lead to",
            code="cocoonfs-decided-other",
            hint="the disk changed while it was opened; restore it from a copy",
        )
    return image


def _unused(image: Image, extents: list[Extent]) -> list[Extent]:
    """What of these is wholly free: a log's author may have taken freed blocks again."""
    unit = image.volume.layout.io_ab
    return [
        (begin, unit)
        for first, length in extents
        for begin in range(first, min(first + length, image.image_ab), unit)
        if not image.used.any_used(begin, begin + unit)
    ]


def carry_out(volume: VolumeContext, plan: ReplayPlan) -> Image:
    """Write what the journal says, take it away, and open the new state.

    Raises:
        IntegrityError: ``cocoonfs-decided-other``, ``cocoonfs-authentication``.
        FormatError: ``cocoonfs-format``.
        BackendError: ``block-io``.
    """
    io = volume.io
    io.write(plan.writes)
    io.flush()  # the new state, before the journal that leads to it goes
    image = _opened(volume, plan)
    io.zero_first(volume.places.journal_head[0])
    io.flush()  # the end of the journal, before its space is used again
    io.discard(_unused(image, plan.discards))
    return image


def look_ahead(volume: VolumeContext, plan: ReplayPlan) -> Image:
    """Open the new state without writing: what the journal says is laid over the disk in memory.

    Raises:
        IntegrityError: ``cocoonfs-decided-other``, ``cocoonfs-authentication``.
        FormatError: ``cocoonfs-format``.
        BackendError: ``block-io``.
    """
    volume.io.lay_over(plan.writes)
    return _opened(volume, plan)


def old_state(volume: VolumeContext, plan: ReplayPlan) -> Image:
    """Open the state before the commit, if nothing of it was carried out.

    Raises:
        StateError: ``cocoonfs-half-applied``.
        BackendError: ``block-io``.
    """
    try:
        image = open_image(volume)
        for begin, length in plan.touched:
            image.read_checked(begin, begin + length)
    except (FormatError, IntegrityError) as error:
        raise half_applied() from error
    if _state(image) == plan.found:
        raise half_applied()  # wholly, even: only the journal is still there
    return image
