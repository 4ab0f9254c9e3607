# SPDX-License-Identifier: MIT OR Apache-2.0
"""One real operation on each TPM, as a client would do it: TPM2_Startup where it is due, then TPM2_GetRandom."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from svsm.formats import tpm
from svsm.formats.cursor import Cursor
from svsm.formats.errors import BackendError, ProtocolError
from svsm.formats.guest_mailbox import DATA_BYTES, MailboxControl, MailboxFlags

__all__ = ["guest_random", "guest_tpm_command", "socket_random"]

_SECONDS: Final = 30.0
_HEADER_BYTES: Final = 10
_SUCCESS: Final = 0
_ALREADY_STARTED: Final = 0x100
_RANDOM_BYTES: Final = 8
_VTPM_CMD: Final = 2 << 32 | 1
_SEND_COMMAND: Final = 8
_GUEST_BUFFER: Final = 0x4000_4000


def _random(execute: Callable[[bytes], bytes]) -> bytes:
    code = tpm.response_code(execute(tpm.startup()))
    if code not in (_SUCCESS, _ALREADY_STARTED):
        raise ProtocolError("the TPM does not start", code="demonstration-tpm", response_code=code)
    response = execute(tpm.get_random(_RANDOM_BYTES))
    if tpm.response_code(response) != _SUCCESS:
        raise ProtocolError(
            "the TPM gives no random bytes", code="demonstration-tpm", response_code=tpm.response_code(response)
        )
    cursor = Cursor(response, what="TPM2_GetRandom response")
    cursor.take(_HEADER_BYTES)
    return cursor.take(cursor.unsigned(2, "big"))


def socket_random(path: Path) -> bytes:
    """Eight random bytes from the TPM behind a data socket.

    Raises:
        ProtocolError, BackendError: ``demonstration-tpm``.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(str(path))

            def execute(command: bytes) -> bytes:
                connection.sendall(command)
                header = _exactly(connection, _HEADER_BYTES)
                length = int.from_bytes(header[2:6], "big")
                return header + _exactly(connection, max(0, length - _HEADER_BYTES))

            return _random(execute)
        except OSError as failed:
            raise BackendError("the TPM's socket does not answer", code="demonstration-tpm") from failed


def guest_random(path: Path) -> bytes:
    """Eight random bytes from the guest's TPM, asked for by the guest through the SVSM vTPM protocol.

    Args:
        path: The guest driver's socket.

    Raises:
        ProtocolError, BackendError: ``demonstration-tpm``.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(str(path))
            return _random(lambda command: guest_tpm_command(connection, command))
        except OSError as failed:
            raise BackendError("the guest does not answer", code="demonstration-tpm") from failed


def guest_tpm_command(connection: socket.socket, command: bytes) -> bytes:
    """Let the guest send one TPM command; the TPM's response.

    Raises:
        ProtocolError: ``demonstration-tpm`` when the SVSM call fails.
    """
    # The protocol's framing is little-endian: command 8, locality 0, size (AMD 58019 §8).
    request = _SEND_COMMAND.to_bytes(4, "little") + b"\0" + len(command).to_bytes(4, "little") + command
    control = MailboxControl(
        flags=MailboxFlags.PENDING | MailboxFlags.COPY_IN | MailboxFlags.COPY_OUT | MailboxFlags.CALL,
        rax=_VTPM_CMD,
        rcx=_GUEST_BUFFER,
        buffer=_GUEST_BUFFER,
        length_in=len(request),
        length_out=DATA_BYTES,
    )
    connection.sendall(control.pack() + request.ljust(DATA_BYTES, b"\0"))
    answer = MailboxControl.parse(_exactly(connection, MailboxControl.SIZE))
    data = Cursor(_exactly(connection, DATA_BYTES), what="vTPM response")
    if answer.result_rax != 0 or answer.result_pending:
        raise ProtocolError("the SVSM call failed", code="demonstration-tpm", result=answer.result_rax)
    return data.take(data.unsigned(4, "little"))


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ProtocolError("the connection ended inside an answer", code="demonstration-tpm")
        data += more
    return data
