# SPDX-License-Identifier: MIT OR Apache-2.0
"""The three shapes of encrypted things: a block, a list of extents, a chain of extents.

* A *block* has a known payload length: ``IV | ciphertext`` (bitmap blocks, index nodes).
* *Extents* hold a file: one CBC stream over all of them, PKCS#7 behind the data, zeros behind that.
* *Chained extents* hold what must be found from one pointer (extents lists, the journal's log): each plaintext starts
  with a pointer to the next extent; in the authenticated flavour each extent carries a tag that covers the previous.

Decryption here is never the first thing that looks at hostile bytes: callers authenticate, or pass the MAC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import NamedTuple

from cryptography.hazmat.primitives.hmac import HMAC

from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.record import Buffer
from svsm.storage.cocoonfs.encoding import (
    Extent,
    decode_extent_pointer,
    encode_extent_pointer,
)
from svsm.storage.cocoonfs.layout import ImageLayout, Subject
from svsm.storage.cocoonfs.primitives import Crypt, equal

__all__ = [
    "Chain",
    "Crypt",
    "authentication_failure",
    "block_payload_bytes",
    "decrypt_block",
    "decrypt_extents",
    "encrypt_block",
    "encrypt_extents",
    "extents_bytes_needed",
    "strip_padding",
]

Random = Callable[[int], bytes]
_LARGEST_BLOCK = 16
_TAIL_BYTES = 4096


def authentication_failure(stage: str, **details: int) -> IntegrityError:
    """The one error for everything that does not authenticate; the stage is for the owner's log only."""
    return IntegrityError(
        "the volume does not authenticate: wrong key, or its contents were changed",
        code="cocoonfs-authentication",
        hint="check that key and volume belong together; a volume that was changed cannot be repaired",
        stage=stage,
        **details,
    )


def _padding_is_wrong(what: str) -> FormatError:
    return FormatError("padding behind a plaintext is malformed", code="cocoonfs-format", field=what)


def block_payload_bytes(block_bytes: int, cipher_block_bytes: int) -> int:
    """How many bytes of plaintext an encrypted block of this size holds."""
    return (block_bytes - cipher_block_bytes) // cipher_block_bytes * cipher_block_bytes


def decrypt_block(decrypt: Crypt, data: bytes) -> bytes:
    """The plaintext of a block."""
    iv_bytes = decrypt.block_bytes
    pad = (len(data) - iv_bytes) % iv_bytes
    return decrypt(data if not pad else data[:iv_bytes] + data[iv_bytes + pad :])


def encrypt_block(encrypt: Crypt, payload: bytes, block_bytes: int, random: Random) -> bytes:
    """A whole block; `payload` is filled up with zeros."""
    iv_bytes = encrypt.block_bytes
    pad = (block_bytes - iv_bytes) % iv_bytes
    sealed = encrypt(random(iv_bytes) + payload.ljust(block_payload_bytes(block_bytes, iv_bytes), b"\0"))
    return sealed if not pad else sealed[:iv_bytes] + random(pad) + sealed[iv_bytes:]


def strip_padding(plaintext: bytes, what: str) -> bytes:
    """A plaintext without its padding, or what its last few bytes are without it.

    Raises:
        FormatError: ``cocoonfs-format``.
    """
    stripped = plaintext.rstrip(b"\0")
    if not stripped:
        raise _padding_is_wrong(what)
    count = stripped[-1]
    if count > _LARGEST_BLOCK or stripped[-count:] != bytes([count]) * count:
        raise _padding_is_wrong(what)
    return stripped[:-count]


def _pad(data: bytes, total_bytes: int, cipher_block_bytes: int) -> bytes:
    count = cipher_block_bytes - len(data) % cipher_block_bytes
    return (data + bytes([count]) * count).ljust(total_bytes, b"\0")


def extents_bytes_needed(length: int, cipher_block_bytes: int) -> int:
    """Bytes of extents that data of this length needs, IV and padding included."""
    return 2 * cipher_block_bytes + length - length % cipher_block_bytes


def _stripped(sink: BytesIO, what: str) -> bytes:
    """The same for a plaintext in a sink, which may be large; it is not copied."""
    end = sink.tell()
    with sink.getbuffer() as view:
        while end > 0 and not bytes(view[max(end - _TAIL_BYTES, 0) : end]).rstrip(b"\0"):
            end -= _TAIL_BYTES
        begin = max(end - _TAIL_BYTES - _LARGEST_BLOCK, 0)
        kept = strip_padding(bytes(view[begin : max(end, 0)]), what)
    sink.truncate(begin + len(kept))
    return sink.getvalue()


def decrypt_extents(decrypt: Crypt, pieces: Iterable[Buffer]) -> bytes:
    """A file's contents from the contents of its extents.

    Args:
        decrypt: Of the file's key.
        pieces: The contents, end to end, cut anywhere between cipher blocks behind the first one.

    Raises:
        FormatError: ``cocoonfs-format``.
    """
    sink = BytesIO()
    iv_bytes = decrypt.block_bytes
    for piece in pieces:
        if iv_bytes:
            decrypt(memoryview(piece)[:iv_bytes])
        decrypt.feed(memoryview(piece)[iv_bytes:], sink)
        iv_bytes = 0
    return _stripped(sink, "file")


def encrypt_extents(encrypt: Crypt, data: bytes, total_bytes: int, random: Random) -> bytes:
    """What to lay into a file's extents, end to end (every extent is a multiple of the cipher block)."""
    sink = BytesIO()
    block = encrypt.block_bytes
    whole = len(data) - len(data) % block
    encrypt.feed(random(block), sink)
    encrypt.feed(memoryview(data)[:whole], sink)
    encrypt.feed(_pad(data[whole:], total_bytes - block - whole, block), sink)
    return sink.getvalue()


