# SPDX-License-Identifier: MIT OR Apache-2.0
"""What only separate processes can show: who can see private memory, and what touching a wrong page does.

Hardware, host and kernel are three processes with exactly the descriptors that a boot gives them. The kernel writes a
canary into private memory; the host searches everything it can reach for it, in its own maps, through its own
descriptors, and in /proc/PID/mem of the others where the system lets it try (another uid, when root runs the tests).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from svsm.abi.platform import Gpa
from svsm.confine import process as confine
from svsm.formats.igvm import IgvmFile
from svsm.hardware.machine import KernelStart, Spawned, run_hardware
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.rmp import Home
from svsm.host.hardware_port import HardwarePort
from svsm.host.hypervisor import Hypervisor
from svsm.kernel.simulated_platform import SHARED_GPA, SimulatedPlatform
from svsm.testing.machine_harness import small_image, throwaway_chip

_PRIVATE_GPA = Gpa(0x0800_0000)
_NOBODY = 65534
_MASK = 0xA5
_SET_DUMPABLE = 4
_TOLD_GPA = Gpa(SHARED_GPA + 0x4000)
_FRAMEWORK = {0, 1, 2}


def masked(data: bytes) -> bytes:
    """How the canary is told to who shall search for it: nobody but the kernel ever holds the bytes themselves."""
    return bytes(byte ^ _MASK for byte in data)


def pattern(masked_canary: bytes) -> re.Pattern[bytes]:
    """Finds the canary; neither the pattern's text nor its compiled form holds the bytes in a row."""
    return re.compile(b"".join(b"[\\x%02x]" % (byte ^ _MASK) for byte in masked_canary))


