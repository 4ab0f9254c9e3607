# SPDX-License-Identifier: MIT OR Apache-2.0
"""Anything on any channel of the machine: an answer or an orderly end, never an exception, never a wrong page.

Each example is a short life of a machine whose host (or kernel) sends arbitrary commands.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from svsm.formats.errors import BackendError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import HostCommand, Instruction, Message
from svsm.formats.snp.page_info import PageType
from svsm.hardware.machine import EndReason, KernelStart, Machine, Spawned
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.messages import Port
from svsm.hardware.rmp import PAGE, Home
from svsm.testing.machine_harness import running_machine, throwaway_chip

_CHIP = throwaway_chip()
_WORDS = st.one_of(
    st.sampled_from(
        [0, 1, 2, PAGE, 2 << 20, 0x1000, 0x1_0000, 0x3000_0000, 0x3000_1000, 0x4000_0000, 0x4020_0000, 0xFFFF_FFFF_F000]
    ),
    st.integers(0, (1 << 64) - 1),
)
_ARGUMENTS = st.lists(_WORDS, max_size=6).map(tuple)
_HOST = st.tuples(
    st.one_of(st.sampled_from([kind for kind in HostCommand if kind is not HostCommand.STOP]), st.integers(0, 0xFFFF)),
    _ARGUMENTS,
    st.one_of(st.just(b""), st.just(bytes(32)), st.just(bytes(32 + 96 + 4096)), st.binary(max_size=64)),
)
_LAUNCH = st.sampled_from(
    [
        (HostCommand.LAUNCH_START, (0x3_0000,), b""),
        (HostCommand.LAUNCH_UPDATE, (PageType.NORMAL, 0x1_0000, 2, 0), b""),
        (HostCommand.LAUNCH_UPDATE, (PageType.VMSA, 0xFFFF_FFFF_F000, 1, 0), b""),
        (HostCommand.LAUNCH_FINISH, (0, 0), bytes(32)),
    ]
)


class _NoSpawner:
    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        raise BackendError("nothing is started here", code="spawn-failed")

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        raise BackendError("nothing is started here", code="spawn-failed")


@given(st.lists(st.one_of(_HOST, _LAUNCH), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_host_that_sends_anything(commands: list[tuple[int, tuple[int, ...], bytes]]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    memory = PhysicalMemory()
    machine = Machine(host=Port(theirs, name="the host"), chip=_CHIP, spawner=_NoSpawner(), memory=memory)
    ends: list[EndReason] = []
    thread = threading.Thread(target=lambda: ends.append(machine.serve()))
    thread.start()
    with ours, contextlib.suppress(OSError):
        for number, (kind, arguments, payload) in enumerate(commands):
            ours.send(Message(kind, arguments, payload, number).pack())
            if not ours.recv(1 << 17):
                break
    thread.join(10)
    assert len(ends) == 1
    for gpa, length, entry in machine.rmp.extents():
        for home in (Home.PRIVATE, Home.VMPL2):
            assert entry.home is home or not memory.populated(home, gpa, length)
    memory.close()


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Instruction.PVALIDATE, Instruction.RMPADJUST, Instruction.SPAWN]),
            _ARGUMENTS,
            st.one_of(st.just(b"{}"), st.just(b'{"service":1,"parameters":{}}'), st.just(b"[" * 3000), st.binary()),
        ),
        max_size=12,
    )
)
@settings(max_examples=30, deadline=None)
def test_a_kernel_that_executes_anything(instructions: list[tuple[Instruction, tuple[int, ...], bytes]]) -> None:
    with running_machine() as machine:
        port = machine.platform._instructions
        for kind, arguments, payload in instructions:
            answer, descriptors = port._ask(Message(kind, arguments, payload))
            for descriptor in descriptors:
                os.close(descriptor)
            assert answer.status in (0, 1, 2, 3, 6, 0x400)
    assert machine.end is not None
    assert not machine.end.violation


@given(st.lists(st.tuples(st.one_of(st.sampled_from(ghcb.ExitCode), _WORDS), _ARGUMENTS), max_size=10))
@settings(max_examples=30, deadline=None)
def test_a_kernel_that_exits_with_anything(exits: list[tuple[int, tuple[int, ...]]]) -> None:
    with running_machine() as machine:
        for code, arguments in exits:
            with contextlib.suppress(BackendError):
                machine.platform._host.exit(code, *arguments[:4], deadline=0)
        if ghcb.ExitCode.TERMINATION not in [code for code, _ in exits]:
            assert machine.host_command(HostCommand.CPUID).status == 0
    assert machine.end is not None
