# SPDX-License-Identifier: MIT OR Apache-2.0
"""The one JWE of the key exchange: ECDH-ES+A256KW on P-521 with A256GCM (RFC 7516, RFC 7518 §4.6).

By hand, because libraries put `epk` where COCONUT's proxy cannot find it, and because the additional authenticated
data must be the header's bytes as received. Every failure to decrypt is one and the same error.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from svsm.crypto.ephemeral import EphemeralKey
from svsm.crypto.kdf import concat_kdf
from svsm.formats.errors import IntegrityError, SvsmError
from svsm.formats.kbs import Jwe, JweHeader
from svsm.formats.negotiation import Decryption

__all__ = ["decrypt", "encrypt"]

_ALGORITHM = b"ECDH-ES+A256KW"
_KEY_BYTES = 32
_IV_BYTES = 12
_TAG_BYTES = 16


def encrypt(
    plaintext: bytes,
    *,
    recipient_x: bytes,
    recipient_y: bytes,
    sender: EphemeralKey | None = None,
    random: Callable[[int], bytes] = os.urandom,
) -> Jwe:
    """Encrypt to a P-521 key.

    Args:
        plaintext: The secret.
        recipient_x: 66 bytes big-endian.
        recipient_y: 66 bytes big-endian.
        sender: The ephemeral key; by default a fresh one. Never use one twice.
        random: Source of the content key (32 bytes, asked first) and the IV (12 bytes).

    Raises:
        FormatError: ``key-point``.
    """
    sender = sender or EphemeralKey.generate()
    kek = concat_kdf(sender.exchange(recipient_x, recipient_y), algorithm=_ALGORITHM, length=_KEY_BYTES)
    content_key = random(_KEY_BYTES)
    iv = random(_IV_BYTES)
    protected = JweHeader(epk_x=sender.x, epk_y=sender.y).protected()
    sealed = AESGCM(content_key).encrypt(iv, plaintext, protected.encode("ascii"))
    return Jwe(
        protected=protected,
        encrypted_key=aes_key_wrap(kek, content_key),
        iv=iv,
        ciphertext=sealed[:-_TAG_BYTES],
        tag=sealed[-_TAG_BYTES:],
    )


def decrypt(ciphertext: bytes, parts: Decryption, *, key: EphemeralKey) -> bytes:
    """Open what `encrypt` made, as the proxy hands it over.

    The header inside `parts.aad` must be the one that this module writes, up to what a relay's re-serialisation
    leaves equal, and must name the same ephemeral point.

    Raises:
        IntegrityError: ``jwe-decrypt``, whatever the reason.
    """
    try:
        header = JweHeader.parse(parts.aad.decode("ascii", errors="replace"))
        if (header.epk_x, header.epk_y) != (parts.epk_x, parts.epk_y):
            raise IntegrityError("the header names another point", code="jwe-decrypt")
        if len(parts.iv) != _IV_BYTES or len(parts.tag) != _TAG_BYTES or len(parts.wrapped_cek) != _KEY_BYTES + 8:
            raise IntegrityError("a part has the wrong length", code="jwe-decrypt")
        kek = concat_kdf(key.exchange(parts.epk_x, parts.epk_y), algorithm=_ALGORITHM, length=_KEY_BYTES)
        content_key = aes_key_unwrap(kek, parts.wrapped_cek)
        return AESGCM(content_key).decrypt(parts.iv, ciphertext + parts.tag, parts.aad)
    except (SvsmError, InvalidUnwrap, InvalidTag):
        raise IntegrityError("the encrypted secret cannot be opened", code="jwe-decrypt") from None
