# SPDX-License-Identifier: MIT OR Apache-2.0
"""One connection of a kernel: negotiation, attestation, then channel frames until either side ends.

                         broken peer
    negotiating ──────────────────────────▶ closed
        │ challenge from /auth
        ▼                 refusal or bad broker
    attesting ─────────────────────────────▶ failure frame, then as `attested`
        │ token from /attest, JWE from /resource
        ▼
    attested ── channel frame (if negotiated) ──▶ /svsm/v0/channel ──▶ answer

Frames are those of COCONUT's proxy byte for byte, for a kernel that names no extension: a kernel cannot tell the
two apart, except where COCONUT's would end its process. Then this one answers the failure frame if a frame is due
(attestation), and closes the connection if none could be understood (negotiation).
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import time

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.frames import FrameDecoder, encode_frame
from svsm.formats.kbs import AttestRequest
from svsm.formats.negotiation import (
    CHANNEL_EXTENSION,
    AttestationAnswer,
    AttestationRequest,
    ChannelFrame,
    NegotiationAnswer,
    NegotiationRequest,
)
from svsm.host.proxy.kbs_client import KbsClient

__all__ = ["Limits", "relay"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost."""

    frame_bytes: int = 1 << 20
    handshake_s: float = 30.0
    """From the connection, and again from the challenge, to the whole frame that is due."""
    partial_frame_s: float = 30.0
    """From the first byte of a channel frame to its last; between frames a kernel may be silent for ever."""
    exchange_s: float = 30.0
    """One HTTP exchange."""
    connections: int = 64
    ignored_bytes: int = 1 << 20
    """What a kernel without the channel may still send after its answer, before the connection is cut."""


class _Frames:
    """Whole frames from a socket, each before a deadline."""

    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self._connection = connection
        self._decoder = FrameDecoder(max_bytes=limits.frame_bytes)
        self._limits = limits
        self._ready: list[bytes] = []

    def next(self, *, within_s: float | None) -> bytes | None:
        """The next frame's body, or None at the end of the stream.

        Args:
            within_s: Time for the whole frame; None waits for its first byte without limit.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        while not self._ready:
            if deadline is None and self._decoder.pending_bytes:
                deadline = time.monotonic() + self._limits.partial_frame_s
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise BackendError("the kernel sends nothing", code="proxy-kernel-silent")
            self._connection.settimeout(remaining)
            try:
                data = self._connection.recv(65536)
            except TimeoutError:
                continue
            if not data:
                self._decoder.finish()
                return None
            self._ready += self._decoder.feed(data)
        return self._ready.pop(0)

    def send(self, body: bytes) -> None:
        self._connection.settimeout(self._limits.handshake_s)
        self._connection.sendall(encode_frame(body, max_bytes=self._limits.frame_bytes))


def relay(connection: socket.socket, url: str, limits: Limits) -> None:
    """Carry one connection to its end. Returns when it is over; the caller closes the socket.

    Raises:
        SvsmError: What ended it early; already told to the kernel where the wire has a way to say it.
        OSError: The kernel's side broke.
    """
    client = KbsClient(url, timeout_s=limits.exchange_s)
    frames = _Frames(connection, limits)
    try:
        body = frames.next(within_s=limits.handshake_s)
        if body is None:
            return
        extensions = NegotiationRequest.parse(body).extensions
        agreed = (CHANNEL_EXTENSION,) if CHANNEL_EXTENSION in extensions else ()
        frames.send(NegotiationAnswer(challenge=client.authenticate(), extensions=agreed).pack())
        body = frames.next(within_s=limits.handshake_s)
        if body is None:
            return
        answer = _attest(client, body, tell_reason=bool(agreed))
        frames.send(answer.pack())
        if agreed and answer.success:
            _relay_channel(frames, client)
        else:
            _drain(connection, limits)
    finally:
        client.close()


def _attest(client: KbsClient, body: bytes, *, tell_reason: bool) -> AttestationAnswer:
    try:
        token = client.attest(AttestRequest.from_attestation(AttestationRequest.parse(body)))
        jwe = client.resource()
        return AttestationAnswer(success=True, secret=jwe.ciphertext, decryption=jwe.decryption(), token=token)
    except SvsmError as refused:
        _log.warning("attestation failed: %s", refused)
        reason = refused.details.get("reason") if refused.code == "proxy-refused" else refused.code
        told = reason if tell_reason and isinstance(reason, str) else None
        return AttestationAnswer(success=False, reason=told)


def _relay_channel(frames: _Frames, client: KbsClient) -> None:
    while (body := frames.next(within_s=None)) is not None:
        frames.send(ChannelFrame(client.channel(ChannelFrame.parse(body).sealed)).pack())


def _drain(connection: socket.socket, limits: Limits) -> None:
    left = limits.ignored_bytes
    connection.settimeout(limits.handshake_s)
    while left > 0:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            return
        if not data:
            return
        left -= len(data)
