# SPDX-License-Identifier: MIT OR Apache-2.0
"""Makes the demonstration guest call the SVSM: a Unix socket in front of the guest's mailbox.

The mailbox lies in shared memory, and the guest does what it says (`svsm.formats.guest_mailbox`). Each request on
the socket is a mailbox control record and a page of data; the answer is both after the guest has done its work. A
guest that does not answer within `_ANSWER_SECONDS` ends the connection.

This is the host's equipment for tests and for the boot's demonstration, and it can do nothing that a hostile host
could not do anyway.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.guest_mailbox import (
    DATA_BYTES,
    DATA_OFFSET,
    DONE_OFFSET,
    REQUEST_OFFSET,
    MailboxControl,
)

__all__ = ["MAILBOX_GPA", "MESSAGE_BYTES", "GuestDriver"]

MAILBOX_GPA: Final = 0x3008_0000
MESSAGE_BYTES: Final = MailboxControl.SIZE + DATA_BYTES
_ANSWER_SECONDS: Final = 30.0
_FIRST_PAUSE_SECONDS: Final = 0.0001
_LONGEST_PAUSE_SECONDS: Final = 0.005
_COUNTER_BYTES: Final = 8


class GuestDriver(threading.Thread):
    """Serves one connection after the other.

    Args:
        listener: Listening Unix stream socket; owned.
        shared: The shared memfd.
        interrupt: Wakes the guest's vCPU.
    """

    def __init__(self, listener: socket.socket, shared: int, interrupt: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._listener = listener
        self._shared = shared
        self._interrupt = interrupt

    def run(self) -> None:
        """Serve for as long as the process lives."""
        while True:
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError, SvsmError):
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        while True:
            message = b""
            while len(message) < MESSAGE_BYTES:
                more = connection.recv(MESSAGE_BYTES - len(message))
                if not more:
                    return
                message += more
            control = MailboxControl.parse(message[: MailboxControl.SIZE])
            if not self._perform(control, message[MailboxControl.SIZE :]):
                return
            connection.sendall(
                os.pread(self._shared, MailboxControl.SIZE, MAILBOX_GPA)
                + os.pread(self._shared, DATA_BYTES, MAILBOX_GPA + DATA_OFFSET)
            )

    def _perform(self, control: MailboxControl, data: bytes) -> bool:
        done = self._counter(DONE_OFFSET)
        os.pwrite(self._shared, data, MAILBOX_GPA + DATA_OFFSET)
        request = (done + 1) % (1 << 64)
        os.pwrite(self._shared, control.replace(request=done, done=done).pack(), MAILBOX_GPA)
        os.pwrite(self._shared, request.to_bytes(_COUNTER_BYTES, "little"), MAILBOX_GPA + REQUEST_OFFSET)
        self._interrupt()
        deadline = time.monotonic() + _ANSWER_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while self._counter(DONE_OFFSET) != request:
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return True

    def _counter(self, offset: int) -> int:
        return int.from_bytes(os.pread(self._shared, _COUNTER_BYTES, MAILBOX_GPA + offset), "little")
