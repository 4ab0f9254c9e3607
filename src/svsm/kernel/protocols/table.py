# SPDX-License-Identifier: MIT OR Apache-2.0
"""The table of SVSM protocols: a number and a version range each, with one row per call.

A guest's call names its protocol and call number in RAX and passes four registers; a handler turns that into a
result code and the registers that change. A protocol is added by building one more `SvsmProtocol`; nothing in
here or in the request loop knows any of them.

A handler returns its `Reply`, or None to say that it will call `Call.complete` later: nobody waits meanwhile, and
the guest's vCPU stays stopped until then. Whatever a guest can bring about ends in a result code: handlers raise
`CallError` for their own refusals, and the platform's memory errors are translated here. Only `BackendError` (the
machine underneath is gone) passes through, because no answer to the guest could be delivered any more.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.abi.platform import Gpa

__all__ = ["Call", "CallError", "Handler", "ProtocolTable", "Reply", "Result", "Row", "SvsmProtocol", "result_of"]

_MASK32: Final = 0xFFFF_FFFF
_MAX_INSTRUCTION_CODE: Final = 0xFFF


class Result(enum.IntEnum):
    """RAX after a call (AMD 58019 table 4)."""

    SUCCESS = 0
    INCOMPLETE = 0x8000_0000
    UNSUPPORTED_PROTOCOL = 0x8000_0001
    UNSUPPORTED_CALL = 0x8000_0002
    INVALID_ADDRESS = 0x8000_0003
    INVALID_FORMAT = 0x8000_0004
    INVALID_PARAMETER = 0x8000_0005
    INVALID_REQUEST = 0x8000_0006
    BUSY = 0x8000_0007
    PROTOCOL_BASE = 0x8000_1000
    """Plus the protocol's own code; for PVALIDATE that of the hardware instruction."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What the guest gets back; a register that is None keeps the value that the guest passed."""

    result: int
    rcx: int | None = None
    rdx: int | None = None
    r8: int | None = None


class CallError(ProtocolError):
    """The guest's call is refused with `result`. Never leaves the kernel."""

    def __init__(self, result: int, message: str) -> None:
        super().__init__(message, code="guest-call-refused", result=int(result))
        self.result = int(result)


class Call:
    """One call of a guest vCPU.

    Args:
        rax: Protocol << 32 | call number.
        vmsa_gpa: Which vCPU calls.
        finish: Where `complete` delivers the reply.
    """

    def __init__(
        self, *, rax: int, rcx: int, rdx: int, r8: int, r9: int, vmsa_gpa: Gpa, finish: Callable[[Reply], None]
    ) -> None:
        self.protocol = rax >> 32 & _MASK32
        self.number = rax & _MASK32
        self.rcx = rcx
        self.rdx = rdx
        self.r8 = r8
        self.r9 = r9
        self.vmsa_gpa = vmsa_gpa
        self._finish: Callable[[Reply], None] | None = finish

    def complete(self, reply: Reply) -> None:
        """Answer the guest and let it run again; exactly once per call.

        Raises:
            StateError: ``guest-call-completed`` the second time.
        """
        finish, self._finish = self._finish, None
        if finish is None:
            raise StateError("this call has been answered already", code="guest-call-completed", got=self.number)
        finish(reply)


Handler = Callable[[Call], Reply | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One call of a protocol."""

    name: str
    handler: Handler


@dataclasses.dataclass(frozen=True, slots=True)
class SvsmProtocol:
    """One protocol."""

    number: int
    name: str
    calls: Mapping[int, Row]
    min_version: int = 1
    max_version: int = 1
    unknown_call: int = Result.UNSUPPORTED_CALL
    """What a call number without a row answers."""


class ProtocolTable:
    """All protocols of one guest.

    Args:
        protocols: Each number at most once.

    Raises:
        StateError: ``guest-protocol-twice``.
    """

    def __init__(self, protocols: Iterable[SvsmProtocol]) -> None:
        self._protocols: dict[int, SvsmProtocol] = {}
        for protocol in protocols:
            self.add(protocol)

    def add(self, protocol: SvsmProtocol) -> None:
        """One more protocol.

        Raises:
            StateError: ``guest-protocol-twice``.
        """
        if protocol.number in self._protocols:
            raise StateError("protocol registered twice", code="guest-protocol-twice", got=protocol.number)
        self._protocols[protocol.number] = protocol

    def versions(self, number: int, version: int) -> tuple[int, int] | None:
        """(min, max) of protocol `number` if it exists and `version` lies between them."""
        protocol = self._protocols.get(number)
        if protocol is None or not protocol.min_version <= version <= protocol.max_version:
            return None
        return protocol.min_version, protocol.max_version

    def dispatch(self, call: Call) -> Reply | None:
        """Serve one call.

        Returns:
            The reply, or None when the handler will call ``call.complete``.
        Raises:
            BackendError: The machine itself failed.
        """
        protocol = self._protocols.get(call.protocol)
        if protocol is None:
            return Reply(Result.UNSUPPORTED_PROTOCOL)
        row = protocol.calls.get(call.number)
        if row is None:
            return Reply(protocol.unknown_call)
        try:
            return row.handler(call)
        except BackendError:
            raise
        except SvsmError as error:
            return Reply(result_of(error))


def result_of(error: SvsmError) -> int:
    """The result code for an error below a handler.

    `CallError` carries it; a failed hardware instruction is protocol-specific (0x80001000 + its code); other
    memory errors are INVALID_ADDRESS, anything else INVALID_REQUEST.
    """
    if isinstance(error, CallError):
        return error.result
    code = error.details.get("instruction_code")
    if isinstance(code, int) and 0 < code <= _MAX_INSTRUCTION_CODE:
        return Result.PROTOCOL_BASE + code
    if isinstance(error, ProtocolError) and error.code.startswith("platform-"):
        return Result.INVALID_ADDRESS
    return Result.INVALID_REQUEST
