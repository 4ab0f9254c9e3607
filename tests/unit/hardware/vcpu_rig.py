# SPDX-License-Identifier: MIT OR Apache-2.0
"""The chip's side of a vCPU, for tests: memfds, the socket, and a vCPU in a thread or in a process of its own."""

from __future__ import annotations

import os
import socket
import struct
import threading
from types import TracebackType

from svsm.confine import Role, enter
from svsm.formats.snp.vcpu_messages import (
    MAX_MESSAGE_BYTES,
    Access,
    ExitMessage,
    Kind,
    MapMessage,
    Memory,
    PlainMessage,
    Registers,
    RunMessage,
    UnmapMessage,
    parse_message,
    stop,
)
from svsm.hardware.vcpu import load_engine, run_vcpu

__all__ = ["CODE", "DATA", "GUEST", "GUEST_BYTES", "TABLES", "VcpuRig", "registers"]

GUEST = 0x4000_0000
GUEST_BYTES = 1 << 20
TABLES = GUEST
CODE = GUEST + 0x4000
DATA = GUEST + 0x8000
_PATIENCE_SECONDS = 10


def registers(**changes: int) -> Registers:
    """64-bit mode with the rig's identity map, RIP at `CODE`."""
    values = dict.fromkeys(Registers.__dataclass_fields__, 0)
    values |= {"rip": CODE, "rflags": 2, "cr0": 0x80010033, "cr3": TABLES, "cr4": 0x60, "efer": 0x1D00}
    return Registers(**values | changes)


class VcpuRig:
    """See the module. `with VcpuRig() as rig:` ends the vCPU and demands that it ended well."""

    def __init__(self, *, process: bool = False, confined: bool = False) -> None:
        self.fds = {memory: os.memfd_create(memory.name) for memory in Memory}
        for fd in self.fds.values():
            os.ftruncate(fd, 1 << 48)
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(_PATIENCE_SECONDS)
        self.sequence = 0
        self.failure: BaseException | None = None
        self.pid = 0
        self._thread: threading.Thread | None = None
        self.poke(TABLES, struct.pack("<Q", TABLES + 0x1000 | 3))
        self.poke(TABLES + 0x1000, struct.pack("<8Q", *(index << 30 | 0x83 for index in range(8))))
        if process or confined:
            self._fork(theirs, confined=confined)
        else:
            self._thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)
            self._thread.start()

    def _fork(self, theirs: socket.socket, *, confined: bool) -> None:
        load_engine()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        status = 1
        try:
            self.sock.close()
            if confined:
                enter(Role.VCPU, parent=parent)
            run_vcpu(theirs, vmpl2_fd=self.fds[Memory.VMPL2], shared_fd=self.fds[Memory.SHARED])
            status = 0
        finally:
            os._exit(status)

    def _serve(self, theirs: socket.socket) -> None:
        try:
            run_vcpu(theirs, vmpl2_fd=self.fds[Memory.VMPL2], shared_fd=self.fds[Memory.SHARED])
        except BaseException as error:
            self.failure = error
        finally:
            theirs.close()

    def __enter__(self) -> VcpuRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Hang up and wait for the vCPU's end."""
        self.sock.close()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
            if self._thread.is_alive():
                raise TimeoutError("the vCPU does not end")
        if self.pid:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            if status:
                raise ChildProcessError(f"the vCPU ended with {status}")
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}

    # --- memory, as another process would write it -----------------------------------------------------------

    def poke(self, gpa: int, data: bytes, memory: Memory = Memory.VMPL2) -> None:
        """Store bytes in a memfd."""
        os.pwrite(self.fds[memory], data, gpa)

    def peek(self, gpa: int, length: int, memory: Memory = Memory.VMPL2) -> bytes:
        """Load bytes from a memfd."""
        return os.pread(self.fds[memory], length, gpa)

    # --- messages --------------------------------------------------------------------------------------------

    def receive(self) -> ExitMessage | PlainMessage:
        """The next message of the vCPU."""
        message = parse_message(self.sock.recv(MAX_MESSAGE_BYTES))
        assert isinstance(message, ExitMessage | PlainMessage)
        return message

    def _number(self) -> int:
        self.sequence += 1
        return self.sequence

    def _acknowledged(self) -> None:
        message = self.receive()
        assert (message.kind, message.sequence) == (Kind.ACK, self.sequence)

    def map(
        self, gpa: int, length: int, memory: Memory = Memory.VMPL2, access: Access = Access.ALL, *, wait: bool = True
    ) -> None:
        """MAP, and its ACK unless told not to wait."""
        self.sock.send(
            MapMessage(
                kind=Kind.MAP,
                reserved_04=0,
                sequence=self._number(),
                gpa=gpa,
                length=length,
                memory=memory,
                access=access,
            ).pack()
        )
        if wait:
            self._acknowledged()

    def unmap(self, gpa: int, length: int, *, wait: bool = True) -> None:
        """UNMAP, and its ACK unless told not to wait."""
        self.sock.send(
            UnmapMessage(kind=Kind.UNMAP, reserved_04=0, sequence=self._number(), gpa=gpa, length=length).pack()
        )
        if wait:
            self._acknowledged()

    def stop(self) -> None:
        """STOP."""
        self.sock.send(stop(self._number()))

    def start(self, state: Registers, *, time_limit_us: int = 5_000_000) -> None:
        """RUN, not waiting for the exit."""
        self.sock.send(
            RunMessage(
                kind=Kind.RUN,
                reserved_04=0,
                sequence=self._number(),
                sev_features=1,
                time_limit_us=time_limit_us,
                registers=state,
            ).pack()
        )

    def exit(self) -> ExitMessage:
        """Wait for the exit."""
        message = self.receive()
        assert isinstance(message, ExitMessage)
        return message

    def run(self, state: Registers, *, time_limit_us: int = 5_000_000) -> ExitMessage:
        """RUN to the next exit."""
        self.start(state, time_limit_us=time_limit_us)
        message = self.exit()
        assert message.sequence == self.sequence
        return message

    def execute(self, code: bytes, **changes: int) -> ExitMessage:
        """Put code at `CODE` and run it."""
        self.poke(CODE, code)
        return self.run(registers(**changes))
