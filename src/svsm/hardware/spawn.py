# SPDX-License-Identifier: MIT OR Apache-2.0
"""Starting the kernel and its services: the CPU's part of `VMRUN` and of `Platform.spawn`.

`exec` of the interpreter with the loader's text from a sealed memfd, an empty environment but for the start table,
and only the named descriptors. Confinement is inherited, and the loader still has to read the interpreter's files, so
a confined `hardware` can't exec by itself. It forks a small *spawner* before it confines itself:

    hardware ──SOCK_SEQPACKET: one request, one answer──▶ spawner ──fork, exec──▶ loader ▶ kernel, services

The spawner is part of the CPU: it keeps root where root started it (each role needs its own uid), but only the
capabilities for that, and has its own system call list. It ends when hardware's end of the socket closes, and what it
started dies with it (PR_SET_PDEATHSIG, and a kill).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Mapping
from types import TracebackType

from svsm.confine import filter as seccomp
from svsm.confine import libc, process
from svsm.confine.lists import Role
from svsm.confine.sealing import seal
from svsm.confine.syscalls import NUMBERS
from svsm.formats.errors import BackendError, StateError
from svsm.formats.record import Buffer

__all__ = ["Process", "Spawner", "sealed_memfd", "spawn_kernel", "spawn_service", "start_spawner"]

_MESSAGE_BYTES = 1 << 16
_DESCRIPTORS = 32
_FIRST_DESCRIPTOR = 3
_CAPBSET_DROP = 24
_CAPABILITIES = frozenset({2, 5, 6, 7})  # DAC_READ_SEARCH, KILL, SETGID, SETUID
_LAST_CAPABILITY = 63


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A started process; `descriptor` (a pidfd) polls readable when it has ended."""

    pid: int
    descriptor: int

    def fileno(self) -> int:
        """For selectors: readable when the process has ended."""
        return self.descriptor

    def ended(self) -> bool:
        """Whether the process has ended."""
        return bool(select.select([self.descriptor], [], [], 0)[0])

    def close(self) -> None:
        """Forget the process; it is not ended by this."""
        os.close(self.descriptor)


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    """A start, as it travels to the spawner."""

    role: str
    registers: dict[str, int]
    names: list[str]
    parameters: dict[str, str]
    uid: int | None
    landlock_cap: int | None

    def environment(self) -> dict[str, str]:
        """The loader's start table; descriptors are numbered from 3 in the order of `names`."""
        numbered = [f"{name}={_FIRST_DESCRIPTOR + 1 + index}" for index, name in enumerate(self.names)]
        table = {
            "SVSM_ROLE": self.role,
            "SVSM_REGISTERS": ",".join(f"{name}={value:x}" for name, value in self.registers.items()),
            "SVSM_DESCRIPTORS": ",".join(numbered),
            "SVSM_PARENT": str(os.getpid()),
        }
        if self.uid is not None:
            table["SVSM_UID"] = str(self.uid)
        if self.landlock_cap is not None:
            table["SVSM_LANDLOCK_CAP"] = str(self.landlock_cap)
        return table | {f"SVSM_PARAMETER_{name}": value for name, value in self.parameters.items()}


