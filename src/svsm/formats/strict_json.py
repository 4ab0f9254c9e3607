# SPDX-License-Identifier: MIT OR Apache-2.0
"""JSON from a peer that may be hostile: bounded, without duplicates, and read member by member with a type.

`json.loads` alone is not enough at a trust boundary: it keeps the last of two equal members (two readers of one
message may then disagree), it accepts NaN, it raises RecursionError on deep nesting and ValueError on long
integers. Here all of that is one `FormatError`, and what was read is only reached through `Members`, whose accessors
check type and size. Byte strings travel as base64 in one of two alphabets; both are read canonically, so that one
value has one spelling.

Unknown members are ignored, as the peers' own parsers do: that is how the protocols are extended.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer

__all__ = ["Members", "base64_std", "base64_url", "canonical", "compact", "from_base64_url", "parse_object"]


def parse_object(data: Buffer, *, what: str, max_bytes: int) -> Members:
    """Read one JSON object.

    Args:
        data: UTF-8, without byte order mark; at most `max_bytes` bytes.
        what: What it is, for messages.

    Raises:
        FormatError: ``json-malformed``.
    """
    if len(data) > max_bytes:
        raise FormatError(f"{what} is too long", code="json-malformed", expected=max_bytes, got=len(data))
    try:
        text = bytes(data).decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as broken:
        reason = "nested too deeply" if isinstance(broken, RecursionError) else str(broken)[:120]
        raise FormatError(f"{what} is not well-formed JSON", code="json-malformed", reason=reason) from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object", code="json-malformed", got=type(value).__name__)
    return Members(value, what=what)


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one spelling of `value`: UTF-8, members sorted by name, no blanks, nothing escaped that need not be."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def compact(value: Mapping[str, Any]) -> bytes:
    """UTF-8 without blanks, members in the order given (where a peer's wire fixes another order)."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def base64_std(data: Buffer) -> str:
    """Standard alphabet with padding (the serial line, KBS nonces and evidence)."""
    return base64.b64encode(data).decode()


def base64_url(data: Buffer) -> str:
    """URL-safe alphabet without padding (JWK, JWE, JWS)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def from_base64_url(text: str, *, what: str) -> bytes:
    """Decode `base64_url`'s spelling and no other.

    Raises:
        FormatError: ``json-base64``.
    """
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        data = None
    if data is None or base64_url(data) != text:
        raise FormatError(f"{what} is not unpadded base64url", code="json-base64")
    return data


def _from_base64_std(text: str, *, what: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        data = None
    if data is None or base64_std(data) != text:
        raise FormatError(f"{what} is not padded standard base64", code="json-base64")
    return data


class Members:
    """The members of one JSON object, by name and type.

    Every accessor raises `FormatError`: ``json-member-missing`` or ``json-member-type``.
    """

    def __init__(self, members: dict[str, Any], *, what: str) -> None:
        self._members = members
        self._what = what

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> frozenset[str]:
        """The members there are."""
        return frozenset(self._members)

    def only(self, *names: str) -> None:
        """Demand that there is no member but these."""
        foreign = sorted(self.names - set(names))
        if foreign:
            raise self._error(foreign[0], "is not a member of this message")

    def value(self, name: str) -> object:
        """Whatever is there, None for null."""
        if name not in self._members:
            raise FormatError(f"{self._what} lacks '{name}'", code="json-member-missing", field=name)
        value: object = self._members[name]
        return value

    def is_null(self, name: str) -> bool:
        """Whether the member is left out or null."""
        return self._members.get(name) is None

    def text(self, name: str, *, max_length: int) -> str:
        """A string of at most `max_length` characters that has a UTF-8 form."""
        value = self.value(name)
        if not isinstance(value, str) or len(value) > max_length:
            raise self._error(name, f"is not a string of at most {max_length} characters")
        if not _has_utf8(value):
            raise self._error(name, "holds half a surrogate pair")
        return value

    def number(self, name: str, *, maximum: int) -> int:
        """An integer from 0 to `maximum`."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
            raise self._error(name, "is not an integer in its range")
        return value

    def flag(self, name: str) -> bool:
        """true or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise self._error(name, "is not true or false")
        return value

    def members(self, name: str) -> Members:
        """An object inside this one."""
        value = self.value(name)
        if not isinstance(value, dict):
            raise self._error(name, "is not an object")
        return Members(value, what=f"{self._what}.{name}")

    def items(self, name: str, *, max_items: int) -> list[object]:
        """An array of at most `max_items`."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) > max_items:
            raise self._error(name, f"is not an array of at most {max_items}")
        return list(value)

    def texts(self, name: str, *, max_items: int, max_length: int) -> tuple[str, ...]:
        """An array of short strings."""
        found = []
        for item in self.items(name, max_items=max_items):
            if not isinstance(item, str) or len(item) > max_length or not _has_utf8(item):
                raise self._error(name, "holds something that is not a short string")
            found.append(item)
        return tuple(found)

    def objects(self, name: str, *, max_items: int) -> list[Members]:
        """An array of objects."""
        found = []
        for item in self.items(name, max_items=max_items):
            if not isinstance(item, dict):
                raise self._error(name, "holds something that is not an object")
            found.append(Members(item, what=f"{self._what}.{name}[]"))
        return found

    def bytes_std(self, name: str, *, max_bytes: int) -> bytes:
        """Bytes in padded standard base64."""
        text = self.text(name, max_length=(max_bytes + 2) // 3 * 4)
        return self._bounded(name, _from_base64_std(text, what=f"{self._what}.{name}"), max_bytes)

    def bytes_url(self, name: str, *, max_bytes: int) -> bytes:
        """Bytes in unpadded base64url."""
        text = self.text(name, max_length=(max_bytes + 2) // 3 * 4)
        return self._bounded(name, from_base64_url(text, what=f"{self._what}.{name}"), max_bytes)

    def bytes_hex(self, name: str, *, length: int) -> bytes:
        """Exactly `length` bytes in lower-case hexadecimal."""
        text = self.text(name, max_length=2 * length)
        if len(text) != 2 * length or not set(text) <= set("0123456789abcdef"):
            raise self._error(name, f"is not {length} bytes in lower-case hexadecimal")
        return bytes.fromhex(text)

    def _bounded(self, name: str, data: bytes, max_bytes: int) -> bytes:
        if len(data) > max_bytes:
            raise self._error(name, f"is longer than {max_bytes} bytes")
        return data

    def _error(self, name: str, reason: str) -> FormatError:
        # The name may be the sender's, and an error must be printable.
        shown = name[:64].encode("utf-8", "backslashreplace").decode()
        return FormatError(f"{self._what}.{name[:64]!r} {reason}", code="json-member-type", field=shown)


def _has_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
