# SPDX-License-Identifier: MIT OR Apache-2.0
"""TPM 2.0 commands and responses: the headers, and the few commands that svsm itself sends.

Sources: TCG TPM 2.0 Library rev 1.59, parts 1 to 3; TCG EK Credential Profile 2.5 §B.3 (template L-1). Everything
is big-endian. Commands with one authorisation use the empty password session (TPM_RS_PW).

Deliberately not a TPM stack: no sessions, no parameter encryption, no general unmarshalling.
"""

from __future__ import annotations

import hashlib

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import U16, U32, Buffer, Record, record

__all__ = [
    "CC_CHANGE_EPS",
    "CC_SHUTDOWN",
    "EK_NAME_BYTES",
    "MIN_COMMAND_BYTES",
    "RC_COMMAND_SIZE",
    "RC_FAILURE",
    "RC_INITIALIZE",
    "RC_SUCCESS",
    "SU_CLEAR",
    "SU_STATE",
    "CommandHeader",
    "ResponseHeader",
    "command_code",
    "create_ek",
    "dictionary_attack_parameters",
    "ek_name",
    "failure_response",
    "flush_context",
    "get_capability",
    "get_random",
    "parse_create_primary",
    "parse_properties",
    "response_code",
    "shutdown",
    "startup",
]

TAG_NO_SESSIONS = 0x8001
TAG_SESSIONS = 0x8002

CC_CHANGE_EPS = 0x124
CC_CREATE_PRIMARY = 0x131
CC_DICTIONARY_ATTACK_PARAMETERS = 0x13A
CC_STARTUP = 0x144
CC_SHUTDOWN = 0x145
CC_FLUSH_CONTEXT = 0x165
CC_GET_CAPABILITY = 0x17A
CC_GET_RANDOM = 0x17B

RC_SUCCESS = 0
RC_INITIALIZE = 0x100
RC_FAILURE = 0x101
RC_COMMAND_SIZE = 0x142

SU_CLEAR = 0
SU_STATE = 1

RH_LOCKOUT = 0x4000000A
RH_ENDORSEMENT = 0x4000000B
RS_PW = 0x40000009

CAP_TPM_PROPERTIES = 6

ALG_SHA256 = 0x000B
EK_NAME_BYTES = 34
"""A TPM name under SHA-256: u16 algorithm, 32 bytes of digest."""


@record(size=10, byte_order="big")
class CommandHeader(Record):
    """Start of every command (part 1 §18.2)."""

    tag: U16  # TPM_ST_NO_SESSIONS or TPM_ST_SESSIONS; others go to the TPM, which answers them
    size: U32  # bytes of the whole command
    code: U32  # TPM_CC


@record(size=10, byte_order="big")
class ResponseHeader(Record):
    """Start of every response (part 1 §18.4)."""

    tag: U16
    size: U32  # bytes of the whole response
    code: U32  # TPM_RC


MIN_COMMAND_BYTES = CommandHeader.SIZE


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def _sized(data: bytes) -> bytes:
    return _u16(len(data)) + data


_EMPTY_PASSWORD = _u32(9) + _u32(RS_PW) + _u16(0) + b"\0" + _u16(0)


def _command(code: int, body: bytes, *, handles: bytes = b"", authorised: bool = False) -> bytes:
    rest = handles + (_EMPTY_PASSWORD if authorised else b"") + body
    tag = TAG_SESSIONS if authorised else TAG_NO_SESSIONS
    return CommandHeader(tag, CommandHeader.SIZE + len(rest), code).pack() + rest


def startup(kind: int = SU_CLEAR) -> bytes:
    """TPM2_Startup."""
    return _command(CC_STARTUP, _u16(kind))


def shutdown(kind: int = SU_CLEAR) -> bytes:
    """TPM2_Shutdown."""
    return _command(CC_SHUTDOWN, _u16(kind))


def get_random(count_bytes: int) -> bytes:
    """TPM2_GetRandom."""
    return _command(CC_GET_RANDOM, _u16(count_bytes))


def get_capability(capability: int, first: int, count: int) -> bytes:
    """TPM2_GetCapability."""
    return _command(CC_GET_CAPABILITY, _u32(capability) + _u32(first) + _u32(count))


