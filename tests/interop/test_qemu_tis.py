# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our TPM behind QEMU's tpm-tis, register by register: it answers as it does on its socket, whatever a guest does."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats import tpm
from svsm.formats.errors import BackendError, StateError
from svsm.host.qemu import TPM_INTERRUPT, Machine, MachineKind, MachineOptions
from svsm.testing.tpm_tis import PAGE_BYTES, Access, Register, Status, Tis
from tests.e2e.tpm_support import TpmClient, pcr_extend, pcr_read
from tests.interop.test_vtpm_tools import Server, Tools, our_server
from tests.support import await_listener, peer

pytestmark = pytest.mark.interop

_RC_LOCALITY = 0x907
_RC_FATAL = bytes.fromhex("00c40000000a00000009")
"""What QEMU itself says, as a TPM 1.2 would, when its TPM has gone."""
_PCR_OF_LOCALITY_2 = 20
_INT_GLOBAL, _INT_DATA_AVAIL, _INT_ALL = 1 << 31, 1 << 0, 0x87


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    peer("qemu-system-x86_64")
    made = our_server(tmp_path_factory.mktemp("tis"))
    yield made
    made.stop()


@contextlib.contextmanager
def guest(server: Server, kind: MachineKind = MachineKind.MICROVM) -> Iterator[Machine]:
    """A machine with the TPM; its start is a power cycle of the TPM."""
    control = server.where.with_name(server.where.name + ".ctrl")
    made = Machine(MachineOptions(kind, tpm=control, program=peer("qemu-system-x86_64")))
    try:
        yield made
    finally:
        made.close()


def owned(machine: Machine, locality: int = 0) -> Tis:
    """A locality that has the TPM, which is started."""
    made = Tis(machine.tpm_registers(), locality=locality)
    made.request()
    assert tpm.response_code(made.ask(tpm.startup())) == tpm.RC_SUCCESS
    return made


def alive(tis: Tis) -> None:
    """It answers in order."""
    assert len(tis.ask(tpm.get_random(24))) == 10 + 2 + 24


@pytest.mark.parametrize("kind", MachineKind)
def test_what_the_guest_sees_is_what_the_socket_sees(server: Server, kind: MachineKind) -> None:
    with guest(server, kind) as machine, TpmClient(server.where) as beside:
        tis = Tis(machine.tpm_registers())
        assert tis.access() == Access.VALID | Access.ESTABLISHMENT
        assert tis.read(Register.DID_VID) == 0x0001_1014
        assert tis.read(Register.INTERFACE_ID) & 0xF == 0, "the FIFO interface"
        tis.request()
        assert tis.status()[0] & Status.FAMILY_TPM2
        assert tpm.response_code(tis.ask(tpm.get_random(8))) == tpm.RC_INITIALIZE, "a new guest's TPM is not started"
        assert tpm.response_code(tis.ask(tpm.startup())) == tpm.RC_SUCCESS
        first, second = tis.ask(tpm.get_random(32)), tis.ask(tpm.get_random(32))
        assert len(first) == len(second) == 44
        assert first != second

        handle, public = tpm.parse_create_primary(tis.ask(tpm.create_ek()))
        assert tpm.ek_name(public).hex() == server.ready["ek_name"]
        read_public = tpm.CommandHeader(0x8001, 14, 0x173).pack() + handle.to_bytes(4, "big")
        assert public in (answer := tis.ask(read_public))
        assert beside.run(read_public) == answer
        assert tpm.response_code(tis.ask(tpm.flush_context(handle))) == tpm.RC_SUCCESS

        assert tpm.response_code(tis.ask(pcr_extend(16, b"\x5a" * 32))) == tpm.RC_SUCCESS
        seen = tis.ask(pcr_read(16))
        assert seen[-32:] != bytes(32)
        assert beside.run(pcr_read(16)) == seen
        tis.release()
        assert not tis.access() & Access.ACTIVE_LOCALITY


def test_tpm2_tools_read_what_the_guest_extended(server: Server, tmp_path: Path) -> None:
    peer("tpm2_pcrread")
    with guest(server) as machine:
        tis = owned(machine)
        assert tpm.response_code(tis.ask(pcr_extend(23, b"\xc3" * 32))) == tpm.RC_SUCCESS
        Tools(tmp_path, server.tcti).run("pcrread", "sha256:23", "-o", "value")
        assert (tmp_path / "value").read_bytes() == tis.ask(pcr_read(23))[-32:] != bytes(32)


