# SPDX-License-Identifier: MIT OR Apache-2.0
"""Challenges that cost nothing to give, and work once.

Whoever can reach a broker can ask it for challenges, as many as he likes. So giving one stores nothing: a session's
16 bytes are a serial number and the time of issue, encrypted as one AES block under a key that lives as long as this
object. To others they look random; forty bits of zero inside tell our own from made-up ones. The challenge is an HMAC
over the session, so it belongs to this session alone, and to know it one must have been given it.

Answering a challenge, well or badly, spends it. That needs memory, but only one bit for each serial number, in pieces
of `_PIECE_BITS` that are kept until the last spent session in them has expired. Nothing spent is ever forgotten
before it expires: where there is no room for another piece, no further challenge is accepted (``broker-busy``). The
room is for more challenges than a broker can give out before they expire, so nobody can fill it over the network.
"""

from __future__ import annotations

import os
import threading

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from svsm.crypto.digests import hmac_sha256
from svsm.formats.errors import PolicyError, ProtocolError
from svsm.formats.release_token import SESSION_BYTES

__all__ = ["CHALLENGE_BYTES", "Challenges", "unknown_session"]

CHALLENGE_BYTES = 32
_SERIAL_BYTES = 5
_MILLISECONDS_BYTES = 6
_CHECK = bytes(SESSION_BYTES - _SERIAL_BYTES - _MILLISECONDS_BYTES)
_PIECE_BITS = 4096


class _Piece:
    """Which of `_PIECE_BITS` consecutive serial numbers are spent."""

    def __init__(self) -> None:
        self.spent = bytearray(_PIECE_BITS // 8)
        self.expires = 0.0


class Challenges:
    """Issues challenges and spends them; safe for threads.

    Args:
        seconds: How long a challenge is good.
        room: For how many serial numbers spent ones are remembered at a time; rounded up to whole pieces.
    """

    def __init__(self, *, seconds: float, room: int) -> None:
        self._seconds = seconds
        self._max_pieces = max(1, -(-room // _PIECE_BITS))
        # One block of distinct plaintexts under a key of its own: ECB is just the block cipher here.
        self._cipher = Cipher(algorithms.AES(os.urandom(32)), modes.ECB())
        self._challenge_key = os.urandom(32)
        self._lock = threading.Lock()
        self._serial = 0
        self._pieces: dict[int, _Piece] = {}

    def issue(self, now: float) -> tuple[bytes, bytes]:
        """A new session and its challenge (16 and 32 bytes)."""
        with self._lock:
            serial = self._serial
            self._serial += 1
        issued = int(now * 1000)
        encryptor = self._cipher.encryptor()
        session = encryptor.update(
            serial.to_bytes(_SERIAL_BYTES, "big") + issued.to_bytes(_MILLISECONDS_BYTES, "big") + _CHECK
        )
        return session, self._challenge(session)

    def live(self, session: bytes, now: float) -> bool:
        """Whether the session is one of ours and its challenge has not expired, spent or not."""
        return self._open(session, now) is not None

    def spend(self, session: bytes, now: float) -> bytes:
        """Take the session's challenge; it works once.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-challenge-used``.
            PolicyError: ``broker-busy``.
        """
        found = self._open(session, now)
        if found is None:
            raise unknown_session()
        serial, expires = found
        with self._lock:
            piece = self._piece(serial // _PIECE_BITS, now)
            place, bit = divmod(serial % _PIECE_BITS, 8)
            if piece.spent[place] & 1 << bit:
                raise ProtocolError("this challenge was answered before", code="broker-challenge-used")
            piece.spent[place] |= 1 << bit
            piece.expires = max(piece.expires, expires)
        return self._challenge(session)

    def _piece(self, number: int, now: float) -> _Piece:
        found = self._pieces.get(number)
        if found is None:
            self._pieces = {key: piece for key, piece in self._pieces.items() if piece.expires > now}
            if len(self._pieces) >= self._max_pieces:
                raise PolicyError("too many challenges were answered within their time", code="broker-busy")
            found = self._pieces[number] = _Piece()
        return found

    def _open(self, session: bytes, now: float) -> tuple[int, float] | None:
        """Serial number and time of expiry; None when it is not ours or has expired."""
        if len(session) != SESSION_BYTES:
            return None
        decryptor = self._cipher.decryptor()
        plain = decryptor.update(session)
        serial = int.from_bytes(plain[:_SERIAL_BYTES], "big")
        expires = int.from_bytes(plain[_SERIAL_BYTES : -len(_CHECK)], "big") / 1000 + self._seconds
        if plain[-len(_CHECK) :] != _CHECK or serial >= self._serial or expires <= now:
            return None
        return serial, expires

    def _challenge(self, session: bytes) -> bytes:
        return hmac_sha256(self._challenge_key, session)


def unknown_session() -> ProtocolError:
    """The error for a session that is not ours, or has expired."""
    return ProtocolError("there is no such session, or it has expired", code="broker-session-unknown")
