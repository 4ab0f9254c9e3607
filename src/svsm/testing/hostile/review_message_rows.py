# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vhost-user part of the virtio review: what a back-end says on its socket. See `review`."""

from __future__ import annotations

from typing import Final

from svsm.testing.review import Row

__all__ = ["MESSAGE_ROWS"]

_PART: Final = "vhost-user messages"
_MESSAGES: Final = "svsm.formats.vhost_user_messages"
_OFF: Final = "    if False:\n"


def _row(field: str, threat: str, module: str, check: str, without: str) -> Row:
    return Row(_PART, field, threat, module, check, without, target="vhost-user")


MESSAGE_ROWS: Final[tuple[Row, ...]] = (
    _row(
        "reply: request",
        "answer something else, and shift all answers by one",
        _MESSAGES,
        "    if header.request != request:\n",
        _OFF,
    ),
    _row(
        "reply: flags",
        "be no reply, or of another version",
        _MESSAGES,
        "    if flags != VERSION | HeaderFlag.REPLY:\n",
        _OFF,
    ),
    _row(
        "reply: size",
        "have memory taken for it, or be waited for",
        _MESSAGES,
        "    if header.size != payload_bytes and not (request is Request.GET_CONFIG and not header.size):\n",
        _OFF,
    ),
    _row(
        "GET_FEATURES: PROTOCOL_FEATURES",
        "be a back-end of another age",
        _MESSAGES,
        "    if not offered & VhostFeature.PROTOCOL_FEATURES:\n",
        _OFF,
    ),
    _row(
        "GET_PROTOCOL_FEATURES: CONFIG",
        "have a configuration that cannot be asked for",
        _MESSAGES,
        "    if not offered & ProtocolFeature.CONFIG:\n",
        _OFF,
    ),
    _row("acknowledgement", "refuse, and be believed to have agreed", _MESSAGES, "    if value:\n", _OFF),
    _row(
        "acknowledgement of SET_FEATURES",
        "refuse what it offered, and be called something else",
        _MESSAGES,
        "    if value and request is Request.SET_FEATURES:\n",
        _OFF,
    ),
    _row(
        "GET_QUEUE_NUM",
        "have more queues than can be addressed",
        _MESSAGES,
        "    if value > MAX_QUEUES:\n",
        _OFF,
    ),
    _row(
        "GET_CONFIG without payload",
        "refuse, and have nothing taken for a configuration",
        _MESSAGES,
        "    if not payload:\n",
        _OFF,
    ),
    _row(
        "GET_CONFIG: offset, size",
        "answer about another part",
        _MESSAGES,
        "    if header.offset != offset or header.size != length:\n",
        _OFF,
    ),
    _row(
        "GET_VRING_BASE: index",
        "have stopped another queue, and go on with this one",
        _MESSAGES,
        "    if state.index != index:\n",
        _OFF,
    ),
    _row(
        "number of queues",
        "have fewer queues than are used",
        "vhost_user",
        "        if not 0 <= index < self._queues:\n",
        "        if False:\n",
    ),
    _row(
        "descriptors beside a reply",
        "fill the table of descriptors",
        "vhost_user_socket",
        "            if flags & socket.MSG_CTRUNC:\n",
        "            if False:\n",
    ),
    _row(
        "a reply that does not come",
        "have the front-end wait for ever",
        "vhost_user_socket",
        "        if remaining <= 0:\n",
        "        if False:\n",
    ),
    _row(
        "the end of the socket in a reply",
        "be gone, and be waited for",
        "vhost_user_socket",
        "            if not part:\n",
        "            if False:\n",
    ),
    _row(
        "what nobody asked for",
        "have it taken for the next answer",
        "vhost_user_socket",
        "        self._demand_open()\n        try:\n            data, _, flags, _ = self._socket.recvmsg(1",
        "        return\n        try:\n            data, _, flags, _ = self._socket.recvmsg(1",
    ),
    _row(
        "the error descriptor of a queue",
        "have failed, and be waited for",
        "vhost_user",
        "        if self._failed:\n",
        "        if False:\n",
    ),
)
