# SPDX-License-Identifier: MIT OR Apache-2.0
"""A whole simulated machine inside one test process: hardware and host as threads, the test as the kernel.

Nothing is isolated here; what is real are the bytes: launch, digest, RMP, guest messages, reports, page moves. Where
the separation of processes matters, a test starts processes (`tests/unit/hardware/test_processes.py`).

    with running_machine() as machine:
        report = machine.platform.report(bytes(64)).report
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from svsm.formats.errors import SvsmError
from svsm.formats.igvm import IgvmFile
from svsm.formats.snp.hardware_messages import HostCommand, Message
from svsm.formats.snp.report import Report
from svsm.formats.snp.tcb import Line, Tcb
from svsm.hardware.chip import Chip
from svsm.hardware.machine import KernelStart, Machine, Spawned
from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.messages import Port
from svsm.hardware.rmp import Home
from svsm.hardware.vcpu_port import VcpuPort
from svsm.host.hardware_port import HardwarePort
from svsm.host.hypervisor import DeviceOffer, Hypervisor, HypervisorEnd, Listener, Notify
from svsm.host.launcher import NO_DEVICES, Launched
from svsm.kernel.simulated_platform import SimulatedPlatform, launched_ranges
from svsm.launch.build import build_image

__all__ = ["RunningMachine", "running_machine", "small_image", "throwaway_chip"]

_JOIN_SECONDS = 10.0


def small_image(*, archive: bytes = b"payload" * 1000, settings: bytes = b"{}") -> bytes:
    """An image of our layout with a loader that nobody runs."""
    return build_image(loader=b"raise SystemExit\n", archive=archive, settings=settings)


def throwaway_chip(*, report_version: int = 5, certificates: bytes = b"") -> Chip:
    """A Milan chip with a fresh key and no authority; see `signed_by` on the returned signer for checking."""
    key = ec.generate_private_key(ec.SECP384R1())

    def sign(report: Report) -> Report:
        return report.with_signature(*decode_dss_signature(key.sign(report.signed_part, ec.ECDSA(hashes.SHA384()))))

    return Chip(
        line=Line.MILAN,
        family=0x19,
        model=1,
        stepping=1,
        chip_id=os.urandom(64),
        tcb=Tcb(bootloader=4, tee=0, snp=24, microcode=219),
        sign=sign,
        certificates=certificates,
        report_version=report_version,
    )


class _Thread(Spawned):
    """The test itself, in the place of the kernel process."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.write(write, b"x")  # the machine waits for its end only after its channel has closed
        os.close(write)

    def fileno(self) -> int:
        return self._read

    def collect(self) -> int:
        os.close(self._read)
        return 0

    def kill(self) -> None:
        pass


class _Service(Spawned):
    """A service that never ends by itself."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        return self._read

    def collect(self) -> int:
        os.close(self._read)
        os.close(self._write)
        return 0

    def kill(self) -> None:
        pass


class _TestSpawner:
    """Gives copies of the kernel's descriptors to the test."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.start: KernelStart | None = None
        self.descriptors: dict[str, int] = {}

    def kernel(self, start: KernelStart, descriptors: Mapping[str, int]) -> Spawned:
        self.start = start
        self.descriptors = {name: os.dup(descriptor) for name, descriptor in descriptors.items()}
        self.started.set()
        return _Thread()

    def wait(self) -> KernelStart:
        """How the kernel was started."""
        if not self.started.wait(_JOIN_SECONDS) or self.start is None:
            raise RuntimeError("the kernel was not started")
        return self.start

    def service(self, name: str, archive: int, parameters: Mapping[str, str]) -> tuple[Spawned, socket.socket]:
        """A service that answers its name and parameters once: enough to see that the socket arrives."""
        kernel_end, service_end = socket.socketpair()
        with service_end:
            service_end.sendall(f"{name} {dict(parameters)} {os.fstat(archive).st_size}".encode())
        return _Service(), kernel_end


_DIRECTED = 0x7777


class _Directed(Hypervisor):
    """A hypervisor that a test can make do something, in its own thread: a made-up exit code fetches the work."""

    work: collections.deque[Callable[[Hypervisor], object]]
    results: list[object]

    def _exit(self, message: Message) -> Message | None:
        if message.arguments[0] != _DIRECTED:
            return super()._exit(message)
        try:
            self.results.append(self.work.popleft()(self))
        finally:
            answer = message.answer()
        return answer


@dataclasses.dataclass(slots=True)
class RunningMachine:
    """What a test can look at."""

    platform: SimulatedPlatform
    machine: Machine
    hypervisor: Hypervisor
    launched: Launched
    start: KernelStart
    events: list[tuple[str, Mapping[str, object]]]
    end: HypervisorEnd | None = None
    """After the context: how it ended."""
    killed: list[int] = dataclasses.field(default_factory=list)
    """Statuses with which the platform would have ended the process."""

    def as_host(self, work: Callable[[Hypervisor], object]) -> object:
        """Run `work` in the host's place and give its result; the host's thread owns the channel."""
        hypervisor = self.hypervisor
        if not isinstance(hypervisor, _Directed):
            raise TypeError("not a hypervisor of this harness")
        hypervisor.work.append(work)
        self.platform._host.exit(_DIRECTED, deadline=time.monotonic() + _JOIN_SECONDS)
        return hypervisor.results.pop()

    def host_command(self, kind: HostCommand, *arguments: int) -> Message:
        """One command of the host to the hardware, whatever its status."""
        answer = self.as_host(lambda host: host._hardware.ask(kind, *arguments))
        if not isinstance(answer, Message):
            raise TypeError("no answer")
        return answer


