# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sessions in memory: challenges that work once, answers waiting to be fetched, run-time channels.

Everything is bounded and everything expires. A challenge is spent by the first attempt to attest with it, good or
bad, so nobody can try evidence after evidence against one. Channels are kept for the last few sessions of each
volume: who attested last is decided by the database; an older session must still get an authenticated no.

Times are `time.monotonic` seconds, given by the caller.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import os
import threading

from svsm.crypto.secure_channel import ChannelKeys, Opener, Sealer
from svsm.formats.errors import PolicyError, ProtocolError
from svsm.formats.release_token import SESSION_BYTES

__all__ = ["CHALLENGE_BYTES", "BrokerChannel", "Limits", "Sessions"]

CHALLENGE_BYTES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How much a broker keeps."""

    challenge_seconds: float = 60.0
    """From /auth to /attest."""
    release_seconds: float = 60.0
    """From /attest to the last fetch of the resource."""
    sessions: int = 4096
    """Not expired, of all kinds; beyond it /auth says that the broker is busy."""
    channels_per_volume: int = 4


class _Kind(enum.Enum):
    CHALLENGED = enum.auto()
    SPENT = enum.auto()
    ATTESTED = enum.auto()


@dataclasses.dataclass(slots=True)
class _Session:
    kind: _Kind
    expires: float
    challenge: bytes = b""
    volume_id: str = ""
    secret: bytes = b""
    """The JWE's bytes; encrypted to the session's key."""


class BrokerChannel:
    """The broker's end of one run-time channel; use under its lock."""

    def __init__(self, keys: ChannelKeys, *, session: bytes, volume_id: str) -> None:
        self.opener = Opener(keys.to_broker)
        self.sealer = Sealer(keys.to_kernel)
        self.session = session
        self.volume_id = volume_id
        self.lock = threading.Lock()


class Sessions:
    """All sessions of one broker; safe for threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._sessions: dict[bytes, _Session] = {}
        self._channels: dict[str, collections.deque[BrokerChannel]] = {}
        self._by_session: dict[bytes, BrokerChannel] = {}

    def challenge(self, now: float) -> tuple[bytes, bytes]:
        """A new session and its challenge (16 and 32 random bytes).

        Raises:
            PolicyError: ``broker-busy``.
        """
        with self._lock:
            self._expire(now)
            if len(self._sessions) >= self._limits.sessions:
                raise PolicyError("the broker has too many open sessions", code="broker-busy")
            session, challenge = os.urandom(SESSION_BYTES), os.urandom(CHALLENGE_BYTES)
            self._sessions[session] = _Session(
                _Kind.CHALLENGED, now + self._limits.challenge_seconds, challenge=challenge
            )
            return session, challenge

    def spend(self, session: bytes, now: float) -> bytes:
        """Take the session's challenge; it works once.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-challenge-used``.
        """
        with self._lock:
            found = self._live(session, now)
            if found.kind is not _Kind.CHALLENGED:
                raise ProtocolError("this challenge was answered before", code="broker-challenge-used")
            found.kind = _Kind.SPENT
            return found.challenge

    def attested(self, session: bytes, *, volume_id: str, secret: bytes, keys: ChannelKeys, now: float) -> None:
        """The session may fetch `secret` now, and has a channel."""
        with self._lock:
            self._sessions[session] = _Session(
                _Kind.ATTESTED, now + self._limits.release_seconds, volume_id=volume_id, secret=secret
            )
            channels = self._channels.setdefault(volume_id, collections.deque())
            if len(channels) >= self._limits.channels_per_volume:
                del self._by_session[channels.popleft().session]
            channel = BrokerChannel(keys, session=session, volume_id=volume_id)
            channels.append(channel)
            self._by_session[session] = channel

    def secret(self, session: bytes, now: float) -> tuple[str, bytes]:
        """Volume id and JWE of an attested session.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-not-attested``.
        """
        with self._lock:
            found = self._live(session, now)
            if found.kind is not _Kind.ATTESTED:
                raise ProtocolError("this session has not attested", code="broker-not-attested")
            return found.volume_id, found.secret

    def channel(self, session: bytes) -> BrokerChannel:
        """The run-time channel of a session.

        Raises:
            ProtocolError: ``broker-session-unknown``.
        """
        with self._lock:
            found = self._by_session.get(session)
        if found is None:
            raise _unknown()
        return found

    def _live(self, session: bytes, now: float) -> _Session:
        self._expire(now)
        found = self._sessions.get(session)
        if found is None:
            raise _unknown()
        return found

    def _expire(self, now: float) -> None:
        for session in [name for name, found in self._sessions.items() if found.expires <= now]:
            del self._sessions[session]


def _unknown() -> ProtocolError:
    return ProtocolError("there is no such session, or it has expired", code="broker-session-unknown")
