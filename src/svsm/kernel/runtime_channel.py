# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's end of the run-time channel: sealed requests out, authenticated answers in.

Sans-IO: `request` gives the body of the next frame, `answer` takes the body of one that arrived. Both may be called
from an event loop; nothing here waits. `exchange` is the blocking driver for the boot, where there is nothing else
to do. The host may drop, delay and repeat; it cannot forge, and an answer that it kept for later is recognised by
the number of the request that it answers.
"""

from __future__ import annotations

import time

from svsm.abi.errors import BackendError, ProtocolError
from svsm.crypto.secure_channel import ChannelKeys, Opener, Sealer
from svsm.formats.negotiation import ChannelFrame
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged, Refused, parse_answer
from svsm.kernel.channels.stream import FramedChannel

__all__ = ["RuntimeAnswer", "RuntimeChannel", "exchange"]

RuntimeAnswer = FormattedAcknowledged | Refused

_MAX_STALE_ANSWERS = 16


class RuntimeChannel:
    """One session's channel."""

    def __init__(self, keys: ChannelKeys) -> None:
        self._sealer = Sealer(keys.to_broker)
        self._opener = Opener(keys.to_kernel)
        self._sent = -1

    def request(self, message: Formatted) -> tuple[int, bytes]:
        """Seal a request.

        Returns:
            Its number, and the frame body to send.
        """
        self._sent, sealed = self._sealer.seal(message.pack())
        return self._sent, ChannelFrame(sealed=sealed).pack()

    def answer(self, body: bytes) -> RuntimeAnswer:
        """Open an answer.

        Raises:
            FormatError: ``json-*`` or ``runtime-message``.
            IntegrityError: ``channel-forged`` or ``channel-replayed``.
            ProtocolError: ``channel-unasked`` for an answer to a request that was never made.
        """
        _, plaintext = self._opener.open(ChannelFrame.parse(body).sealed)
        found = parse_answer(plaintext)
        if found.reply_to > self._sent:
            raise ProtocolError("the broker answers a request that was not made", code="channel-unasked")
        return found


def exchange(line: FramedChannel, channel: RuntimeChannel, message: Formatted, *, deadline: float) -> RuntimeAnswer:
    """Send one request and wait for its answer.

    Raises:
        BackendError: ``channel-timeout`` or ``channel-closed``: the answer was withheld.
        Everything that `RuntimeChannel.answer` raises.
    """
    number, body = channel.request(message)
    line.send(body, deadline=deadline)
    for _ in range(_MAX_STALE_ANSWERS):
        found = channel.answer(line.receive(deadline=deadline))
        if found.reply_to == number:
            return found
        if time.monotonic() > deadline:
            break
    raise BackendError("the broker's answer does not come", code="channel-timeout")
