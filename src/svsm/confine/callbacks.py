# SPDX-License-Identifier: MIT OR Apache-2.0
"""Python callbacks for C libraries, without writable code.

libffi makes a callback by writing a few instructions into memory that is writable and executable at once. In a
process that parses hostile bytes that is a gift to an attacker, and no measured page. So the loader maps one sealed
page of *slots*, fixed code out of the payload:

    slot i:   endbr64 ;  mov r10, [closure_i] ;  jmp [target_i]

and beside it one page of data, and takes the execute right away from libffi's own pages. `executable(address)` then
reads from a closure where its instructions would jump, puts that and the closure's address (which libffi expects in
r10) into a free slot's data, and returns the slot's address. Outside a payload process nothing was installed, and
the address comes back as it is.
"""

from __future__ import annotations

import ctypes

from svsm.formats.errors import BackendError, StateError

__all__ = ["SLOTS", "executable", "install", "slot_code"]

SLOTS = 64
_SLOT_BYTES = 32
_PAGE_BYTES = 4096
# libffi 3.4, x86-64: [endbr64] lea r10, [rip-7 or -11] ; jmp [rip+3 ...] ; nop ; the target as a quad
_CLOSURE_FORMS = (
    (bytes.fromhex("f30f1efa4c8d15f5ffffffff2503000000"), 24),
    (bytes.fromhex("f30f1efa4c8d15f5ffffffff2507000000"), 24),
    (bytes.fromhex("4c8d15f9ffffffff2503000000"), 16),
)


def slot_code() -> bytes:
    """The page of slots: position-independent code, identical for every image. 4096 bytes."""
    page = bytearray()
    for index in range(SLOTS):
        start = index * _SLOT_BYTES
        data = _PAGE_BYTES + 16 * index
        page += bytes.fromhex("f30f1efa")
        page += bytes.fromhex("4c8b15") + (data - (start + 11)).to_bytes(4, "little", signed=True)
        page += bytes.fromhex("ff25") + (data + 8 - (start + 17)).to_bytes(4, "little", signed=True)
        page += bytes([0xCC]) * (start + _SLOT_BYTES - len(page))
    return bytes(page) + bytes([0xCC]) * (_PAGE_BYTES - len(page))


class _Slots:
    base: int = 0
    used: int = 0


def install(base: int) -> None:
    """Say where the page of slots is mapped; its data page follows at once. Called by the loader, once."""
    if _Slots.base:
        raise StateError("the callback slots are already installed", code="confine-callbacks")
    _Slots.base = base


def executable(address: int) -> int:
    """An address that C code can call, for a libffi closure at `address`; the caller keeps the closure alive.

    Args:
        address: ``int(ffi.cast("uintptr_t", callback))`` of a cffi callback, or a ctypes one's address.

    Raises:
        BackendError: ``confine-callbacks``: not a closure of a known form, or every slot is taken.
    """
    if not _Slots.base:
        return address
    text = ctypes.string_at(address, 48)
    for form, offset in _CLOSURE_FORMS:
        if text.startswith(form) and _Slots.used < SLOTS:
            target = text[offset : offset + 8]
            slot = _Slots.used
            ctypes.memmove(_Slots.base + _PAGE_BYTES + 16 * slot, address.to_bytes(8, "little") + target, 16)
            _Slots.used += 1
            return _Slots.base + slot * _SLOT_BYTES
    raise BackendError("no callback slot for this closure", code="confine-callbacks", used=_Slots.used, code_bytes=text)
