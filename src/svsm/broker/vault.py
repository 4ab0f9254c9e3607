# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vault: volume keys wrapped under one key that lives in a file of its own, never in the database.

Each volume has a wrapping key of its own, derived from the vault key and the volume's id, so that a wrapped key
moved to another row does not open there. AES key wrap (RFC 3394) authenticates what it wraps.
"""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from svsm.crypto.kdf import VAULT_PREFIX, hkdf
from svsm.formats.errors import IntegrityError

__all__ = ["VAULT_KEY_BYTES", "Vault", "new_vault_key"]

VAULT_KEY_BYTES = 32


def new_vault_key() -> bytes:
    """32 random bytes."""
    return os.urandom(VAULT_KEY_BYTES)


class Vault:
    """Wraps and unwraps volume keys."""

    def __init__(self, vault_key: bytes) -> None:
        if len(vault_key) != VAULT_KEY_BYTES:
            raise IntegrityError("the vault key file is damaged", code="broker-vault")
        self._vault_key = vault_key

    def wrap(self, volume_key: bytes, *, volume_id: str) -> bytes:
        """The wrapped key, 8 bytes longer."""
        return aes_key_wrap(self._wrapping_key(volume_id), volume_key)

    def unwrap(self, wrapped: bytes, *, volume_id: str) -> bytes:
        """The volume key.

        Raises:
            IntegrityError: ``broker-vault``.
        """
        try:
            return aes_key_unwrap(self._wrapping_key(volume_id), wrapped)
        except (InvalidUnwrap, ValueError):
            raise IntegrityError(
                "a stored volume key does not open with this vault key",
                code="broker-vault",
                hint="database and vault key file must come from the same broker, of the same backup",
            ) from None

    def _wrapping_key(self, volume_id: str) -> bytes:
        return hkdf(self._vault_key, salt=None, info=VAULT_PREFIX + volume_id.encode())
