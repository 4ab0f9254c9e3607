# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU with real firmware on the TPM of a running system: the firmware measures, the PCRs live as long as its guest."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats import tpm
from svsm.formats.swtpm import Control
from tests.e2e.boot_support import short_folder
from tests.e2e.tpm_support import System, TpmClient, pcr_extend, pcr_read
from tests.support import absent, peer

pytestmark = pytest.mark.interop

FIRMWARE = {
    "seabios": ("/usr/share/seabios/bios-256k.bin",),
    "ovmf": ("/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF_CODE.fd"),
}
_MEASURED = range(8)
"""What firmware extends: events of its own, and a separator before it hands over."""

_BOOT_SECONDS = 60
"""Of the emulator's own CPU time: what firmware needs does not depend on who else uses the machine."""


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    peer("qemu-system-x86_64")
    folder = short_folder()
    made = System(folder)
    try:
        made.start()
        yield made
        assert made.stop() == 0
    finally:
        made.close()
        shutil.rmtree(folder)


def firmware(kind: str) -> str:
    for path in FIRMWARE[kind]:
        if Path(path).is_file():
            return path
    raise absent(f"the firmware {kind} is not installed")


@contextlib.contextmanager
def qemu(system: System, kind: str, device: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(peer("qemu-system-x86_64")), "-accel", "tcg", "-machine", "q35", "-m", "128", "-nodefaults"]
    command += ["-display", "none", "-bios", firmware(kind)]
    command += ["-chardev", f"socket,id=control,path={system.where}.ctrl"]
    command += ["-tpmdev", "emulator,id=tpm,chardev=control", "-device", f"{device},tpmdev=tpm"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as made:
        try:
            yield made
        finally:
            made.terminate()
            made.wait(20)


def cpu_seconds(pid: int) -> float:
    """How long a process has run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pcrs(system: System) -> list[bytes]:
    """PCR 0 to 7 and 16; an empty value while the TPM is off or not started."""
    with TpmClient(system.where) as client:
        answers = [client.ask(pcr_read(number)) for number in (*_MEASURED, 16)]
    return [answer[-32:] if tpm.response_code(answer) == 0 else b"" for answer in answers]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "device"),
    [
        ("seabios", "tpm-crb"),
        *(pytest.param("ovmf", device, marks=pytest.mark.long) for device in ("tpm-crb", "tpm-tis")),
    ],
)
def test_firmware_measures_into_the_tpm(system: System, kind: str, device: str) -> None:
    with qemu(system, kind, device) as machine:
        while True:
            values = pcrs(system)
            if all(any(values[number]) for number in _MEASURED):
                break
            said = machine.stdout.read() if machine.poll() is not None and machine.stdout else b""
            assert machine.poll() is None, said
            assert cpu_seconds(machine.pid) < _BOOT_SECONDS, [value.hex() for value in values]
            time.sleep(0.1)
        assert len({values[number] for number in _MEASURED}) > 1  # separators and more
        with TpmClient(system.where) as client:
            client.run(pcr_extend(16, b"\1" * 32))
            assert client.run(pcr_read(16))[-32:] != bytes(32)
    # The guest is gone: the TPM is off, and its next guest finds nothing of this one.
    with TpmClient(system.where) as client:
        deadline = time.monotonic() + 10
        while client.ask(tpm.get_random(8)) != tpm.failure_response():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with TpmClient(system.where.with_name(system.where.name + ".ctrl")) as control:
        assert control.exchange(Control.INIT.to_bytes(4, "big") + bytes(4), 4) == bytes(4)
    with TpmClient(system.where) as client:
        client.run(tpm.startup())
    assert pcrs(system) == [bytes(32)] * 9