def flush_context(handle: int) -> bytes:
    """TPM2_FlushContext."""
    return _command(CC_FLUSH_CONTEXT, _u32(handle))


def dictionary_attack_parameters(*, max_tries: int, recovery_seconds: int, lockout_recovery_seconds: int) -> bytes:
    """TPM2_DictionaryAttackParameters, authorised by an empty lockoutAuth (as after manufacture)."""
    body = _u32(max_tries) + _u32(recovery_seconds) + _u32(lockout_recovery_seconds)
    return _command(CC_DICTIONARY_ATTACK_PARAMETERS, body, handles=_u32(RH_LOCKOUT), authorised=True)


_POLICY_A = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicySecret(TPM_RH_ENDORSEMENT) under SHA-256: who knows the endorsement authorisation may use the EK."""

_EK_TEMPLATE = (
    _u16(0x0001)  # TPM_ALG_RSA
    + _u16(ALG_SHA256)  # nameAlg
    + _u32(0x000300B2)  # fixedTPM fixedParent sensitiveDataOrigin adminWithPolicy restricted decrypt
    + _sized(_POLICY_A)
    + _u16(0x0006) + _u16(128) + _u16(0x0043)  # symmetric: AES-128-CFB
    + _u16(0x0010)  # scheme: TPM_ALG_NULL
    + _u16(2048) + _u32(0)  # keyBits, exponent (0: 65537)
    + _sized(bytes(256))  # unique
)  # fmt: skip


def create_ek() -> bytes:
    """TPM2_CreatePrimary of the RSA-2048 endorsement key (template L-1) with an empty endorsement authorisation."""
    body = _sized(_u16(0) + _u16(0)) + _sized(_EK_TEMPLATE) + _sized(b"") + _u32(0)
    return _command(CC_CREATE_PRIMARY, body, handles=_u32(RH_ENDORSEMENT), authorised=True)


def parse_create_primary(response: Buffer) -> tuple[int, bytes]:
    """(object handle, TPMT_PUBLIC) of a successful TPM2_CreatePrimary response.

    Raises:
        FormatError: ``tpm-response`` when it is an error; ``cursor-*``.
    """
    _demand_success(response)
    cursor = Cursor(response, what="a CreatePrimary response")
    cursor.take(ResponseHeader.SIZE)
    handle = cursor.unsigned(4, "big")
    cursor.take(4)
    return handle, cursor.take(cursor.unsigned(2, "big"))


def ek_name(public: Buffer) -> bytes:
    """The TPM name of an object with nameAlg SHA-256: 34 bytes, algorithm and digest of its TPMT_PUBLIC."""
    return _u16(ALG_SHA256) + hashlib.sha256(public).digest()


def parse_properties(response: Buffer) -> dict[int, int]:
    """Value by TPM_PT of a TPM2_GetCapability(TPM_CAP_TPM_PROPERTIES) response.

    Raises:
        FormatError: ``tpm-response``; ``cursor-*``.
    """
    _demand_success(response)
    cursor = Cursor(response, what="a GetCapability response")
    cursor.take(ResponseHeader.SIZE)
    cursor.take(1)
    if cursor.unsigned(4, "big") != CAP_TPM_PROPERTIES:
        raise FormatError("a TPM answered another question", code="tpm-response")
    count = cursor.unsigned(4, "big")
    if count * 8 > cursor.remaining:
        raise FormatError("a TPM property list is cut short", code="tpm-response", got=count)
    return {cursor.unsigned(4, "big"): cursor.unsigned(4, "big") for _ in range(count)}


def _demand_success(response: Buffer) -> None:
    code = response_code(response)
    if code != RC_SUCCESS:
        raise FormatError("the TPM answered an error", code="tpm-response", got=code)


def response_code(response: Buffer) -> int:
    """The TPM_RC of a response.

    Raises:
        FormatError: ``record-truncated``.
    """
    return ResponseHeader.parse_at(response, 0).code


def command_code(command: Buffer) -> int | None:
    """The TPM_CC of a command, None when it is too short to have one."""
    return int.from_bytes(command[6:10], "big") if len(command) >= CommandHeader.SIZE else None


def failure_response(code: int = RC_FAILURE) -> bytes:
    """A bare response with an error code."""
    return ResponseHeader(TAG_NO_SESSIONS, ResponseHeader.SIZE, code).pack()