class Chain(NamedTuple):
    """How one kind of chained extents is read and written.

    Attributes:
        layout: The configuration.
        header_bytes: Length of the plaintext header in the first extent.
        mac: State for the tags, or None for the flavour without.
        context: Associated data that every tag covers.
        what: For messages.
    """

    layout: ImageLayout
    header_bytes: int
    mac: HMAC | None
    context: bytes
    what: str

    @property
    def tag_bytes(self) -> int:
        """Length of each tag; 0 without authentication."""
        return 0 if self.mac is None else self.layout.preauth_hash.digest_bytes

    @property
    def _iv_bytes(self) -> int:
        return self.layout.cipher.block_bytes

    def _front(self, first: bool) -> int:
        return self.header_bytes + self.tag_bytes + self._iv_bytes if first else self.tag_bytes

    def capacity(self, extent_bytes: int, *, first: bool) -> int:
        """Payload bytes in an extent that is followed by another (the last one holds one byte less)."""
        return max(0, (extent_bytes - self._front(first)) // self._iv_bytes * self._iv_bytes - 8)

    def _tag(self, parts: Sequence[bytes], *, first: bool) -> bytes:
        if self.mac is None:
            return b""
        state = self.mac.copy()
        for part in parts:
            state.update(part)
        state.update(self.context + len(self.context).to_bytes(8, "little") + self.layout.cipher.encoded)
        state.update((b"\0" if first else b"\1") + Subject.CHAINED_EXTENTS)
        return state.finalize()

    def encode(
        self, encrypt: Crypt, header: bytes, payload: bytes, extents: Sequence[Extent], random: Random
    ) -> list[bytes]:
        """The contents of each extent; they must have room for the payload and a byte more."""
        contents: list[bytes] = []
        iv = tag = b""
        offset = 0
        for index, (_, length_ab) in enumerate(extents):
            first, last = index == 0, index == len(extents) - 1
            size = length_ab * self.layout.ab_bytes
            body = (size - self._front(first)) // self._iv_bytes * self._iv_bytes
            chunk = payload[offset : offset + self.capacity(size, first=first)]
            offset += len(chunk)
            plain = encode_extent_pointer(None if last else extents[index + 1]) + chunk
            plain = _pad(plain, body, encrypt.block_bytes) if last else plain
            if len(plain) != body:
                raise FormatError("a chain has no room for its payload", code="cocoonfs-format", field=self.what)
            # The context's chaining value carries over from extent to extent, so only the first draws an IV.
            sealed = encrypt(random(self._iv_bytes) + plain) if first else encrypt(plain)
            pad = random((size - self._front(first)) % self._iv_bytes)
            if first:
                iv, sealed = sealed[: self._iv_bytes], sealed[self._iv_bytes :]
                tag = self._tag((header, bytes(self.tag_bytes), iv, pad, sealed), first=True)
                contents.append(header + tag + iv + pad + sealed)
            else:
                tag = self._tag((tag, pad, sealed, iv), first=False)
                contents.append(tag + pad + sealed)
            iv = sealed[-self._iv_bytes :]
        return contents

    def decode(
        self,
        decrypt: Crypt,
        head: Extent,
        read: Callable[[Extent], bytes],
        *,
        limit_ab: int,
    ) -> tuple[bytes, list[Extent]]:
        """Payload and extents of a chain.

        Args:
            decrypt: Of the chain's key.
            head: The first extent.
            read: Gives the contents of an extent; authenticates them where the chain does not.
            limit_ab: The image's end; also bounds the chain, which cannot visit a block twice.

        Raises:
            IntegrityError: ``cocoonfs-authentication``.
            FormatError: ``cocoonfs-format``.
        """
        payload = bytearray()
        extents: list[Extent] = []
        seen: set[int] = set()
        iv = tag = b""
        following: Extent | None = head
        while following is not None:
            extent, first = following, not extents
            if extent[0] in seen:
                raise FormatError("a chain of extents runs in a circle", code="cocoonfs-format", field=self.what)
            seen.add(extent[0])
            extents.append(extent)
            data = read(extent)
            plain, iv, tag = self._open(decrypt, data, iv, tag, first=first)
            pointer = decode_extent_pointer(plain[:8], limit_ab=limit_ab)
            if pointer is None:
                payload += strip_padding(plain, self.what)[8:]
                following = None
                continue
            if pointer[1]:
                raise FormatError("a chain has an indirect pointer", code="cocoonfs-format", field=self.what)
            payload += plain[8:]
            following = pointer[0]
        return bytes(payload), extents

    def _open(self, decrypt: Crypt, data: bytes, iv: bytes, tag: bytes, *, first: bool) -> tuple[bytes, bytes, bytes]:
        front = self._front(first)
        pad_bytes = (len(data) - front) % self._iv_bytes
        sealed = data[front + pad_bytes :]
        if len(data) < front + self._iv_bytes:
            raise FormatError("an extent of a chain is too short", code="cocoonfs-format", field=self.what)
        pad = data[front : front + pad_bytes]
        if first:
            header = data[: self.header_bytes]
            found = data[self.header_bytes : self.header_bytes + self.tag_bytes]
            iv = data[front - self._iv_bytes : front]
            made = self._tag((header, bytes(self.tag_bytes), iv, pad, sealed), first=True)
        else:
            found = data[: self.tag_bytes]
            made = self._tag((tag, pad, sealed, iv), first=False)
        if not equal(found, made):
            raise authentication_failure(self.what)
        return decrypt(iv + sealed), sealed[-self._iv_bytes :], found
