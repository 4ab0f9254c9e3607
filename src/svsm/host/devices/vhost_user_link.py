# SPDX-License-Identifier: MIT OR Apache-2.0
"""The host's conversation with a vhost-user back-end: messages out with their descriptors, replies in, in order.

The host waits for each answer: nothing else of a disk's device can go on meanwhile. An exchange has one deadline. What
the back-end may answer is judged by `svsm.formats.vhost_user_messages`; a reply that is wrong, late or absent ends the
link, because in a stream there is no way to find the next message.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Final

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.vhost_user import (
    ConfigHeader,
    MemoryRegion,
    MessageHeader,
    ProtocolFeature,
    Request,
    U64Payload,
    VringState,
)
from svsm.formats.vhost_user_messages import (
    choose_protocol_features,
    demand_protocol_features,
    encode,
    get_config,
    judge_acknowledgement,
    judge_config,
    judge_header,
    judge_queues,
    judge_vring,
    memory_table,
)

__all__ = ["BackendLink"]

_ANSWER_SECONDS: Final = 5.0


class BackendLink:
    """One connection to a back-end.

    Args:
        connection: A connected stream socket; owned.
        seconds: How long one exchange may take.

    Every method raises `BackendError` (``vhost-user-gone``) or `ProtocolError` (``vhost-user-…``); there is nothing to
    be done with the link then but to close it.
    """

    def __init__(self, connection: socket.socket, *, seconds: float = _ANSWER_SECONDS) -> None:
        self._socket = connection
        self._seconds = seconds
        self._acknowledged = False
        self.queues = 1

    def fileno(self) -> int:
        """Readable when the back-end has hung up, or speaks without having been asked; -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    # ---- what there is to say ---------------------------------------------------------------------------------------

    def introduce(self, region: MemoryRegion, memory: int) -> int:
        """Everything up to the memory.

        Args:
            region: Of the memory.
            memory: Its descriptor.

        Returns:
            The features that are offered.
        """
        offered = self.features()
        chosen = choose_protocol_features(self._number(Request.GET_PROTOCOL_FEATURES))
        self.tell(Request.SET_PROTOCOL_FEATURES, U64Payload(chosen).pack())
        self._acknowledged = bool(chosen & ProtocolFeature.REPLY_ACK)
        self.tell(Request.SET_OWNER)
        if chosen & ProtocolFeature.MQ:
            self.queues = judge_queues(self._ask(Request.GET_QUEUE_NUM, b"", U64Payload.SIZE))
        self.tell(Request.SET_MEM_TABLE, memory_table([region]), [memory])
        return offered

    def features(self) -> int:
        """GET_FEATURES; its answer also says that everything before it has been taken."""
        offered = self._number(Request.GET_FEATURES)
        demand_protocol_features(offered)
        return offered

    def configuration(self, length: int) -> bytes:
        """So many bytes of the configuration space, from its start."""
        answer = self._ask(Request.GET_CONFIG, get_config(0, length), ConfigHeader.SIZE + length)
        return judge_config(answer, 0, length)

    def stop_queue(self, index: int) -> None:
        """Returns when the queue stands still."""
        judge_vring(self._ask(Request.GET_VRING_BASE, VringState(index, 0).pack(), VringState.SIZE), index)

    # ---- exchanges --------------------------------------------------------------------------------------------------

    def tell(self, request: Request, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """A message without an answer of its own; acknowledged where that was negotiated."""
        answer_bytes = U64Payload.SIZE if self._acknowledged else None
        answer = self._exchange(request, payload, answer_bytes, descriptors)
        if self._acknowledged:
            judge_acknowledgement(request, answer)

    def _ask(self, request: Request, payload: bytes, answer_bytes: int) -> bytes:
        return self._exchange(request, payload, answer_bytes, ())

    def _number(self, request: Request) -> int:
        return U64Payload.parse(self._ask(request, b"", U64Payload.SIZE)).value

    def _exchange(
        self, request: Request, payload: bytes, answer_bytes: int | None, descriptors: Sequence[int]
    ) -> bytes:
        deadline = time.monotonic() + self._seconds
        own_answer = request in _ANSWERED
        try:
            message = encode(request, payload, need_reply=self._acknowledged and not own_answer)
            self._socket.settimeout(self._seconds)
            sent = socket.send_fds(self._socket, [message], list(descriptors), socket.MSG_NOSIGNAL)
            if sent < len(message):
                self._socket.sendall(message[sent:])
            if answer_bytes is None:
                return b""
            size = judge_header(self._receive(MessageHeader.SIZE, deadline), request, answer_bytes)
            return self._receive(size, deadline)
        except (OSError, SvsmError) as error:
            self.close()
            if isinstance(error, SvsmError):
                raise
            raise _gone() from error

    def _receive(self, length: int, deadline: float) -> bytes:
        data = b""
        while len(data) < length:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(length - len(data))
            if not part:
                raise _gone()
            data += part
        return data


_ANSWERED: Final = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_VRING_BASE,
    }
)


def _gone() -> BackendError:
    return BackendError(
        "the back-end has closed the connection, or does not answer",
        code="vhost-user-gone",
        hint="see the daemon's log; start it again",
    )
