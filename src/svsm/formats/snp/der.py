# SPDX-License-Identifier: MIT OR Apache-2.0
"""A small DER reader (X.690): enough for certificates, and strict where leniency would let two readers disagree.

Lengths are definite and minimal, tags have one byte, integers are minimal, and an element never reaches past the one
that holds it. The reader goes forward through one level at a time and never recurses, so depth is bounded by the
caller's own code.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from svsm.formats.errors import FormatError

__all__ = ["MAX_INTEGER_BYTES", "MAX_TEXT_BYTES", "DerReader", "Element", "Tag", "decode_oid"]

MAX_INTEGER_BYTES: Final = 64
"""RFC 5280 allows 20 for a serial number. Beyond a few thousand digits Python refuses to print a number at all."""
MAX_TEXT_BYTES: Final = 256


class Tag:
    """The identifier octets that certificates use."""

    BOOLEAN: Final = 0x01
    INTEGER: Final = 0x02
    BIT_STRING: Final = 0x03
    OCTET_STRING: Final = 0x04
    NULL: Final = 0x05
    OID: Final = 0x06
    UTF8_STRING: Final = 0x0C
    PRINTABLE_STRING: Final = 0x13
    IA5_STRING: Final = 0x16
    UTC_TIME: Final = 0x17
    GENERALIZED_TIME: Final = 0x18
    SEQUENCE: Final = 0x30
    SET: Final = 0x31

    @staticmethod
    def explicit(number: int) -> int:
        """The context-specific constructed tag [number]."""
        return 0xA0 | number


@dataclasses.dataclass(frozen=True, slots=True)
class Element:
    """One tag, length, value."""

    tag: int
    raw: bytes
    """With tag and length."""
    content: bytes

    def reader(self) -> DerReader:
        """A reader over what is inside."""
        return DerReader(self.content)

    def integer(self) -> int:
        """The value of an INTEGER.

        Raises:
            FormatError: ``der`` when it is empty, not minimal, or longer than any number in a certificate needs to be.
        """
        data = self.content
        if len(data) > MAX_INTEGER_BYTES:
            raise FormatError("a DER integer is too long", code="der", got=len(data))
        redundant = len(data) > 1 and ((data[0] == 0 and data[1] < 0x80) or (data[0] == 0xFF and data[1] >= 0x80))
        if self.tag != Tag.INTEGER or not data or redundant:
            raise FormatError("not a DER integer", code="der")
        return int.from_bytes(data, "big", signed=True)

    def text(self) -> str:
        """The value of a UTF8String, PrintableString or IA5String.

        Raises:
            FormatError: ``der`` for another type, bytes outside its alphabet, more than 256 bytes, or characters that
                do not print: what stands in a certificate ends up in messages and logs.
        """
        encoding = {Tag.UTF8_STRING: "utf-8", Tag.PRINTABLE_STRING: "ascii", Tag.IA5_STRING: "ascii"}.get(self.tag)
        if encoding is None or len(self.content) > MAX_TEXT_BYTES:
            raise FormatError("not a DER string, or too long", code="der", got=self.tag)
        try:
            text = self.content.decode(encoding)
        except UnicodeDecodeError:
            raise FormatError("a DER string holds bytes of another alphabet", code="der") from None
        if not text.isprintable():
            raise FormatError("a DER string holds characters that do not print", code="der")
        return text


class DerReader:
    """Reads the elements of one level in order.

    Args:
        data: The bytes of that level.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._offset

    def next_is(self, tag: int) -> bool:
        """Whether another element follows and has this tag."""
        return self.remaining > 0 and self._data[self._offset] == tag

    def read(self, tag: int) -> Element:
        """The next element, which must have this tag.

        Raises:
            FormatError: ``der`` when it has not, or is malformed or cut short.
        """
        element = self.any()
        if element.tag != tag:
            raise FormatError("a DER element of another type was expected", code="der", expected=tag, got=element.tag)
        return element

    def any(self) -> Element:
        """The next element of any type.

        Raises:
            FormatError: ``der`` when it is malformed or cut short.
        """
        start, data = self._offset, self._data
        if self.remaining < 2:
            raise FormatError("DER is cut short", code="der", offset=start)
        tag, first = data[start], data[start + 1]
        header = 2
        length = first
        if tag & 0x1F == 0x1F:
            raise FormatError("DER tags of several bytes are not used in certificates", code="der", offset=start)
        if first & 0x80:
            count = first & 0x7F
            if not 1 <= count <= 3 or self.remaining < 2 + count:
                raise FormatError("not a DER length", code="der", offset=start)
            header += count
            length = int.from_bytes(data[start + 2 : start + header], "big")
            if length < 0x80 or length >> (8 * (count - 1)) == 0:
                raise FormatError("a DER length is not minimal", code="der", offset=start)
        if length > self.remaining - header:
            raise FormatError("DER is cut short", code="der", offset=start, expected=length)
        self._offset = start + header + length
        return Element(tag, data[start : self._offset], data[start + header : self._offset])

    def finish(self) -> None:
        """Demand that nothing remains.

        Raises:
            FormatError: ``der`` otherwise.
        """
        if self.remaining:
            raise FormatError("DER has trailing bytes", code="der", offset=self._offset, got=self.remaining)


def decode_oid(content: bytes) -> str:
    """An OBJECT IDENTIFIER's content as dotted decimals.

    Raises:
        FormatError: ``der`` when it is malformed, longer than 64 bytes, or has a component beyond 128 bits.
    """
    if not content or len(content) > 64 or content[-1] & 0x80:
        raise FormatError("not a DER object identifier", code="der")
    components: list[int] = []
    value = 0
    fresh = True
    for byte in content:
        if (fresh and byte == 0x80) or value >> 121:
            raise FormatError("not a DER object identifier", code="der")
        value = value << 7 | byte & 0x7F
        fresh = not byte & 0x80
        if fresh:
            components.append(value)
            value = 0
    first = min(components[0] // 40, 2)
    return ".".join(map(str, (first, components[0] - 40 * first, *components[1:])))