def test_nothing_to_read_and_nothing_to_do(server: Server) -> None:
    with guest(server) as machine:
        stranger = Tis(machine.tpm_registers(), locality=1)
        assert stranger.read(Register.STS) == 0xFFFF_FFFF, "who does not have the TPM reads ones"
        with pytest.raises(BackendError) as caught:
            stranger.ask(tpm.startup())
        assert caught.value.code == "tis-seized"
        stranger.put(tpm.startup())
        stranger.write_status(Status.GO)
        tis = owned(machine)
        assert tis.get(16) == b"\xff" * 16
        tis.write_status(Status.GO)
        tis.write_status(Status.RESPONSE_RETRY)
        assert not tis.status()[0] & Status.DATA_AVAIL
        alive(tis)
        assert tis.get(8) == b"\xff" * 8
        with pytest.raises(StateError):
            Tis(machine.tpm_registers(), locality=4)
        with pytest.raises(StateError):
            machine.tpm_registers().read(5 * PAGE_BYTES, 4)


def test_a_response_that_is_not_read_to_its_end(server: Server) -> None:
    with guest(server) as machine:
        tis = owned(machine)
        for taken in (0, 1, 11, 43):
            tis.ready()
            tis.send(tpm.get_random(32))
            tis.write_status(Status.GO)
            whole = b""
            while not whole:  # responseRetry starts the answer again; nothing is there before the end of execution
                tis.write_status(Status.RESPONSE_RETRY)
                whole = tis.get(44) if tis.status()[0] & Status.DATA_AVAIL else b""
            tis.write_status(Status.RESPONSE_RETRY)
            assert tis.get(taken) == whole[:taken]
            alive(tis)


def test_aborted_in_reception_and_in_execution(server: Server) -> None:
    with guest(server) as machine:
        tis = owned(machine)
        command = tpm.create_ek()
        for length in (1, 5, 6, 10, len(command) - 1):
            tis.ready()
            tis.put(command[:length])
            tis.write_status(Status.GO)  # a byte is missing: there is nothing to execute
            assert tis.status()[0] & Status.EXPECT
            tis.ready()
            alive(tis)
        for more in (Status.COMMAND_READY, Status.COMMAND_CANCEL):
            tis.ready()
            tis.send(command)
            tis.write_status(Status.GO)
            tis.write_status(more)
            tis.ready()
            alive(tis)
        for handle in range(0x8000_0000, 0x8000_0003):  # what an aborted command made is there or not
            tis.ask(tpm.flush_context(handle))


def test_a_higher_locality_takes_the_tpm(server: Server) -> None:
    with guest(server) as machine:
        low = owned(machine)
        assert tpm.response_code(low.ask(pcr_extend(_PCR_OF_LOCALITY_2, b"\1" * 32))) == _RC_LOCALITY
        low.ready()
        low.put(tpm.get_random(8)[:7])
        high = Tis(machine.tpm_registers(), locality=2)
        high.seize()
        assert low.access() & (Access.BEEN_SEIZED | Access.ACTIVE_LOCALITY) == Access.BEEN_SEIZED
        low.put(b"\xee" * 40)
        low.write_status(Status.COMMAND_READY)
        with pytest.raises(BackendError) as caught:
            low.ask(tpm.get_random(8))
        assert caught.value.code == "tis-seized"
        assert tpm.response_code(high.ask(pcr_extend(_PCR_OF_LOCALITY_2, b"\1" * 32))) == tpm.RC_SUCCESS
        low.write_access(Access.SEIZE)
        assert high.access() & Access.ACTIVE_LOCALITY, "a lower one seizes nothing"
        low.write_access(Access.REQUEST_USE)
        assert high.access() & Access.PENDING_REQUEST
        high.release()
        low.request()
        assert tpm.response_code(low.ask(pcr_extend(_PCR_OF_LOCALITY_2, b"\1" * 32))) == _RC_LOCALITY


