# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which uid a role runs as where root starts the system.

A fixed high range, far above accounts and container mappings: 0x5356_0000 ("SV") + role × 0x100 + instance. The
numbers need no account; what a role owns on disk it owns by number. Where the range is not mapped (a user namespace)
there is no own uid, and the report says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from svsm.confine.lists import Role
from svsm.formats.errors import StateError

__all__ = ["role_uid"]

_BASE = 0x5356_0000
_NUMBERS = {role: number for number, role in enumerate(Role, start=1)}


def role_uid(role: Role | str, instance: int = 0) -> int | None:
    """The uid for a role, or None where this process can't give one (not root, or the range is not mapped).

    Args:
        role: The role.
        instance: Which of its processes: 0 to 255; the number of the TPM for its service.

    Raises:
        StateError: ``confine-instance``.
    """
    if not 0 <= instance <= 0xFF:
        raise StateError("there are at most 256 processes of one role", code="confine-instance", instance=instance)
    uid = _BASE + 0x100 * _NUMBERS[Role(role)] + instance
    if os.geteuid() != 0 or not (_mapped("/proc/self/uid_map", uid) and _mapped("/proc/self/gid_map", uid)):
        return None
    return uid


def _mapped(path: str, number: int) -> bool:
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    ranges = [[int(word) for word in line.split()] for line in lines]
    return any(inside <= number < inside + length for inside, _, length in ranges)
