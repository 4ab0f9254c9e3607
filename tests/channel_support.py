# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key exchange over any channel: the kernel's client, a real broker's answers, and what a line does to them.

A `Recording` is one exchange with a real broker, kept: the kernel's side is run again and again with the ephemeral key
of the recording, so that thousands of damaged copies of the broker's answers cost no broker. Whatever the line does,
an `attempt` has one of two ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from svsm.abi.channel import Channel
from svsm.abi.errors import SvsmError
from svsm.abi.platform import AttestationReport
from svsm.crypto.ephemeral import EphemeralKey
from svsm.formats.frames import encode_frame
from svsm.kernel.attestation import AttestationClient
from svsm.kernel.channels.stream import FramedChannel
from tests.key_support import Desk, Relay

__all__ = ["Recording", "attempt", "double", "drop", "honest", "live"]


@dataclasses.dataclass(frozen=True)
class Recording:
    """One exchange.

    Attributes:
        desk: Whose broker it was.
        key: The kernel's ephemeral key.
        evidence: The chip's report.
        answers: The two framed answers, as they were on the line.
        volume_key: What the kernel must get, or nothing.
    """

    desk: Desk
    key: EphemeralKey
    evidence: AttestationReport
    answers: tuple[bytes, bytes]
    volume_key: bytes

    @classmethod
    def make(cls, desk: Desk) -> Recording:
        """Record one."""
        key, relay = EphemeralKey.generate(), desk.relay()
        client = cls._client(desk, key)
        first = relay.negotiate(client.start())
        evidence = desk.chip().report(client.negotiated(first))
        second = relay.attest(client.reported(evidence))
        release = client.answered(second)
        return cls(desk, key, evidence, (encode_frame(first), encode_frame(second)), release.volume_key)

    @staticmethod
    def _client(desk: Desk, key: EphemeralKey) -> AttestationClient:
        return AttestationClient(settings=desk.settings, configuration_json=desk.configuration.to_json(), key=key)

    def client(self) -> AttestationClient:
        """The kernel, with the recording's key."""
        return self._client(self.desk, self.key)

    @property
    def length(self) -> int:
        """Bytes of both answers."""
        return sum(len(answer) for answer in self.answers)

    def replayed(self, mangle: Callable[[bytes], bytes] = bytes) -> Callable[[bytes], bytes]:
        """For a `FarEnd`: the broker's answers one after the other, `mangle` applied to the stream of both.

        A damage in the first answer is on the line before the kernel can ask for the second.
        """
        first, second = self.answers
        damaged = mangle(first + second)
        whole = damaged.startswith(first)
        cut = len(first) if whole else len(first) + len(damaged) - self.length
        waiting = [damaged[:cut], damaged[cut:]]
        return lambda _body: waiting.pop(0) if waiting else b""


def attempt(channel: Channel, recording: Recording, *, deadline: float) -> bytes | SvsmError:
    """The kernel's side: the key, or why there is none. Any other exception is the test's failure."""
    frames, client = FramedChannel(channel), recording.client()
    try:
        frames.send(client.start(), deadline=deadline)
        client.negotiated(frames.receive(deadline=deadline))
        frames.send(client.reported(recording.evidence), deadline=deadline)
        return client.answered(frames.receive(deadline=deadline)).volume_key
    except SvsmError as error:
        return error


def honest(relay: Relay) -> Callable[[bytes], bytes]:
    """For a `FarEnd`: a live broker behind an honest proxy, the run-time channel included."""
    steps = [relay.negotiate, relay.attest]
    return lambda body: encode_frame((steps.pop(0) if steps else relay.channel)(body))


def live(desk: Desk) -> Callable[[bytes], bytes]:
    """`honest` to this desk's broker."""
    return honest(desk.relay())


def drop(position: int) -> Callable[[bytes], bytes]:
    """A line that loses one byte."""
    return lambda data: data[:position] + data[position + 1 :]


def double(position: int) -> Callable[[bytes], bytes]:
    """A line that gives one byte twice."""
    return lambda data: data[: position + 1] + data[position:]