@contextlib.contextmanager
def running_machine(
    image: bytes | None = None,
    *,
    configuration: bytes = b"{}",
    device_tree: bytes = NO_DEVICES,
    chip: Chip | None = None,
    devices: Sequence[DeviceOffer] = (),
    listeners: Sequence[Listener] = (),
    vcpu: Callable[..., None] | None = None,
    host: type[Hypervisor] = Hypervisor,
    host_seconds: float = 5.0,
) -> Iterator[RunningMachine]:
    """Launch an image and give the test the kernel's place.

    Args:
        image: An IGVM file of our layout; `small_image` by default.
        configuration: The launch configuration.
        device_tree: What the loader says of devices behind registers.
        chip: `throwaway_chip` by default.
        devices: Handed to the kernel before it starts.
        listeners: Socket fronts.
        vcpu: `svsm.hardware.vcpu.run_vcpu` for a machine that runs guests; it gets a thread.
        host: A hypervisor class, for hostile ones.
        host_seconds: The kernel's patience.
    """
    parts = _Parts(chip or throwaway_chip(), vcpu)
    events: list[tuple[str, Mapping[str, object]]] = []
    hypervisor = parts.hypervisor(host, listeners, notify=lambda name, details: events.append((name, details)))
    try:
        launched = hypervisor.launch(
            IgvmFile.parse(small_image() if image is None else image), configuration, device_tree
        )
        for device in devices:
            hypervisor.offer(device)
        hypervisor.start(launched)
        start = parts.spawner.wait()
    except BaseException:
        parts.abandon()
        raise
    killed: list[int] = []
    platform = SimulatedPlatform(
        parts.spawner.descriptors,
        validated=launched_ranges(start.registers),
        secrets_gpa=start.registers["rbx"],
        host_seconds=host_seconds,
        end=killed.append,
    )
    running = RunningMachine(platform, parts.machine, hypervisor, launched, start, events, killed=killed)
    parts.thread(lambda: setattr(running, "end", hypervisor.serve()))
    try:
        yield running
    finally:
        platform.close()
        parts.end()


class _Parts:
    """The machine's threads and what they share. The hardware runs at once.

    Args:
        chip: The chip.
        vcpu: As for `running_machine`.
    """

    def __init__(self, chip: Chip, vcpu: Callable[..., None] | None) -> None:
        self.spawner = _TestSpawner()
        self._memory = PhysicalMemory()
        self._threads: list[threading.Thread] = []
        to_host, to_hardware = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kernel_end, self._host_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._hardware = HardwarePort(to_hardware)
        self.machine = Machine(
            host=Port(to_host, name="the host"),
            chip=chip,
            spawner=self.spawner,
            memory=self._memory,
            vcpu=None if vcpu is None else self._vcpu_port(vcpu),
            kernel_descriptors={"host": kernel_end.detach()},
        )
        self.thread(self.machine.serve)

    def thread(self, work: Callable[[], object]) -> None:
        """Run something until the machine ends."""
        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def _vcpu_port(self, vcpu: Callable[..., None]) -> VcpuPort:
        """The machine's end to a vCPU, which gets a thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        vmpl2, shared = (self._memory.descriptors[home] for home in (Home.VMPL2, Home.SHARED))
        self.thread(lambda: _guarded(vcpu, theirs, vmpl2_fd=vmpl2, shared_fd=shared))
        return VcpuPort(ours)

    def hypervisor(self, host: type[Hypervisor], listeners: Sequence[Listener], *, notify: Notify) -> Hypervisor:
        """A hypervisor of a class that a test can direct."""
        directed: type[_Directed] = type("Directed", (_Directed, host), {"work": collections.deque(), "results": []})
        shared = self._memory.descriptors[Home.SHARED]
        return directed(self._hardware, self._host_end, shared, listeners=listeners, notify=notify)

    def abandon(self) -> None:
        """There will be no kernel."""
        self._hardware.close()
        self._host_end.close()
        self._join()

    def end(self) -> None:
        """After the kernel has closed its channels."""
        self._join()
        for name in ("private", "vmpl2", "shared"):
            os.close(self.spawner.descriptors[name])

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        self._memory.close()


def _guarded(vcpu: Callable[..., None], sock: socket.socket, *, vmpl2_fd: int, shared_fd: int) -> None:
    with contextlib.suppress(SvsmError, OSError), sock:
        vcpu(sock, vmpl2_fd=vmpl2_fd, shared_fd=shared_fd)
