# SPDX-License-Identifier: MIT OR Apache-2.0
"""Landlock: which files, TCP ports and processes a role can still reach by name.

Everything that the running kernel can restrict is restricted; a role gets back the paths that its rules name. What
Landlock does not cover is a descriptor that somebody hands over: it keeps the rights it was opened with.

The kernel's ABI decides how much there is: 1 files, 2 moving files between folders, 3 truncation, 4 TCP, 5 device
ioctls, 6 abstract sockets and signals. ABI 2 (Debian 12's own kernel) is what svsm counts as complete, since the
system call lists refuse the rest to the roles that hold secrets; less is *reduced isolation* and is reported.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import struct
from collections.abc import Sequence

from svsm.confine import libc
from svsm.confine.syscalls import NUMBERS
from svsm.formats.errors import BackendError

__all__ = ["COMPLETE_ABI", "PathRule", "Ruleset", "abi", "prepare"]

COMPLETE_ABI = 2

_CREATE, _ADD, _RESTRICT = (
    NUMBERS["landlock_create_ruleset"],
    NUMBERS["landlock_add_rule"],
    NUMBERS["landlock_restrict_self"],
)
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_READ = _READ_FILE | _READ_DIR
_WRITE = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER | _TRUNCATE


@dataclasses.dataclass(frozen=True, slots=True)
class PathRule:
    """A file, or a folder with everything beneath, that a role may use. Missing paths are skipped."""

    path: str
    write: bool = False
    execute: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ruleset:
    """A prepared ruleset, not yet in force. `abi` is what it uses; 0 when the kernel has no Landlock."""

    descriptor: int
    abi: int

    def enforce(self) -> None:
        """Put it into force for this thread and everything it starts; it can't be undone.

        Raises:
            BackendError: ``confine-landlock``.
        """
        if self.descriptor < 0:
            return
        answer = libc.syscall(_RESTRICT, self.descriptor, 0)
        os.close(self.descriptor)
        if answer != 0:
            raise BackendError("the kernel did not take the Landlock rules", code="confine-landlock", answer=answer)


def abi() -> int:
    """The Landlock ABI of the running kernel; 0 where there is none or it is switched off."""
    return max(0, libc.syscall(_CREATE, 0, 0, 1))


def _attributes(version: int, *, tcp: bool) -> bytes:
    files = (1 << 13) - 1
    files |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0) | (_IOCTL_DEV if version >= 5 else 0)
    packed = struct.pack("<Q", files)
    if version >= 4:
        packed += struct.pack("<Q", 0 if tcp else 3)
    if version >= 6:
        packed += struct.pack("<Q", 3)
    return packed


def prepare(rules: Sequence[PathRule] = (), *, tcp: bool = False, cap: int | None = None) -> Ruleset:
    """Make a ruleset that denies everything but `rules`. Call it while the paths can still be reached.

    Args:
        rules: What the role may use.
        tcp: Leave TCP alone (proxy, broker, host); otherwise bind and connect are denied, from ABI 4.
        cap: Use no more than this ABI: tests play an older kernel with it.

    Raises:
        BackendError: ``confine-landlock``.
    """
    version = abi() if cap is None else min(cap, abi())
    if version == 0:
        return Ruleset(-1, 0)
    packed = _attributes(version, tcp=tcp)
    with libc.buffer(packed) as address:
        descriptor = libc.syscall(_CREATE, address, len(packed), 0)
    if descriptor < 0:
        raise BackendError("the kernel did not make a Landlock ruleset", code="confine-landlock", answer=descriptor)
    (handled,) = struct.unpack_from("<Q", packed)
    for rule in rules:
        _add(descriptor, rule, handled)
    return Ruleset(descriptor, version)


def _add(ruleset: int, rule: PathRule, handled: int) -> None:
    rights = _READ | (_WRITE if rule.write else 0) | (_EXECUTE if rule.execute else 0)
    if rule.write:
        rights |= _IOCTL_DEV
    try:
        path = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise BackendError("a path of the rules can't be opened", code="confine-landlock", path=rule.path) from error
    try:
        if not stat.S_ISDIR(os.fstat(path).st_mode):
            rights &= _FILE_RIGHTS
        with libc.buffer(struct.pack("<Qi", rights & handled, path)) as address:
            answer = libc.syscall(_ADD, ruleset, _RULE_PATH_BENEATH, address, 0)
    finally:
        os.close(path)
    if answer != 0:
        raise BackendError("the kernel did not take a Landlock rule", code="confine-landlock", path=rule.path)
