# SPDX-License-Identifier: MIT OR Apache-2.0
"""The cryptographic primitives that CocoonFS names by TCG identifier, all from pyca/cryptography.

Everything in the file system that computes a hash, a MAC, a cipher or a checksum goes through here, so that the
measured payload needs neither `hashlib` nor `hmac` of the standard library (they would bind the system's libcrypto).

SHA-1 and TDES exist only behind a flag that whoever makes or opens a volume has to set (`weak` here, `allow_weak`
there). TDES and Camellia are imported only when a volume names them. That keeps nothing out of the measured payload:
the part of pyca/cryptography that they are in is loaded by its own binding anyway.

Two shapes make the file system fast enough in Python: a MAC state prepared once per key and copied per message, and
one long-lived CBC context per key and direction. A CBC decryptor that is fed ``IV || ciphertext`` yields one block
to drop and then the plaintext, whatever it decrypted before; an encryptor that is fed ``random block || plaintext``
yields a uniformly distributed IV and then the ciphertext, which is the format on the disk. Contexts are not
thread-safe; neither is a volume.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import constant_time, hashes, hmac
from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher, CipherContext, algorithms, modes

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer

__all__ = [
    "AES",
    "CBC_MODE_ID",
    "KEYSTREAM_SEED_BYTES",
    "SHA256",
    "TDES",
    "CipherAlgorithm",
    "Crypt",
    "HashAlgorithm",
    "checksum",
    "cipher_algorithm",
    "equal",
    "hash_algorithm",
    "hmac_state",
    "kdf_a",
    "keystream",
]

CBC_MODE_ID = 0x0042
SHA256 = 0x000B
AES = 0x0006
TDES = 0x0003
KEYSTREAM_SEED_BYTES = 48
_BLOCK = 16
_PIECE_BYTES = 1 << 16  # small enough for the processor's cache: fresh memory costs more than the cipher
_SWAP_PAIRS = bytes(((b & 0x55) << 1) | ((b & 0xAA) >> 1) for b in range(256))


class HashAlgorithm(NamedTuple):
    """A hash: TCG identifier, digest length in bytes, how to make it, whether it is weak."""

    tcg_id: int
    digest_bytes: int
    make: Callable[[], hashes.HashAlgorithm]
    weak: bool = False

    def digest(self, *parts: Buffer) -> bytes:
        """The hash of the parts' concatenation."""
        state = hashes.Hash(self.make())
        for part in parts:
            state.update(part)
        return state.finalize()


_HASHES = {
    algorithm.tcg_id: algorithm
    for algorithm in (
        HashAlgorithm(0x0004, 20, hashes.SHA1, weak=True),
        HashAlgorithm(0x000B, 32, hashes.SHA256),
        HashAlgorithm(0x000C, 48, hashes.SHA384),
        HashAlgorithm(0x000D, 64, hashes.SHA512),
        HashAlgorithm(0x0012, 32, hashes.SM3),
        HashAlgorithm(0x0027, 32, hashes.SHA3_256),
        HashAlgorithm(0x0028, 48, hashes.SHA3_384),
        HashAlgorithm(0x0029, 64, hashes.SHA3_512),
    )
}


@cache
def _hash_works(tcg_id: int) -> bool:
    """Known here, and not left out of the OpenSSL that is used."""
    try:
        return tcg_id in _HASHES and bool(_HASHES[tcg_id].digest(b""))
    except UnsupportedAlgorithm:
        return False


def hash_algorithm(tcg_id: int) -> HashAlgorithm:
    """The hash with this TCG identifier.

    Raises:
        FormatError: ``cocoonfs-unsupported-hash``.
    """
    if not _hash_works(tcg_id):
        raise FormatError("this volume uses a hash that is not supported", code="cocoonfs-unsupported-hash", got=tcg_id)
    return _HASHES[tcg_id]


def hmac_state(algorithm: HashAlgorithm, key: bytes) -> hmac.HMAC:
    """A MAC state to `copy` once per message."""
    return hmac.HMAC(key, algorithm.make())


def _camellia(key: bytes) -> BlockCipherAlgorithm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cryptography.hazmat.decrepit.ciphers.algorithms import Camellia

        return Camellia(key)


def _triple_des(key: bytes) -> BlockCipherAlgorithm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES

        return TripleDES(key if len(key) == 24 else key + key[:8])


_CIPHERS: dict[tuple[int, int], Callable[[bytes], BlockCipherAlgorithm]] = {
    (0x0006, 128): algorithms.AES,
    (0x0006, 192): algorithms.AES,
    (0x0006, 256): algorithms.AES,
    (TDES, 128): _triple_des,
    (TDES, 192): _triple_des,
    (0x0013, 128): algorithms.SM4,
    (0x0026, 128): _camellia,
    (0x0026, 192): _camellia,
    (0x0026, 256): _camellia,
}


