# SPDX-License-Identifier: MIT OR Apache-2.0
"""The run-time channel's cryptography: two directions, two keys, strictly rising sequence numbers.

Keys: HKDF over ECDH(kernel ephemeral, broker ephemeral), salted with the hash of what the broker signed. That
token names the challenge, the kernel's key, the volume, the session and the broker's share, so both ends have the
same keys only if they agree on all of that. A sealed message is ``sequence (8 bytes LE) ‖ ciphertext ‖ tag``, nonce
= 4 zero bytes ‖ sequence (8 bytes BE). A receiver accepts only a higher number than the last one: replay and
reordering fail, a lost message may leave a gap (the sender asks again under a new number).
"""

from __future__ import annotations

import dataclasses

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from svsm.crypto.digests import sha256
from svsm.crypto.kdf import CHANNEL_TO_BROKER, CHANNEL_TO_KERNEL, hkdf
from svsm.formats.errors import IntegrityError, StateError
from svsm.formats.record import U64, Record, record

__all__ = ["ChannelKeys", "Opener", "Sealer", "derive_channel_keys"]

_TAG_BYTES = 16
_LAST_SEQUENCE = (1 << 48) - 1


@record(size=8, byte_order="little")
class _Header(Record):
    sequence: U64


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelKeys:
    """One AES-256-GCM key per direction."""

    to_broker: bytes = dataclasses.field(repr=False)
    to_kernel: bytes = dataclasses.field(repr=False)


def derive_channel_keys(z: bytes, *, signing_input: bytes) -> ChannelKeys:
    """Both keys.

    Args:
        z: ECDH of the two ephemeral keys, 66 bytes.
        signing_input: The part of the broker's token that is signed.
    """
    salt = sha256(signing_input)
    return ChannelKeys(
        to_broker=hkdf(z, salt=salt, info=CHANNEL_TO_BROKER),
        to_kernel=hkdf(z, salt=salt, info=CHANNEL_TO_KERNEL),
    )


class Sealer:
    """The sending end of one direction."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._next = 0

    def seal(self, plaintext: bytes) -> tuple[int, bytes]:
        """Encrypt the next message.

        Returns:
            Its sequence number and the sealed bytes.

        Raises:
            StateError: ``channel-exhausted`` after 2^48 messages.
        """
        if self._next > _LAST_SEQUENCE:
            raise StateError("the run-time channel's sequence numbers are used up", code="channel-exhausted")
        sequence = self._next
        self._next += 1
        header = _Header(sequence=sequence).pack()
        return sequence, header + self._cipher.encrypt(_nonce(sequence), plaintext, header)


class Opener:
    """The receiving end of one direction."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._last = -1

    def open(self, sealed: bytes) -> tuple[int, bytes]:
        """Authenticate and decrypt; only then is the sequence number believed.

        Returns:
            The sequence number and the plaintext.

        Raises:
            IntegrityError: ``channel-forged`` when it does not authenticate, ``channel-replayed`` when its number is
                not above the last one.
        """
        if len(sealed) < _Header.SIZE + _TAG_BYTES:
            raise _forged()
        header = sealed[: _Header.SIZE]
        sequence = _Header.parse(header).sequence
        if sequence > _LAST_SEQUENCE:
            raise _forged()
        try:
            plaintext = self._cipher.decrypt(_nonce(sequence), sealed[_Header.SIZE :], header)
        except InvalidTag:
            raise _forged() from None
        if sequence <= self._last:
            raise IntegrityError("a message of the run-time channel came again", code="channel-replayed")
        self._last = sequence
        return sequence, plaintext


def _nonce(sequence: int) -> bytes:
    return bytes(4) + sequence.to_bytes(8, "big")


def _forged() -> IntegrityError:
    return IntegrityError("a message of the run-time channel does not authenticate", code="channel-forged")
