# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tables: complete, consistent, and what the documentation shows."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from svsm.confine import filter as seccomp
from svsm.confine.lists import ROLES, Role, allowed, refused
from svsm.confine.render import tables
from svsm.confine.syscalls import NUMBERS

DOCUMENT = Path(__file__).parents[3] / "docs" / "isolation.md"
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def test_the_document_shows_what_is_enforced() -> None:
    assert tables() in DOCUMENT.read_text(encoding="utf-8"), "run: python -m svsm.confine"


@pytest.mark.parametrize("role", list(Role))
def test_every_entry_has_a_number_and_a_reason(role: Role) -> None:
    assert set(allowed(role)) | set(refused(role)) <= set(NUMBERS)
    assert all(len(entry.reason) > 5 for entry in ROLES[role])


@pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers here")
def test_numbers_are_the_kernels() -> None:
    header = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text(encoding="ascii")))
    assert {name: int(header[name]) for name in NUMBERS if name in header} == {
        name: number for name, number in NUMBERS.items() if name in header
    }
    assert len(set(NUMBERS.values())) == len(NUMBERS)


def run(program: bytes, *, number: int, architecture: int = 0xC000_003E, arguments: tuple[int, ...] = ()) -> int:
    """A second reading of classic BPF, so that the program is judged by more than the kernel's acceptance."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *(arguments + (0,) * (6 - len(arguments))))
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    position, accumulator = 0, 0
    while True:
        operation, yes, no, value = code[position]
        position += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return int(value)
        else:
            taken = {0x15: accumulator == value, 0x45: bool(accumulator & value), 0x35: accumulator >= value}[operation]
            position += yes if taken else no


@pytest.mark.parametrize("role", list(Role))
def test_everything_not_named_is_fatal(role: Role) -> None:
    program = seccomp.program(role, pid=4321)
    named = {NUMBERS[name] for name in (*allowed(role), *refused(role))}
    for number in range(600):
        verdict = run(program, number=number)
        assert number in named or verdict == 0x8000_0000
    assert run(program, number=39, architecture=0x4000_0003) == 0x8000_0000
    assert run(program, number=39 | 0x4000_0000) == 0x8000_0000
    assert run(program, number=39) == 0x7FFF_0000


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.SPAWNER])
def test_signals_reach_the_own_process_only(role: Role) -> None:
    program = seccomp.program(role, pid=4321)
    assert run(program, number=NUMBERS["kill"], arguments=(4321, 9)) == 0x7FFF_0000
    for other in (1, 0, 2**64 - 1, 4320):
        assert run(program, number=NUMBERS["kill"], arguments=(other, 9)) != 0x7FFF_0000
    assert run(program, number=NUMBERS["clone"], arguments=(0x3D0F00,)) == 0x7FFF_0000
    assert run(program, number=NUMBERS["clone"], arguments=(17,)) == 0x8000_0000


@pytest.mark.parametrize("role", [role for role in Role if role not in (Role.SPAWNER, Role.VCPU, Role.QEMU)])
@pytest.mark.parametrize("name", ["mmap", "mprotect"])
def test_nothing_becomes_executable(role: Role, name: str) -> None:
    program = seccomp.program(role, pid=1)
    for protection in range(16):
        verdict = run(program, number=NUMBERS[name], arguments=(0, 4096, protection))
        assert (verdict == 0x7FFF_0000) == (protection & 4 == 0)


def test_secrets_have_the_shortest_lists() -> None:
    forbidden = {"open", "openat", "socket", "connect", "bind", "listen", "accept4", "execve", "ptrace", "fork"}
    for role in (Role.KERNEL, Role.SERVICE, Role.HARDWARE, Role.VCPU):
        assert not forbidden & set(allowed(role))
