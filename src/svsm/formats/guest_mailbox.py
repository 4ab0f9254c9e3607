# SPDX-License-Identifier: MIT OR Apache-2.0
"""The mailbox of the resident guest stub: how somebody outside has it make one SVSM call.

Two pages, a control page and a data page, at any guest-physical address that the stub was told; normally shared
memory, so that the host writes them. That the demonstration guest does what its host says is its own choice, not
a hole in the SVSM: the SVSM sees the calls of an ordinary, untrusted guest.

The writer fills in everything but `request` first, then stores `request` = `done` + 1. The stub does what `flags`
say, in this order, stores the results and last `done` = `request`:

    COPY_IN   `length_in` bytes of the data page to `buffer`
    CALL      registers, GHCB MSR, VMGEXIT; with PENDING also call_pending = 1 before
    COPY_OUT  `length_out` bytes of `buffer` to the data page

`buffer` is any guest-virtual address (the stub's page tables map the first 512 GiB to themselves), which is also how
a test provokes an access that the hardware denies. A successful REMAP_CA moves the calling area that the stub uses.
"""

from __future__ import annotations

import enum
from typing import Final

from svsm.formats.record import U64, Record, record

__all__ = [
    "DATA_BYTES",
    "DATA_OFFSET",
    "DONE_OFFSET",
    "MAILBOX_BYTES",
    "REQUEST_OFFSET",
    "MailboxControl",
    "MailboxFlags",
]

DATA_OFFSET: Final = 4096
DATA_BYTES: Final = 4096
MAILBOX_BYTES: Final = DATA_OFFSET + DATA_BYTES
REQUEST_OFFSET: Final = 0
DONE_OFFSET: Final = 8


class MailboxFlags(enum.IntFlag):
    """What the stub does for one request."""

    PENDING = 1
    COPY_IN = 2
    COPY_OUT = 4
    CALL = 8


@record(size=152, byte_order="little")
class MailboxControl(Record):
    """The start of the control page. Written from outside up to `length_out`, by the stub from there on."""

    request: U64 = 0
    done: U64 = 0
    """Written by the stub."""
    flags: U64 = 0
    rax: U64 = 0
    rcx: U64 = 0
    rdx: U64 = 0
    r8: U64 = 0
    r9: U64 = 0
    buffer: U64 = 0
    length_in: U64 = 0
    length_out: U64 = 0
    result_rax: U64 = 0
    result_rcx: U64 = 0
    result_rdx: U64 = 0
    result_r8: U64 = 0
    result_r9: U64 = 0
    result_pending: U64 = 0
    """call_pending as the stub found it after the call: 1 means that nobody took it."""
    result_ghcb_msr: U64 = 0
    """The GHCB MSR after the call: the host's answer."""
    target_vmpl: U64 = 0
    """Which VMPL the GHCB MSR request names; 0 is the SVSM."""
