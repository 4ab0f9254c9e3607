# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a caller knows of a volume before it is opened, against a disk that says something else.

A volume's header is bound to its key, so a changed one does not open; but it decides which algorithms run on the key
first. The header of an announced volume is bound to nothing: whoever has the disk may choose weak algorithms, another
salt or a tiny size, and who formats on its word has been talked down to that.
"""

from __future__ import annotations

from typing import NamedTuple

from svsm.formats.errors import PolicyError
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.layout import ImageLayout

__all__ = ["ANYTHING", "Expected"]


class Expected(NamedTuple):
    """What a caller demands of a volume before it is believed, or made. None means anything.

    The header stands in clear text and is not authenticated before a volume is open; that of an announcement never is.

    Attributes:
        layout: The configuration, all of it.
        salt: The salt.
        min_size_bytes: The volume has at least this size.
        max_size_bytes: The volume has at most this size.
        aux: Auxiliary metadata, exactly. Only looked at before a creation: in a volume anybody may change it.
    """

    layout: ImageLayout | None = None
    salt: bytes | None = None
    min_size_bytes: int = 0
    max_size_bytes: int | None = None
    aux: AuxMetadata | None = None

    @staticmethod
    def _refuse(field: str, expected: bytes | int, got: bytes | int) -> PolicyError:
        return PolicyError(
            "the volume is not configured as expected",
            code="cocoonfs-unexpected",
            hint="check that the right disk is attached; its header is not authenticated",
            field=field,
            expected=expected,
            got=got,
        )

    def check_header(self, layout: ImageLayout, salt: bytes) -> None:
        """Compare configuration and salt.

        Raises:
            PolicyError: ``cocoonfs-unexpected``.
        """
        if self.layout is not None and layout != self.layout:
            raise self._refuse("layout", self.layout.pack(), layout.pack())
        if self.salt is not None and salt != self.salt:
            raise self._refuse("salt", self.salt, salt)

    def check_size(self, size_bytes: int) -> None:
        """Compare the size.

        Raises:
            PolicyError: ``cocoonfs-unexpected``.
        """
        if size_bytes < self.min_size_bytes:
            raise self._refuse("least size", self.min_size_bytes, size_bytes)
        if self.max_size_bytes is not None and size_bytes > self.max_size_bytes:
            raise self._refuse("largest size", self.max_size_bytes, size_bytes)

    def check_creation(self, layout: ImageLayout, salt: bytes, size_bytes: int, aux: AuxMetadata) -> None:
        """Compare everything that an announcement says.

        Raises:
            PolicyError: ``cocoonfs-unexpected``.
        """
        self.check_header(layout, salt)
        self.check_size(size_bytes)
        if self.aux is not None and aux != self.aux:
            raise self._refuse("auxiliary metadata", self.aux.pack(), aux.pack())


ANYTHING = Expected()