@pytest.mark.parametrize(
    ("size", "sent"),
    [pytest.param(6, 6, id="short"), pytest.param(5000, 5000, id="long"), pytest.param(0x1_000C, 12, id="wraps")],
)
def test_an_impossible_size_ends_that_guests_tpm_alone(server: Server, size: int, sent: int) -> None:
    """QEMU passes on what the guest wrote: the stream has no next command, so ours hangs up, and QEMU says so."""
    command = (tpm.CommandHeader(0x8001, size, 0x17B).pack() + bytes(5000))[:sent]
    with guest(server) as machine:
        tis = owned(machine)
        tis.ready()
        tis.put(command)
        assert not tis.status()[0] & Status.EXPECT
        tis.write_status(Status.GO)
        assert tis.receive(time.monotonic() + 30) == _RC_FATAL
        assert tis.ask(tpm.get_random(8)) == _RC_FATAL
    with guest(server) as machine:
        alive(owned(machine))


def test_an_interrupt_says_that_the_answer_is_there(server: Server) -> None:
    with guest(server) as machine:
        tis = owned(machine)
        registers = machine.tpm_registers()
        registers.write(Register.INT_ENABLE, 4, _INT_GLOBAL | _INT_DATA_AVAIL)
        tis.ready()
        tis.send(tpm.get_random(16))
        assert not machine.qtest.wait_interrupt(TPM_INTERRUPT, 0)
        tis.write_status(Status.GO)
        assert machine.qtest.wait_interrupt(TPM_INTERRUPT, 30)
        assert registers.read(Register.INT_STATUS, 4) & _INT_DATA_AVAIL
        assert tis.status()[0] & Status.DATA_AVAIL
        assert len(tis.receive(time.monotonic() + 30)) == 28
        registers.write(Register.INT_STATUS, 4, _INT_ALL)
        assert registers.read(Register.INT_STATUS, 4) == 0
        assert not machine.qtest.wait_interrupt(TPM_INTERRUPT, 0)


def test_a_tpm_that_dies_under_its_guest(tmp_path: Path) -> None:
    mortal = our_server(tmp_path)
    try:
        with guest(mortal) as machine:
            tis = owned(machine)
            mortal.kill()
            assert tis.ask(tpm.get_random(8)) == _RC_FATAL
            assert tis.access() & Access.ACTIVE_LOCALITY, "the machine lives on"
    finally:
        if mortal.process.poll() is None:
            mortal.kill()


@pytest.mark.long
def test_swtpm_and_qemu_wait_for_each_other(tmp_path: Path) -> None:
    """Six bytes that say "6 bytes": swtpm waits for ten, and QEMU, told to abort, for swtpm, in its main loop."""
    control = tmp_path / "ctrl"
    words = [
        str(peer("swtpm")),
        "socket",
        "--tpm2",
        "--tpmstate",
        f"dir={tmp_path}",
        "--ctrl",
        f"type=unixio,path={control}",
    ]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as swtpm:
        await_listener(control, swtpm)
        options = MachineOptions(MachineKind.MICROVM, tpm=control, program=peer("qemu-system-x86_64"))
        with contextlib.closing(Machine(options)) as machine:
            tis = owned(machine)
            tis.ready()
            tis.put(tpm.CommandHeader(0x8001, 6, 0x17B).pack()[:6])
            tis.write_status(Status.GO)
            with pytest.raises(BackendError) as caught:
                tis.receive(time.monotonic() + 1)
            assert caught.value.code == "tis-timeout"
            with pytest.raises(BackendError) as caught:
                tis.ready()
            assert caught.value.code == "qemu-timeout"
        swtpm.kill()


def test_random_register_writes(server: Server) -> None:
    """A guest that writes anything anywhere, and then behaves."""
    source = random.Random(7)
    with guest(server) as machine:
        registers = machine.tpm_registers()
        offsets = (Register.ACCESS, Register.STS, Register.DATA_FIFO, Register.INT_ENABLE, Register.INT_STATUS)
        for _ in range(600):
            page, register = source.randrange(5) * PAGE_BYTES, source.choice(offsets)
            if register is Register.STS and source.random() < 0.7:
                registers.write(page + register, 4, source.choice((Status.COMMAND_READY, Status.GO)))
            elif source.random() < 0.3:
                registers.read(page + register, source.choice((1, 4)))
            else:
                registers.write(page + register, 1, source.randrange(256))
        top = Tis(registers, locality=3)
        if not top.access() & Access.ACTIVE_LOCALITY:
            top.seize()
        top.ready()
        assert tpm.response_code(top.ask(tpm.startup())) in (tpm.RC_SUCCESS, tpm.RC_INITIALIZE)
        alive(top)
