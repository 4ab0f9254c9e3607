# SPDX-License-Identifier: MIT OR Apache-2.0
"""Sessions: challenges that work once, answers waiting to be fetched, run-time channels.

Only sessions that attested take memory, apart from a bit for each challenge that was answered
(`svsm.broker.challenges`); so what is kept is bounded by the number of volumes, and one volume's machine takes no
other's place. A challenge is spent by the first attempt to attest with it, good or bad, so nobody can try evidence
after evidence against one. Channels are kept for the last few sessions of each volume: who attested last is decided
by the database; an older session must still get an authenticated no.

Times are `time.monotonic` seconds, given by the caller.
"""

from __future__ import annotations

import collections
import dataclasses
import threading

from svsm.broker.challenges import CHALLENGE_BYTES, Challenges, unknown_session
from svsm.crypto.secure_channel import ChannelKeys, Opener, Sealer
from svsm.formats.errors import ProtocolError

__all__ = ["CHALLENGE_BYTES", "BrokerChannel", "Limits", "Release", "Sessions"]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How much a broker keeps."""

    challenge_seconds: float = 60.0
    """From /auth to /attest."""
    release_seconds: float = 60.0
    """From /attest to the last fetch of the resource."""
    sessions: int = 1 << 24
    """Challenges given within `challenge_seconds` for which it is remembered, in one bit each, whether they are
    spent; beyond it /attest says that the broker is busy."""
    releases_per_volume: int = 16
    """Answers waiting to be fetched; beyond it the oldest goes."""
    channels_per_volume: int = 4


@dataclasses.dataclass(slots=True, eq=False)
class Release:
    """An answer waiting to be fetched."""

    session: bytes
    volume_id: str
    secret: bytes
    """The JWE's bytes; encrypted to the session's key."""
    expires: float
    recorded: bool = False
    """The audit trail has its line."""


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
        self._challenges = Challenges(seconds=limits.challenge_seconds, room=limits.sessions)
        self._lock = threading.Lock()
        self._releases: dict[bytes, Release] = {}
        self._waiting: dict[str, collections.deque[Release]] = {}
        self._channels: dict[str, collections.deque[BrokerChannel]] = {}
        self._by_session: dict[bytes, BrokerChannel] = {}

    def challenge(self, now: float) -> tuple[bytes, bytes]:
        """A new session and its challenge (16 and 32 bytes); nothing is kept of them."""
        return self._challenges.issue(now)

    def spend(self, session: bytes, now: float) -> bytes:
        """Take the session's challenge; it works once.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-challenge-used``.
            PolicyError: ``broker-busy``.
        """
        with self._lock:
            self._expire(now)
            if session in self._releases:
                # It may be here for longer than its challenge was good.
                raise ProtocolError("this challenge was answered before", code="broker-challenge-used")
        return self._challenges.spend(session, now)

    def attested(self, session: bytes, *, volume_id: str, secret: bytes, keys: ChannelKeys, now: float) -> None:
        """The session may fetch `secret` now, and has a channel."""
        release = Release(session, volume_id, secret, now + self._limits.release_seconds)
        with self._lock:
            self._expire(now)
            waiting = self._waiting.setdefault(volume_id, collections.deque())
            if len(waiting) >= self._limits.releases_per_volume:
                del self._releases[waiting.popleft().session]
            waiting.append(release)
            self._releases[session] = release
            channels = self._channels.setdefault(volume_id, collections.deque())
            if len(channels) >= self._limits.channels_per_volume:
                del self._by_session[channels.popleft().session]
            channel = BrokerChannel(keys, session=session, volume_id=volume_id)
            channels.append(channel)
            self._by_session[session] = channel

    def release(self, session: bytes, now: float) -> Release:
        """The answer for an attested session.

        Raises:
            ProtocolError: ``broker-session-unknown`` or ``broker-not-attested``.
        """
        with self._lock:
            self._expire(now)
            found = self._releases.get(session)
        if found is not None:
            return found
        if not self._challenges.live(session, now):
            raise unknown_session()
        raise ProtocolError("this session has not attested", code="broker-not-attested")

    def channel(self, session: bytes) -> BrokerChannel:
        """The run-time channel of a session.

        Raises:
            ProtocolError: ``broker-session-unknown``.
        """
        with self._lock:
            found = self._by_session.get(session)
        if found is None:
            raise unknown_session()
        return found

    def _expire(self, now: float) -> None:
        for volume_id in [name for name, waiting in self._waiting.items() if waiting[0].expires <= now]:
            waiting = self._waiting[volume_id]
            while waiting and waiting[0].expires <= now:
                del self._releases[waiting.popleft().session]
            if not waiting:
                del self._waiting[volume_id]
