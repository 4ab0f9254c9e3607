# SPDX-License-Identifier: MIT OR Apache-2.0
"""One vhost-user connection: messages out with their descriptors, replies in, never later than a deadline.

What a back-end can do to a socket, and what comes of it: it may close it (``vhost-user-gone``), not read (a message
that does not leave in time is ``vhost-user-timeout``), answer one byte at a time (the deadline is that of the whole
exchange), answer more than was asked (what remains is found before the next request goes out: ``vhost-user-reply``),
and send descriptors (refused; without room for them, the kernel closes them at once). After any of these the
connection is closed: in a stream there is no way to find the next message.

`SharedMemory` is the memory that both sides map: a memfd whose size is sealed, because a back-end that could shrink it
would kill the front-end with SIGBUS at its next access.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.vhost_user import MemoryRegion, MessageHeader, Request, U64Payload
from svsm.formats.vhost_user_messages import encode, judge_acknowledgement, judge_header
from svsm.storage.drivers.dma import PAGE_BYTES, DmaMemory

__all__ = ["DEFAULT_GUEST_ADDRESS", "Connection", "SharedMemory", "connect"]

DEFAULT_GUEST_ADDRESS: Final = 0x1_0000_0000
_USER_ADDRESS: Final = 0x7E00_0000_0000
"""The protocol wants the front-end's own address of each region, but only as a name: so the back-end gets a made-up
one, and does not learn where this process has its memory."""
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """Memory for one device, mapped here and passed to its back-end.

    Args:
        size_bytes: Rounded up to whole pages.
        guest_address: What the device calls its first byte; page-aligned.

    Raises:
        BackendError: ``vhost-user-memory`` when the system does not give it.
        StateError: ``dma-memory`` for sizes and addresses that cannot be.

    Attributes:
        dma: The driver's view.
        descriptor: The memfd.
        region: How SET_MEM_TABLE describes it.
    """

    def __init__(self, size_bytes: int, *, guest_address: int = DEFAULT_GUEST_ADDRESS) -> None:
        size = (size_bytes + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
        if size < PAGE_BYTES:
            raise StateError("shared memory consists of whole pages", code="dma-memory", got=size_bytes)
        self.descriptor = -1
        try:
            self.descriptor = os.memfd_create("svsm-vhost-user", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.descriptor, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            # Never closed by hand: views of it live in the driver. It goes with the last of them.
            mapped = mmap.mmap(self.descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            raise BackendError(
                f"no memory to share with the back-end: {error}", code="vhost-user-memory", got=size
            ) from error
        try:
            self.dma = DmaMemory(memoryview(mapped), address=guest_address)
        except SvsmError:
            self.close()
            raise
        self.region = MemoryRegion(guest_address, size, _USER_ADDRESS, 0)

    def user_address(self, guest_address: int) -> int:
        """The name that SET_VRING_ADDR has for a guest address.

        Raises:
            StateError: ``dma-memory`` for one that is not in here.
        """
        offset = guest_address - self.region.guest_address
        if not 0 <= offset < self.region.size:
            raise StateError("the ring is not in the shared memory", code="dma-memory", got=guest_address)
        return _USER_ADDRESS + offset

    def close(self) -> None:
        """Close the descriptor; the mapping stays for as long as somebody looks at it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def connect(path: str, *, seconds: float = 5.0) -> socket.socket:
    """A connection to a back-end's socket.

    Raises:
        BackendError: ``vhost-user-connect``.
    """
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        opened.settimeout(seconds)
        opened.connect(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        opened.close()
        raise BackendError(
            f"cannot connect to the back-end: {error}",
            code="vhost-user-connect",
            hint="is the daemon running, and is this its socket?",
            path=path,
        ) from error
    return opened


class Connection:
    """Requests and replies over a connected socket.

    Args:
        connected: A stream socket; owned.
        clock: What deadlines are measured with.

    Attributes:
        acknowledged: REPLY_ACK was negotiated: every message is answered.
    """

    def __init__(self, connected: socket.socket, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._socket = connected
        self._clock = clock
        self.acknowledged = False
        self._broken: SvsmError | None = None
        connected.setblocking(False)

    def fileno(self) -> int:
        """For a poller; -1 when closed."""
        return self._socket.fileno()

    # ---- exchanges --------------------------------------------------------------------------------------------------

    def ask(self, request: Request, payload: bytes, answer_bytes: int, *, deadline: float) -> bytes:
        """Send a request and take its answer.

        Args:
            request: One that has an answer of its own.
            payload: What goes with it.
            answer_bytes: How long the answer's payload is.
            deadline: For all of it.

        Returns:
            `answer_bytes` bytes, or none for a GET_CONFIG that was refused.

        Raises:
            ProtocolError: ``vhost-user-reply``, ``vhost-user-timeout``.
            BackendError: ``vhost-user-gone``.
        """
        with _Closing(self):
            self._send(encode(request, payload), (), deadline)
            size = judge_header(self._receive(MessageHeader.SIZE, deadline), request, answer_bytes)
            return self._receive(size, deadline)

    def ask_u64(self, request: Request, *, deadline: float) -> int:
        """As `ask`, for the requests whose answer is one number."""
        return U64Payload.parse(self.ask(request, b"", U64Payload.SIZE, deadline=deadline)).value

    def tell(self, request: Request, payload: bytes = b"", *, deadline: float, descriptors: Sequence[int] = ()) -> None:
        """Send a message; where acknowledgements were negotiated, wait for it and demand agreement.

        Raises:
            ProtocolError: ``vhost-user-refused``, ``virtio-features-refused``, and as `ask`.
            BackendError: ``vhost-user-gone``.
        """
        with _Closing(self):
            self._send(encode(request, payload, need_reply=self.acknowledged), descriptors, deadline)
            if self.acknowledged:
                size = judge_header(self._receive(MessageHeader.SIZE, deadline), request, U64Payload.SIZE)
                judge_acknowledgement(request, self._receive(size, deadline))

    def check(self) -> None:
        """Demand that the back-end is there, and silent: nobody asked it anything.

        Raises:
            ProtocolError: ``vhost-user-reply``.
            BackendError: ``vhost-user-gone``.
        """
        with _Closing(self):
            self._demand_silence()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def break_with(self, error: SvsmError) -> None:
        """Close, and give this reason from now on."""
        self._broken = error
        self._socket.close()

    def _demand_open(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._socket.fileno() < 0:
            raise _gone()

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def _demand_silence(self) -> None:
        self._demand_open()
        try:
            data, _, flags, _ = self._socket.recvmsg(1, 0, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise _gone() from error
        if not data and not flags & socket.MSG_CTRUNC:
            raise _gone()
        raise ProtocolError(
            "the back-end speaks without having been asked",
            code="vhost-user-reply",
            hint="the back-end is broken or hostile; restart it",
        )

    def _send(self, message: bytes, descriptors: Sequence[int], deadline: float) -> None:
        self._demand_silence()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        rest = memoryview(message)
        while rest:
            try:
                sent = self._socket.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._await(select.POLLOUT, deadline)
                continue
            except OSError as error:
                raise _gone() from error
            rest = rest[sent:]
            ancillary = []

    def _receive(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part, _, flags, _ = self._socket.recvmsg(length - len(data))
            except (BlockingIOError, InterruptedError):
                self._await(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise _gone() from error
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError("the back-end sends descriptors that nobody asked for", code="vhost-user-reply")
            if not part:
                raise _gone()
            data += part
        return bytes(data)

    def _await(self, events: int, deadline: float) -> None:
        remaining = deadline - self._clock()
        if remaining <= 0:
            raise _late()
        poller = select.poll()
        poller.register(self._socket, events)
        poller.poll(max(1, int(remaining * 1000)))


class _Closing:
    """Closes a connection whose exchange failed, and remembers why."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if isinstance(value, SvsmError):
            self._connection.break_with(value)


def _gone() -> BackendError:
    return BackendError(
        "the back-end has closed the connection",
        code="vhost-user-gone",
        hint="see the daemon's log; reconnect when it runs again",
    )


def _late() -> ProtocolError:
    return ProtocolError(
        "the back-end does not answer in time",
        code="vhost-user-timeout",
        hint="is it stopped, or busy with another client?",
    )
