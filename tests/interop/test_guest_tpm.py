# SPDX-License-Identifier: MIT OR Apache-2.0
"""The guest's machine code, through the vTPM protocol, with somebody else's TPM (swtpm) at the far end."""

from __future__ import annotations

import hashlib
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from svsm.abi.errors import StateError
from svsm.abi.platform import PAGE_SIZE
from svsm.formats.guest_mailbox import MailboxControl, MailboxFlags
from svsm.hardware.vcpu import load_engine
from svsm.kernel.protocols.table import Result
from tests.e2e.small_machine import Machine
from tests.support import absent, peer

try:
    load_engine()
except StateError:  # an optional extra; CI installs it
    raise absent("unicorn is not installed") from None

pytestmark = pytest.mark.interop
_ALL = MailboxFlags.COPY_IN | MailboxFlags.CALL | MailboxFlags.PENDING | MailboxFlags.COPY_OUT
_CMD = 2 << 32 | 1
_PCR = 16  # the debug PCR


class Swtpm:
    """swtpm on a Unix socket; asynchronous, as a service in another process is."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tpm"
        command = [str(peer("swtpm")), "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--flags"]
        command += ["not-need-init,startup-clear", "--server", f"type=unixio,path={path}"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.sock.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.done: Callable[[bytes | None], None] | None = None

    def powered_on(self) -> bool:
        return True

    def submit(self, command: bytes, done: Callable[[bytes | None], None]) -> None:
        self.sock.sendall(command)
        self.done = done

    def work(self) -> None:
        select.select([self.sock], [], [], 10)
        response = self.sock.recv(4096)
        done, self.done = self.done, None
        assert done is not None
        done(response)

    def close(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[Swtpm]:
    made = Swtpm(tmp_path)
    yield made
    made.close()


@pytest.fixture
def machine(tpm: Swtpm) -> Iterator[Machine]:
    with Machine(tpm) as made:
        yield made


def execute(machine: Machine, tpm: Swtpm, command: bytes) -> bytes:
    """One TPM command of the guest, its buffer across two pages; the TPM's response."""
    buffer = machine.image.buffer_gpa + 0x800
    request = struct.pack("<IBI", 8, 0, len(command)) + command
    outcome = machine.request(
        MailboxControl(flags=_ALL, rax=_CMD, rcx=buffer, buffer=buffer, length_in=len(request), length_out=PAGE_SIZE),
        request,
        idle=tpm.work,
    )
    assert outcome.registers[:2] == (Result.SUCCESS, buffer)
    size = int.from_bytes(outcome.data[:4], "little")
    response = outcome.data[4 : 4 + size]
    assert int.from_bytes(response[2:6], "big") == size
    return response


def test_random_and_a_measurement(machine: Machine, tpm: Swtpm) -> None:
    get_random = bytes.fromhex("80010000000c0000017b0020")
    first, second = (execute(machine, tpm, get_random) for _ in range(2))
    assert first[:12] == second[:12] == bytes.fromhex("80010000002c000000000020")
    assert first != second

    event = hashlib.sha256(b"measured by the guest").digest()
    auth = bytes.fromhex("00000009 40000009 0000 00 0000")
    body = struct.pack(">I", _PCR) + auth + bytes.fromhex("00000001 000b") + event
    extend = struct.pack(">HII", 0x8002, 10 + len(body), 0x182) + body
    assert execute(machine, tpm, extend)[6:10] == bytes(4)

    read = bytes.fromhex("8001 00000014 0000017e 00000001 000b 03 000001")
    assert execute(machine, tpm, read)[-32:] == hashlib.sha256(bytes(32) + event).digest()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (bytes.fromhex("80010000000c0000ffff0020"), 0x143),  # TPM_RC_COMMAND_CODE
        (bytes.fromhex("80010000000d0000017b0020"), 0x142),  # TPM_RC_COMMAND_SIZE: says 13, has 12
    ],
)
def test_the_tpms_own_errors_are_responses(machine: Machine, tpm: Swtpm, command: bytes, code: int) -> None:
    assert int.from_bytes(execute(machine, tpm, command)[6:10], "big") == code
