# SPDX-License-Identifier: MIT OR Apache-2.0
"""The chip's end of the vCPU channel against a vCPU process that was taken over, and what of its registers counts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from svsm.formats.errors import BackendError
from svsm.formats.snp.vcpu_messages import (
    Access,
    ExitMessage,
    Kind,
    Memory,
    Registers,
    RunMessage,
    ack,
    parse_message,
)
from svsm.formats.snp.vmsa import VMSA_FIELDS, Vmsa, VmsaView
from svsm.hardware import vcpu_port
from svsm.hardware.vcpu_port import EFER_SVME, GuestStop, VcpuPort, load_registers, store_exit

VMSA_GPA = 0x0700_0000
NAMES = [name for name in Registers.__dataclass_fields__ if name != "ghcb_msr"]


def registers(**changes: int) -> Registers:
    return Registers(**{**dict.fromkeys(Registers.__dataclass_fields__, 0), **changes})


def exit_message(sequence: int) -> bytes:
    return ExitMessage(Kind.EXIT, 0, sequence, 0x403, 1, 2, registers(rax=7)).pack()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VcpuPort, socket.socket]]:
    monkeypatch.setattr(vcpu_port, "ACK_SECONDS", 0.1)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    port = VcpuPort(ours)
    yield port, theirs
    port.close()
    theirs.close()


def refused(port: VcpuPort) -> None:
    with pytest.raises(BackendError) as error:
        port.unmap(0x4000_0000, 4096)
    assert error.value.code == "machine-vcpu"


def test_a_page_is_gone_only_when_it_was_acknowledged(ends: tuple[VcpuPort, socket.socket]) -> None:
    port, vcpu = ends
    refused(port)
    assert parse_message(vcpu.recv(512)).kind == Kind.UNMAP


@pytest.mark.parametrize("answer", [ack(99), ack(0), b"x", b"\xff" * 200, exit_message(1)])
def test_any_other_answer_is_a_broken_processor(ends: tuple[VcpuPort, socket.socket], answer: bytes) -> None:
    port, vcpu = ends
    vcpu.send(answer)
    refused(port)


def test_a_vcpu_that_died(ends: tuple[VcpuPort, socket.socket]) -> None:
    port, vcpu = ends
    vcpu.close()
    refused(port)
    with pytest.raises(BackendError):
        port.receive()


def test_an_exit_may_overtake_an_acknowledgement(ends: tuple[VcpuPort, socket.socket]) -> None:
    port, vcpu = ends
    port.run(VMSA_GPA, registers(), 1)
    run = parse_message(vcpu.recv(512))
    assert isinstance(run, RunMessage)
    assert port.running == VMSA_GPA
    vcpu.send(exit_message(run.sequence))
    vcpu.send(ack(run.sequence + 1))
    port.map(0x4000_0000, 4096, Memory.VMPL2, Access.READ)
    stopped = port.take_stop()
    assert stopped is not None
    assert (stopped.vmsa_gpa, stopped.exit_code, stopped.registers.rax) == (VMSA_GPA, 0x403, 7)
    assert [port.running, port.take_stop()] == [None, None]


def test_an_exit_comes_once(ends: tuple[VcpuPort, socket.socket]) -> None:
    port, vcpu = ends
    port.run(VMSA_GPA, registers(), 1)
    sequence = parse_message(vcpu.recv(512)).sequence
    vcpu.send(exit_message(sequence))
    vcpu.send(exit_message(sequence))
    port.receive()
    with pytest.raises(BackendError):
        port.receive()


def test_an_acknowledgement_of_nothing(ends: tuple[VcpuPort, socket.socket]) -> None:
    port, vcpu = ends
    vcpu.send(ack(1))
    with pytest.raises(BackendError):
        port.receive()


def test_registers_there_and_back() -> None:
    page = Vmsa(vmpl=2, efer=EFER_SVME | 0xD00, rip=5, r15=15, sev_features=1).pack()
    loaded = load_registers(page, ghcb_msr=0x17)
    assert (loaded.rip, loaded.r15, loaded.efer, loaded.ghcb_msr) == (5, 15, EFER_SVME | 0xD00, 0x17)
    stopped = GuestStop(VMSA_GPA, 0x403, 1, 2, loaded)
    view = VmsaView(bytearray(store_exit(page, stopped)))
    assert [view.get(f"guest_exit_{name}") for name in ("code", "info_1", "info_2")] == [0x403, 1, 2]
    assert view.get("rip") == 5


def test_a_vcpu_process_can_change_general_registers_and_nothing_else() -> None:
    """Every byte of the page that is not a general register or an exit field stays, whatever comes back."""
    page = os.urandom(4096)
    everything = Registers(**dict.fromkeys(Registers.__dataclass_fields__, (1 << 64) - 1))
    changed = store_exit(page, GuestStop(VMSA_GPA, (1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1, everything))
    names = [{"fs_base": "fs.base", "gs_base": "gs.base"}.get(name, name) for name in NAMES]
    allowed = set()
    for name in [*names, "guest_exit_code", "guest_exit_info_1", "guest_exit_info_2"]:
        offset, width = VMSA_FIELDS[name]
        allowed |= set(range(offset, offset + width))
    assert len(allowed) == 8 * (24 + 3)
    assert all(changed[i] == page[i] for i in range(4096) if i not in allowed)
    assert all(changed[i] == 0xFF for i in allowed)


def test_a_vcpu_process_cannot_make_its_vmsa_unrunnable() -> None:
    page = Vmsa(vmpl=2, efer=EFER_SVME).pack()
    changed = store_exit(page, GuestStop(VMSA_GPA, 0x403, 0, 0, registers(efer=0)))
    assert VmsaView(bytearray(changed)).get("efer") == EFER_SVME