def sealed_memfd(name: str, data: Buffer) -> int:
    """A memfd with `data` that nobody can change any more. The caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]
    seal(descriptor)
    return descriptor


def _start(request: _Request, loader: int, descriptors: list[int]) -> int:
    """Fork and exec; returns the process id. `loader` becomes descriptor 3, `descriptors` 4 and on."""
    environment = request.environment()
    interpreter = os.readlink("/proc/self/exe")
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        libc.prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        # A session of its own: signals to the terminal's or the service manager's group are the supervisor's business.
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        wanted = [loader, *descriptors]
        # Move everything out of the way first: a source may have a number that is a target of another.
        moved = [fcntl.fcntl(number, fcntl.F_DUPFD, _FIRST_DESCRIPTOR + 2 * _DESCRIPTORS) for number in wanted]
        for target in (0, 1, 2):
            os.dup2(null, target)
        for index, number in enumerate(moved):
            os.dup2(number, _FIRST_DESCRIPTOR + index, inheritable=True)
        os.closerange(_FIRST_DESCRIPTOR + len(moved), os.sysconf("SC_OPEN_MAX"))
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        text = f"/proc/self/fd/{_FIRST_DESCRIPTOR}"
        # No __pycache__: what the interpreter loads before the loader's text runs is then the sources that are hashed.
        options = ["-I", "-S", "-B", "-X", "pycache_prefix=/dev/null"]
        os.execve(interpreter, [interpreter, *options, text], environment)
    finally:
        os._exit(127)


def _launch(request: _Request, loader: int, descriptors: list[int]) -> Process:
    pid = _start(request, loader, descriptors)
    return Process(pid, os.pidfd_open(pid))


def spawn_kernel(
    loader_text: Buffer,
    registers: Mapping[str, int],
    descriptors: Mapping[str, int],
    *,
    uid: int | None = None,
    landlock_cap: int | None = None,
    spawner: Spawner | None = None,
) -> Process:
    """Start the kernel from measured pages.

    Args:
        loader_text: Copied out of the page at `rip`, length `rcx`.
        registers: The VMSA's registers: rip, rcx, rdx, r8, rsi, rdi, r9, rbx.
        descriptors: Named: private, vmpl2, shared, hardware, host, console. They stay the caller's.
        uid: The kernel's own uid, or None.
        landlock_cap: Use no more than this Landlock ABI.
        spawner: Who does it; None forks from this process, which must not be confined then.

    Raises:
        BackendError: ``spawn-failed``. StateError: ``spawn-request``.
    """
    request = _Request("kernel", dict(registers), list(descriptors), {}, uid, landlock_cap)
    return _run(request, loader_text, list(descriptors.values()), spawner)


def spawn_service(
    archive_fd: int,
    service: str,
    parameters: Mapping[str, str],
    *,
    loader_text: Buffer,
    uid: int | None = None,
    console: int | None = None,
    landlock_cap: int | None = None,
    spawner: Spawner | None = None,
) -> tuple[Process, socket.socket]:
    """Start a service from the kernel's sealed archive.

    Args:
        archive_fd: The kernel's sealed memfd; the loader refuses one that is not sealed.
        service: Role in the payload, e.g. ``vtpm``.
        parameters: What the kernel tells it; names are words.
        loader_text: The same text that the kernel was started with.
        uid: Its own uid, or None.
        console: Where its event lines go, or None.
        landlock_cap: Use no more than this Landlock ABI.
        spawner: See `spawn_kernel`.

    Returns:
        The process, and the kernel's end of its syscall socket (the service's is named ``syscall``).

    Raises:
        BackendError: ``spawn-failed``. StateError: ``spawn-request``.
    """
    if service == "kernel" or not all(name.replace("_", "").isalnum() for name in parameters):
        raise StateError("not a service, or a parameter's name is not a word", code="spawn-request", service=service)
    kernel_end, service_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    named = {"archive": archive_fd, "syscall": service_end.fileno()}
    if console is not None:
        named["console"] = console
    request = _Request(service, {}, list(named), dict(parameters), uid, landlock_cap)
    with service_end:
        try:
            return _run(request, loader_text, list(named.values()), spawner), kernel_end
        except BaseException:
            kernel_end.close()
            raise


def _run(request: _Request, loader_text: Buffer, descriptors: list[int], spawner: Spawner | None) -> Process:
    if len(descriptors) > _DESCRIPTORS:
        raise StateError("too many descriptors for one process", code="spawn-request", limit=_DESCRIPTORS)
    try:
        loader = sealed_memfd("loader", loader_text)
        try:
            if spawner is not None:
                return spawner._start(request, loader, descriptors)
            return _launch(request, loader, descriptors)
        finally:
            os.close(loader)
    except OSError as error:
        raise BackendError("a process could not be started", code="spawn-failed", role=request.role) from error


class Spawner:
    """Hardware's end of the spawner."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self._channel = channel
        self.pid = pid

    def _ask(self, message: dict[str, object], descriptors: list[int]) -> tuple[dict[str, object], list[int]]:
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], descriptors)
            data, received, _, _ = socket.recv_fds(self._channel, _MESSAGE_BYTES, 1)
            answer = json.loads(data)
        except (OSError, ValueError) as error:
            raise BackendError("the spawner is gone", code="spawn-failed") from error
        return answer, received

    def _start(self, request: _Request, loader: int, descriptors: list[int]) -> Process:
        answer, received = self._ask({"start": dataclasses.asdict(request)}, [loader, *descriptors])
        pid = answer.get("pid")
        if not isinstance(pid, int) or len(received) != 1:
            raise BackendError("a process could not be started", code="spawn-failed", role=request.role)
        return Process(pid, received[0])

    def kill(self, process: Process) -> None:
        """End a process that this spawner started; one that has ended is left alone."""
        self._ask({"kill": process.pid}, [])

    def status(self, process: Process) -> int | None:
        """Exit status of an ended process (negative: the signal), None while it runs."""
        answer, _ = self._ask({"status": process.pid}, [])
        value = answer.get("status")
        return value if isinstance(value, int) else None

    def fileno(self) -> int:
        """The socket, for descriptor tables."""
        return self._channel.fileno()

    def close(self) -> None:
        """End the spawner and everything that it started. Closing twice is fine."""
        self._channel.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Spawner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_spawner(keep: frozenset[int] = frozenset(), *, confined: bool = True) -> Spawner:
    """Fork the spawner. Call it before hardware has threads, confines itself or holds memory.

    It dies with the *thread* that calls this: call it from the main one.

    Args:
        keep: Descriptors that the spawner keeps besides its socket and 0 to 2: none, normally.
        confined: Put its own system call list into force.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return Spawner(ours, pid)
    status = 1
    try:
        ours.close()
        _close_others(keep | {theirs.fileno()})
        _confine_spawner(parent, confined=confined)
        _serve(theirs)
        status = 0
    finally:
        os._exit(status)


def _close_others(keep: frozenset[int]) -> None:
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in keep:
            with contextlib.suppress(OSError):
                os.close(number)


def _confine_spawner(parent: int, *, confined: bool) -> None:
    if os.geteuid() == 0:
        for capability in range(_LAST_CAPABILITY + 1):
            if capability not in _CAPABILITIES:
                libc.prctl(_CAPBSET_DROP, capability)
        _limit_capabilities()
    process.harden()
    process.bind_to_parent(parent)
    if confined:
        seccomp.install(Role.SPAWNER)


def _limit_capabilities() -> None:
    mask = sum(1 << capability for capability in _CAPABILITIES)
    header = struct.pack("<Ii", 0x2008_0522, 0)
    with libc.buffer(header) as head, libc.buffer(struct.pack("<6I", mask, mask, 0, 0, 0, 0)) as sets:
        answer = libc.syscall(NUMBERS["capset"], head, sets)
    if answer != 0:
        raise BackendError("the spawner can't give up capabilities", code="spawn-failed", answer=answer)


def _serve(channel: socket.socket) -> None:
    """One request, one answer, until hardware is gone; then end what was started."""
    started: dict[int, int | None] = {}
    while True:
        data, received, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, _DESCRIPTORS + 1)
        if not data:
            break
        answer, descriptors = _answer(json.loads(data), received, started)
        socket.send_fds(channel, [json.dumps(answer).encode()], descriptors)
        for number in [*received, *descriptors]:
            os.close(number)
    for pid in started:
        if _collect(started, pid) is None:
            os.kill(pid, signal.SIGKILL)


def _answer(
    message: dict[str, object], received: list[int], started: dict[int, int | None]
) -> tuple[dict[str, object], list[int]]:
    if isinstance(start := message.get("start"), dict):
        try:
            running = _launch(_Request(**start), received[0], received[1:])
        except OSError as error:
            return {"error": str(error)}, []
        started[running.pid] = None
        return {"pid": running.pid}, [running.descriptor]
    pid = message.get("kill", message.get("status"))
    if not isinstance(pid, int) or pid not in started:
        return {"error": "not started here"}, []
    status = _collect(started, pid)
    if status is None and "kill" in message:
        os.kill(pid, signal.SIGKILL)
    return {"status": status}, []


def _collect(started: dict[int, int | None], pid: int) -> int | None:
    if started[pid] is None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            started[pid] = os.waitstatus_to_exitcode(status)
    return started[pid]
