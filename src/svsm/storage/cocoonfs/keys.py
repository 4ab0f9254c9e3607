# SPDX-License-Identifier: MIT OR Apache-2.0
"""Key derivation: external key and salt to the root key, root key to one subkey per use.

`Keys` hands out prepared MAC states and cipher contexts, never key bytes that somebody must hold on to; what it
derived once it keeps (one context costs more than the block it is used for).
"""

from __future__ import annotations

from cryptography.hazmat.primitives.hmac import HMAC

from svsm.storage.cocoonfs.layout import BITMAP_INODE, INDEX_INODE, MAGIC, ImageLayout, StaticHeader
from svsm.storage.cocoonfs.primitives import CBC_MODE_ID, Crypt, hash_algorithm, hmac_state, kdf_a

__all__ = ["BITMAP_DOMAIN", "COUNTER_DOMAIN", "INDEX_DOMAIN", "JOURNAL_DOMAIN", "Keys"]

BITMAP_DOMAIN = BITMAP_INODE
INDEX_DOMAIN = INDEX_INODE
JOURNAL_DOMAIN = 5
COUNTER_DOMAIN = 6

_TREE_DOMAIN = 1
_EXTENTS_LIST, _DATA = 1, 2
_DERIVATION, _AUTH_ROOT, _AUTH_DATA, _PREAUTH, _ENCRYPTION = (bytes([n]) for n in range(1, 6))
_SHA512 = 0x000D
_KEPT_CONTEXTS = 256


def _root_key(key: bytes, header: StaticHeader) -> bytes:
    layout = header.layout
    ids = (
        layout.kdf_hash,
        layout.auth_tree_root_hmac_hash,
        layout.auth_tree_node_hash,
        layout.auth_tree_data_hmac_hash,
        layout.preauth_hmac_hash,
        CBC_MODE_ID,
    )
    context = (
        MAGIC
        + b"\x01"
        + b"".join(number.to_bytes(2, "big") for number in ids)
        + layout.cipher.encoded
        + bytes([len(header.salt)])
        + header.salt
    )
    bits = 8 * hash_algorithm(layout.kdf_hash).digest_bytes
    return kdf_a(hash_algorithm(_SHA512), key, _DERIVATION, context, bits)


class Keys:
    """All keys of one volume."""

    def __init__(self, key: bytes, header: StaticHeader) -> None:
        self._layout: ImageLayout = header.layout
        self._root = _root_key(key, header)
        layout = self._layout
        bits = 8 * layout.data_hash.digest_bytes
        self.data_mac: HMAC = hmac_state(layout.data_hash, self._subkey(_TREE_DOMAIN, 0, _AUTH_DATA, bits))
        bits = 8 * layout.root_hash.digest_bytes
        self.root_mac: HMAC = hmac_state(layout.root_hash, self._subkey(_TREE_DOMAIN, 0, _AUTH_ROOT, bits))
        self._contexts: dict[tuple[int, bool, bool], Crypt] = {}
        self._macs: dict[tuple[int, int], HMAC] = {}

    def __repr__(self) -> str:
        return "Keys(…)"

    def _subkey(self, domain: int, subdomain: int, purpose: bytes, bits: int) -> bytes:
        context = domain.to_bytes(8, "little") + subdomain.to_bytes(4, "little")
        return kdf_a(hash_algorithm(self._layout.kdf_hash), self._root, purpose, context, bits)

    def encryption_key(self, domain: int, *, extents_list: bool = False) -> bytes:
        """The encryption subkey itself, for the one use that needs a fixed IV."""
        subdomain = _EXTENTS_LIST if extents_list else _DATA
        return self._subkey(domain, subdomain, _ENCRYPTION, self._layout.cipher_key_bits)

    def _context(self, domain: int, extents_list: bool, encrypt: bool) -> Crypt:
        name = (domain, extents_list, encrypt)
        if name not in self._contexts:
            if len(self._contexts) >= _KEPT_CONTEXTS:
                self._contexts.clear()
            key = self.encryption_key(domain, extents_list=extents_list)
            cipher = self._layout.cipher
            self._contexts[name] = cipher.encryptor(key) if encrypt else cipher.decryptor(key)
        return self._contexts[name]

    def decryptor(self, domain: int, *, extents_list: bool = False) -> Crypt:
        """``IV || ciphertext -> plaintext`` under the subkey of `domain` (an inode number)."""
        return self._context(domain, extents_list, False)

    def encryptor(self, domain: int, *, extents_list: bool = False) -> Crypt:
        """``random block || plaintext -> IV || ciphertext`` under the subkey of `domain`."""
        return self._context(domain, extents_list, True)

    def preauth_mac(self, domain: int, *, extents_list: bool = False) -> HMAC:
        """A fresh MAC state for what is decrypted before the tree is known."""
        name = (domain, _EXTENTS_LIST if extents_list else _DATA)
        if name not in self._macs:
            bits = 8 * self._layout.preauth_hash.digest_bytes
            self._macs[name] = hmac_state(self._layout.preauth_hash, self._subkey(*name, _PREAUTH, bits))
        return self._macs[name].copy()
