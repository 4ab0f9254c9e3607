# SPDX-License-Identifier: MIT OR Apache-2.0
"""One error root for the whole system, split by whose fault it is.

Every error carries a stable `code` (kebab-case, never reused for another meaning): it is what scripts match on,
what `svsm explain CODE` looks up, and what `--json` prints. `hint` is one sentence for the person at the terminal.
`details` holds data that the code that catches it may want (offset, field, expected, got, section); values must
be printable and never secret. Libraries raise these and nothing else for bad input; they never print or exit.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendError",
    "FormatError",
    "IntegrityError",
    "PolicyError",
    "ProtocolError",
    "StateError",
    "SvsmError",
]

Detail = int | str | bytes | bool | None


class SvsmError(Exception):
    """The root. Never raised itself: raise one of the subclasses.

    Args:
        message: What went wrong, one sentence without a full stop.
        code: The stable identifier, e.g. ``igvm-checksum``; documented in ``svsm/cli/errors/*.toml``.
        hint: What the person at the terminal can do about it, or None.
        details: Data for programs: offset, field, expected, got, section, ...
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str, hint: str | None = None, **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.details: dict[str, Detail] = details

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self.details.items())
        return f"{self.message} ({shown})" if shown else self.message


def _show(value: Detail) -> str:
    if isinstance(value, bytes):
        return value[:64].hex() + ("…" if len(value) > 64 else "")
    if isinstance(value, int) and not isinstance(value, bool) and value > 4096:
        return hex(value)
    return str(value)


class FormatError(SvsmError):
    """The bytes are not what the format allows."""


class ProtocolError(SvsmError):
    """The peer said something that the protocol does not allow at this point."""


class IntegrityError(SvsmError):
    """A MAC, digest or signature does not match."""

    exit_code = 3


class PolicyError(SvsmError):
    """Everything is well-formed and authentic, and it is refused."""

    exit_code = 3


class StateError(SvsmError):
    """The caller did things in an order, or in a state, in which they cannot be done."""


class BackendError(SvsmError):
    """The operating system or a library failed underneath."""