class Child:
    """A forked process with a role; its result is one JSON line, or the signal that ended it."""

    def __init__(self, role: Callable[[], object], *, keep: set[int]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _close_all_but(keep | {write} | _FRAMEWORK)
                result = role()
                os.write(write, json.dumps(result).encode())
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                os._exit(status)
        os.close(write)

    def result(self) -> object:
        with os.fdopen(self._read, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return json.loads(data) if code == 0 else code


def _close_all_but(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


class _ForkedKernel(Spawned):
    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._pidfd

    def kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def collect(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)


class ForkingSpawner:
    """Starts the kernel as a fork that keeps only its named descriptors."""

    def __init__(self, main: Callable[[KernelStart, Mapping[str, int]], None]) -> None:
        self._main = main

    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _close_all_but(set(descriptors.values()) | _FRAMEWORK)
                confine.harden()
                self._main(start, descriptors)
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                os._exit(status)
        return _ForkedKernel(pid)

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        raise AssertionError("no service is started here")


def boot(
    kernel: Callable[[KernelStart, Mapping[str, int]], None],
    host: Callable[[socket.socket, socket.socket, int], object],
) -> object:
    """Hardware, host and kernel as processes; the host's result."""
    memory = PhysicalMemory()
    host_side, hardware_side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host_kernel, kernel_host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    names = {home.value: descriptor for home, descriptor in memory.descriptors.items()}

    def hardware_role() -> object:
        confine.harden()
        descriptors = {"host": kernel_host.detach()}
        end = run_hardware(
            hardware_side,
            None,
            throwaway_chip(),
            ForkingSpawner(kernel),
            memory=names,
            kernel_descriptors=descriptors,
        )
        return end.value

    def host_role() -> object:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        return host(host_side, host_kernel, names["shared"])

    hardware = Child(hardware_role, keep={hardware_side.fileno(), kernel_host.fileno(), *names.values()})
    adversary = Child(host_role, keep={host_side.fileno(), host_kernel.fileno(), names["shared"]})
    for end in (host_side, hardware_side, host_kernel, kernel_host):
        end.close()
    memory.close()
    result = adversary.result()
    assert hardware.result() is not None
    return result


# ---- the canary --------------------------------------------------------------------------------------------------


def kernel_with_a_canary(start: KernelStart, descriptors: Mapping[str, int]) -> None:
    platform = SimulatedPlatform.at_start(start.registers, descriptors)
    canary = os.urandom(32)
    platform.write(_PRIVATE_GPA, canary)
    platform.write(_TOLD_GPA, b"told" + masked(canary))
    # Until the host has searched and hangs up.
    while not platform.host_gone:
        platform.wait(deadline=time.monotonic() + 1)
    assert platform.read(_PRIVATE_GPA, 32) == canary


def searching_host(to_hardware: socket.socket, to_kernel: socket.socket, shared_fd: int) -> object:
    port = HardwarePort(to_hardware)
    hypervisor = Hypervisor(port, to_kernel, shared_fd)
    hypervisor.start(hypervisor.launch(IgvmFile.parse(small_image()), b"{}"))
    deadline = time.monotonic() + 10
    while os.pread(shared_fd, 4, _TOLD_GPA) != b"told" and time.monotonic() < deadline:
        time.sleep(0.01)
    needle = pattern(os.pread(shared_fd, 32, _TOLD_GPA + 4))
    ctypes.CDLL(None).prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # or this process could not look at itself either
    own = _search_memory(os.getpid(), needle)
    others = {pid: _search_memory(pid, needle) for pid in _all_processes() if pid != os.getpid()}
    result = {
        "own": own,
        "others": sum(count for count in others.values() if count is not None),
        "relatives_readable": [pid for pid in _family() if others.get(pid) is not None],
        "through_descriptors": _search_file(shared_fd, needle),
        "memfds": [link for link in _open_descriptors() if "memfd" in link],
        "uid": os.getuid(),
    }
    to_kernel.close()
    port.stop()
    return result


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _family() -> list[int]:
    """Hardware and kernel: the other processes that our parent, or a child of it, has started."""
    parents = {pid: _parent_of(pid) for pid in _all_processes() if pid != os.getpid()}
    siblings = {pid for pid, parent in parents.items() if parent == os.getppid()}
    return sorted(siblings | {pid for pid, parent in parents.items() if parent in siblings})


def _parent_of(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _open_descriptors() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return links


def _search_file(descriptor: int, needle: re.Pattern[bytes]) -> int:
    """How often the needle occurs in the data of a sparse file."""
    found, position = 0, 0
    while True:
        try:
            position = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:
            return found
        found += len(needle.findall(os.pread(descriptor, 1 << 20, position)))
        position += 1 << 20


def _search_memory(pid: int, needle: re.Pattern[bytes]) -> int | None:
    """How often the needle occurs in the process's mapped memory; None when that may not be read."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError:
        return None
    found = 0
    try:
        for line in maps:
            first, last = (int(end, 16) for end in line.split(None, 1)[0].split("-"))
            for position in range(first, last, 1 << 20):
                with contextlib.suppress(OSError, OverflowError):
                    found += len(needle.findall(os.pread(memory, min(1 << 20, last - position), position)))
    finally:
        os.close(memory)
    return found


def test_the_host_does_not_find_what_is_in_private_memory() -> None:
    result = boot(kernel_with_a_canary, searching_host)
    assert isinstance(result, dict), result
    assert result["own"] == 0
    assert result["others"] == 0
    assert result["through_descriptors"] == 0
    assert result["memfds"] == ["/memfd:svsm-shared (deleted)"]
    if os.getuid() == 0:
        assert result["uid"] == _NOBODY
    assert result["relatives_readable"] == []


def test_the_search_finds_what_is_there() -> None:
    """The control: where the process may see the memory, the same search finds the needle."""
    memory = PhysicalMemory()
    canary = os.urandom(32)
    needle = pattern(masked(canary))
    try:
        descriptor = memory.descriptors[Home.SHARED]
        assert _search_file(descriptor, needle) == 0
        memory.write(Home.SHARED, SHARED_GPA, canary)
        assert _search_file(descriptor, needle) == 1
        held = _search_memory(os.getpid(), needle)
        assert held is not None
        assert held >= 1
    finally:
        memory.close()


# ---- faults ------------------------------------------------------------------------------------------------------


def _toucher(gpa: int, *, write: bool, rescind: bool = False) -> Callable[[KernelStart, Mapping[str, int]], None]:
    def main(start: KernelStart, descriptors: Mapping[str, int]) -> None:
        platform = SimulatedPlatform.at_start(start.registers, descriptors)
        platform.read(_PRIVATE_GPA, 1)
        if rescind:
            platform.validate(_PRIVATE_GPA, size_bytes=4096, validated=False)
        address = platform.address_of(gpa)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        if write:
            ctypes.memset(address, 0, 1)
        else:
            ctypes.string_at(address, 1)

    return main


def _plain_host(to_hardware: socket.socket, to_kernel: socket.socket, shared_fd: int) -> object:
    hypervisor = Hypervisor(HardwarePort(to_hardware), to_kernel, shared_fd)
    hypervisor.start(hypervisor.launch(IgvmFile.parse(small_image()), b"{}"))
    return hypervisor.serve().kernel_status


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(("gpa", "rescind"), [(0x2000_0000, False), (0x4000_0000, False), (_PRIVATE_GPA, True)])
def test_touching_a_page_that_is_not_validated_is_a_fault(gpa: int, write: bool, rescind: bool) -> None:
    import faulthandler

    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    try:
        status = boot(_toucher(gpa, write=write, rescind=rescind), _plain_host)
    finally:
        if enabled:
            faulthandler.enable()
    assert status in (-signal.SIGSEGV, -signal.SIGBUS)


def test_touching_a_validated_page_is_not() -> None:
    assert boot(_toucher(_PRIVATE_GPA, write=True), _plain_host) == 0