class Crypt:
    """Encryption or decryption on one long-lived context.

    Attributes:
        block_bytes: Block and IV length.
    """

    __slots__ = ("_context", "_skip", "block_bytes")

    def __init__(self, context: CipherContext, block_bytes: int, skip: int) -> None:
        self._context, self.block_bytes, self._skip = context, block_bytes, skip

    def __call__(self, data: Buffer) -> bytes:
        """The next bytes, without the first block where that is of no use."""
        return self._context.update(data)[self._skip :]

    def feed(self, data: Buffer, sink: BytesIO) -> None:
        """Append what comes of more data to a sink, all of it: what was fed before it counts as the IV."""
        view = memoryview(data)
        scratch = bytearray(min(len(view), _PIECE_BYTES) + self.block_bytes)
        for at in range(0, len(view), _PIECE_BYTES):
            count = self._context.update_into(view[at : at + _PIECE_BYTES], scratch)
            sink.write(memoryview(scratch)[:count])


class CipherAlgorithm(NamedTuple):
    """A block cipher in CBC mode: TCG identifier and key size in bits."""

    tcg_id: int
    key_bits: int

    @property
    def weak(self) -> bool:
        """Whether it needs the flag for weak choices."""
        return self.tcg_id == TDES

    @property
    def key_bytes(self) -> int:
        """Key length in bytes."""
        return self.key_bits // 8

    @property
    def block_bytes(self) -> int:
        """Block and IV length in bytes."""
        return 8 if self.tcg_id == TDES else _BLOCK

    @property
    def encoded(self) -> bytes:
        """How the format writes the pair: two big-endian u16."""
        return self.tcg_id.to_bytes(2, "big") + self.key_bits.to_bytes(2, "big")

    def _cbc(self, key: bytes, iv: bytes) -> Cipher[modes.ModeWithInitializationVector]:
        return Cipher(_CIPHERS[self.tcg_id, self.key_bits](key), modes.CBC(iv))

    def decryptor(self, key: bytes) -> Crypt:
        """A function ``IV || ciphertext -> plaintext`` on one long-lived context; both multiples of the block."""
        block = self.block_bytes
        return Crypt(self._cbc(key, bytes(block)).decryptor(), block, block)

    def encryptor(self, key: bytes) -> Crypt:
        """A function ``random block || plaintext -> IV || ciphertext`` on one long-lived context."""
        block = self.block_bytes
        return Crypt(self._cbc(key, bytes(block)).encryptor(), block, 0)

    def encrypt_with_iv(self, key: bytes, iv: bytes, plaintext: bytes) -> bytes:
        """CBC with a given IV, whole blocks."""
        return self._cbc(key, iv).encryptor().update(plaintext)

    def encrypt_single_blocks(self, key: bytes, plaintext: bytes) -> bytes:
        """Each block by itself (the format makes the IVs of staging copies so)."""
        cipher = Cipher(_CIPHERS[self.tcg_id, self.key_bits](key), modes.ECB())
        return cipher.encryptor().update(plaintext)


@cache
def _cipher_works(tcg_id: int, key_bits: int) -> bool:
    """Known here, and not left out of the OpenSSL, or of the measured payload, that is used."""
    try:
        return (tcg_id, key_bits) in _CIPHERS and callable(
            CipherAlgorithm(tcg_id, key_bits).encryptor(bytes(key_bits // 8))
        )
    except (UnsupportedAlgorithm, ImportError):
        return False


def cipher_algorithm(tcg_id: int, key_bits: int) -> CipherAlgorithm:
    """The cipher with this TCG identifier and key size.

    Raises:
        FormatError: ``cocoonfs-unsupported-cipher``.
    """
    if not _cipher_works(tcg_id, key_bits):
        raise FormatError(
            "this volume uses a cipher that is not supported",
            code="cocoonfs-unsupported-cipher",
            got=tcg_id,
            key_bits=key_bits,
        )
    return CipherAlgorithm(tcg_id, key_bits)


def kdf_a(algorithm: HashAlgorithm, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa of TPM 2.0 part 1 (SP 800-108 counter mode), with the separator byte after the label.

    Returns:
        ``bits // 8`` bytes.
    """
    base = hmac_state(algorithm, key)
    out = b""
    counter = 0
    while len(out) < bits // 8:
        counter += 1
        state = base.copy()
        state.update(counter.to_bytes(4, "big") + label + b"\0" + context + bits.to_bytes(4, "big"))
        out += state.finalize()
    return out[: bits // 8]


def keystream(seed: bytes) -> Callable[[int], bytes]:
    """A function that gives the next so many random-looking bytes: AES-256 in counter mode, several times as fast as
    the system's random numbers.

    Args:
        seed: `KEYSTREAM_SEED_BYTES` random bytes.
    """
    update = Cipher(algorithms.AES(seed[:32]), modes.CTR(seed[32:])).encryptor().update
    return lambda length: update(bytes(length))


def checksum(data: Buffer) -> bytes:
    """The format's 8-byte checksum: CRC-32 of the data, then of the data with neighbouring bits swapped."""
    swapped = bytes(data).translate(_SWAP_PAIRS)
    return zlib.crc32(data).to_bytes(4, "little") + zlib.crc32(swapped).to_bytes(4, "little")


def equal(left: bytes, right: bytes) -> bool:
    """Comparison in constant time."""
    return constant_time.bytes_eq(left, right)
