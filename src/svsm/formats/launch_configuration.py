# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch configuration: which volume this VM is for, its name, and which TPMs it has with which front.

Canonical JSON, placed by the host in an unmeasured parameter area as ``length (4 bytes LE) ‖ JSON ‖ zeros``. It is
believed only because HOST_DATA, which the chip puts into every report, is its SHA-256: the broker picks the volume
by HOST_DATA, and the kernel compares its own report's HOST_DATA before it reads a member.
"""

from __future__ import annotations

import dataclasses
import enum
import re

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.strict_json import canonical, parse_object

__all__ = [
    "MAX_AREA_BYTES",
    "MAX_TPMS",
    "LaunchConfiguration",
    "TpmConfiguration",
    "TpmFront",
    "pack_area",
    "parse_area",
]

MAX_AREA_BYTES = 4 * 4096
MAX_TPMS = 16
_VERSION = 1
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TpmFront(enum.StrEnum):
    """Who speaks to a TPM."""

    SOCKET = "socket"
    """Clients that the host hands over (tpm2-tools, QEMU)."""
    SVSM = "svsm"
    """The guest at VMPL2, by the SVSM vTPM protocol."""


@dataclasses.dataclass(frozen=True, slots=True)
class TpmConfiguration:
    """One TPM of the VM."""

    name: str
    front: TpmFront


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchConfiguration:
    """What the host says about this launch; see the module for when to believe it."""

    volume_id: str
    """UUID, lower case with dashes."""
    name: str
    """Of the VM, for logs: letters, digits, dot, dash, underscore; at most 64."""
    tpms: tuple[TpmConfiguration, ...]
    """At most 16; names differ; at most one has the SVSM front."""

    def __post_init__(self) -> None:
        """Refuse what `parse` would refuse, so that every instance has a canonical form."""
        names = [tpm.name for tpm in self.tpms]
        fronts = [tpm.front for tpm in self.tpms]
        valid = (
            _UUID.fullmatch(self.volume_id)
            and all(_NAME.fullmatch(name) for name in [self.name, *names])
            and len(set(names)) == len(names) <= MAX_TPMS
            and fronts.count(TpmFront.SVSM) <= 1
        )
        if not valid:
            raise FormatError("the launch configuration does not make sense", code="launch-configuration-invalid")

    def to_json(self) -> bytes:
        """The canonical bytes."""
        return canonical(
            {
                "version": _VERSION,
                "volume_id": self.volume_id,
                "name": self.name,
                "tpms": [{"name": tpm.name, "front": tpm.front.value} for tpm in self.tpms],
            }
        )

    def host_data(self) -> bytes:
        """SHA-256 of the canonical bytes, 32 bytes: the launch's HOST_DATA."""
        # Imported here, so that the kernel, which hashes through the measured libcrypto, does not load hashlib.
        import hashlib

        return hashlib.sha256(self.to_json()).digest()

    @classmethod
    def parse(cls, data: Buffer) -> LaunchConfiguration:
        """Read the JSON; only the canonical spelling is accepted.

        Raises:
            FormatError: ``json-*``, ``launch-configuration-version`` or ``launch-configuration-invalid``.
        """
        members = parse_object(data, what="launch configuration", max_bytes=MAX_AREA_BYTES)
        if members.number("version", maximum=1 << 32) != _VERSION:
            raise FormatError("the launch configuration has another version", code="launch-configuration-version")
        members.only("version", "volume_id", "name", "tpms")
        tpms = []
        for tpm in members.objects("tpms", max_items=MAX_TPMS):
            tpm.only("name", "front")
            front = tpm.text("front", max_length=16)
            if front not in {known.value for known in TpmFront}:
                raise FormatError("a TPM has an unknown front", code="launch-configuration-invalid", got=front)
            tpms.append(TpmConfiguration(name=tpm.text("name", max_length=64), front=TpmFront(front)))
        found = cls(
            volume_id=members.text("volume_id", max_length=36),
            name=members.text("name", max_length=64),
            tpms=tuple(tpms),
        )
        if found.to_json() != bytes(data):
            raise FormatError("the launch configuration is not canonical", code="launch-configuration-invalid")
        return found


def pack_area(json_bytes: bytes, *, area_bytes: int = MAX_AREA_BYTES) -> bytes:
    """The parameter area that holds `json_bytes`.

    Raises:
        FormatError: ``launch-configuration-area`` when it does not fit.
    """
    if len(json_bytes) > min(area_bytes, MAX_AREA_BYTES) - 4:
        raise FormatError("the launch configuration does not fit its area", code="launch-configuration-area")
    return (len(json_bytes).to_bytes(4, "little") + json_bytes).ljust(area_bytes, b"\0")


def parse_area(area: Buffer) -> bytes:
    """The JSON bytes in a parameter area, unauthenticated: compare their SHA-256 before parsing them.

    Raises:
        FormatError: ``launch-configuration-area``.
    """
    if not 4 <= len(area) <= MAX_AREA_BYTES:
        raise FormatError("the launch configuration's area has the wrong size", code="launch-configuration-area")
    cursor = Cursor(area, what="launch configuration area")
    length = cursor.unsigned(4, "little")
    if length > cursor.remaining:
        raise FormatError("the launch configuration is longer than its area", code="launch-configuration-area")
    found = cursor.take(length)
    if any(cursor.rest()):
        raise FormatError("bytes follow the launch configuration", code="launch-configuration-area")
    return found
