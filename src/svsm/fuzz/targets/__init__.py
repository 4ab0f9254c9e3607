# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every target. A new one is a row in the `ROWS` of one of these modules, nothing more."""

from __future__ import annotations

from svsm.formats.errors import StateError
from svsm.fuzz.disks import rows as disks
from svsm.fuzz.target import Target
from svsm.fuzz.targets import attestation, channels, evidence, guest, host, images, messages, storage

__all__ = ["TARGETS", "find"]

TARGETS: tuple[Target, ...] = (
    *images.ROWS,
    *evidence.ROWS,
    *messages.ROWS,
    *attestation.ROWS,
    *channels.ROWS,
    *storage.ROWS,
    *guest.ROWS,
    *host.ROWS,
    *disks.ROWS,
)


def find(name: str) -> Target:
    """The target of this name.

    Raises:
        StateError: ``fuzz-target``.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    raise StateError("there is no such fuzz target", code="fuzz-target", hint="svsm fuzz --list shows them", got=name)
