# SPDX-License-Identifier: MIT OR Apache-2.0
"""From an allow list to a seccomp program, and into force.

The program is classic BPF: first the architecture (anything but x86-64, so also i386 through int 0x80, dies), then
the x32 bit (dies), then one comparison per system call. The kernel turns entries without a condition into a bitmap,
so their number costs nothing at run time. The filter is installed for all threads at once.
"""

from __future__ import annotations

import os
import platform
import struct

from svsm.confine import libc
from svsm.confine.lists import KILL, Allow, Condition, Role, Test, allowed, refused
from svsm.confine.syscalls import NUMBERS
from svsm.formats.errors import BackendError

__all__ = ["install", "program"]

_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_GREATER, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_ARCH_X86_64 = 0xC000_003E
_X32_BIT = 0x4000_0000
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGUMENTS = 0, 4, 16
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1

Instruction = tuple[int, int, int, int]


def _verdict(action: int) -> Instruction:
    return (_RETURN, 0, 0, _RET_KILL_PROCESS if action == KILL else _RET_ERRNO | action)


def _condition(condition: Condition, pid: int) -> list[Instruction]:
    """Instructions that end in ALLOW when the condition holds and fall through behind the block when it doesn't."""
    load: Instruction = (_LOAD, 0, 0, _OFFSET_ARGUMENTS + 8 * condition.argument)
    if condition.test is Test.CLEAR:
        (mask,) = condition.values
        return [load, (_JUMP_SET, 1, 0, mask), (_RETURN, 0, 0, _RET_ALLOW)]
    if condition.test is Test.SET:
        (mask,) = condition.values
        return [load, (_JUMP_SET, 0, 1, mask), (_RETURN, 0, 0, _RET_ALLOW)]
    values = (pid, *condition.values) if condition.test is Test.OWN_PROCESS else condition.values
    tests: list[Instruction] = []
    for value in values:
        tests += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _RET_ALLOW)]
    return [load, *tests]


def _block(number: int, entries: tuple[Allow, ...], pid: int) -> list[Instruction]:
    if any(entry.condition is None for entry in entries):
        return [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _RET_ALLOW)]
    body: list[Instruction] = []
    otherwise = KILL
    for entry in entries:
        if entry.condition is not None:
            body += _condition(entry.condition, pid)
            otherwise = entry.condition.otherwise
    body.append(_verdict(otherwise))
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


def program(role: Role, *, pid: int) -> bytes:
    """The filter of `role` as an array of struct sock_filter (8 bytes each).

    Args:
        role: Whose allow list.
        pid: The only process that it may signal: its own.
    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _OFFSET_ARCH),
        (_JUMP_EQUAL, 1, 0, _ARCH_X86_64),
        _verdict(KILL),
        (_LOAD, 0, 0, _OFFSET_NR),
        (_JUMP_GREATER, 0, 1, _X32_BIT),
        _verdict(KILL),
    ]
    for call, entries in sorted(allowed(role).items(), key=lambda item: NUMBERS[item[0]]):
        code += _block(NUMBERS[call], entries, pid)
    for call, refusal in sorted(refused(role).items()):
        code += [(_JUMP_EQUAL, 0, 1, NUMBERS[call]), _verdict(refusal.errno)]
    code.append(_verdict(KILL))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def install(role: Role) -> None:
    """Put the allow list of `role` into force for every thread of this process; it can't be undone.

    NO_NEW_PRIVS must be set (see process.harden).

    Raises:
        BackendError: ``confine-architecture`` (not x86-64), ``confine-seccomp`` (the kernel refused the filter).
    """
    if platform.machine() != "x86_64":
        raise BackendError(
            "the system call lists are written for x86-64", code="confine-architecture", got=platform.machine()
        )
    text = program(role, pid=os.getpid())
    with libc.buffer(text) as address, libc.buffer(struct.pack("<HxxxxxxQ", len(text) // 8, address)) as argument:
        answer = libc.syscall(NUMBERS["seccomp"], _SET_MODE_FILTER, _FLAG_TSYNC, argument)
    if answer != 0:
        raise BackendError(
            "the kernel did not take the seccomp filter",
            code="confine-seccomp",
            hint="the running Linux kernel needs CONFIG_SECCOMP_FILTER",
            answer=answer,
        )
