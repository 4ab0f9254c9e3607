# SPDX-License-Identifier: MIT OR Apache-2.0
"""The rules of one vsock connection, packet by packet."""

from __future__ import annotations

import pytest

from svsm.abi.errors import BackendError, ProtocolError
from svsm.formats.virtio_vsock import HOST_CID, TYPE_STREAM, VsockHeader, VsockOperation, VsockShutdown
from svsm.kernel.channels.vsock_connection import VsockConnection, VsockState

_CID, _PORT, _PEER_PORT, _BUFFER = 7, 0x8000_0001, 9999, 1000
_BOTH = int(VsockShutdown.RECEIVE | VsockShutdown.SEND)
Op = VsockOperation


def packet(operation: int, payload: bytes = b"", /, **changes: int) -> bytes:
    header = VsockHeader(
        source_cid=HOST_CID,
        destination_cid=_CID,
        source_port=_PEER_PORT,
        destination_port=_PORT,
        length=len(payload),
        type=TYPE_STREAM,
        operation=operation,
        flags=0,
        buffer_bytes=4096,
        forwarded=0,
    )
    return header.replace(**changes).pack() + payload


def requested() -> VsockConnection:
    connection = VsockConnection(cid=_CID, port=_PORT, peer_port=_PEER_PORT, buffer_bytes=_BUFFER)
    request = connection.request()
    assert (request.operation, request.buffer_bytes, request.forwarded) == (Op.REQUEST, _BUFFER, 0)
    assert (request.source_cid, request.destination_cid) == (_CID, HOST_CID)
    return connection


def connected(**changes: int) -> VsockConnection:
    connection = requested()
    assert connection.take(packet(Op.RESPONSE, **changes)) is None
    assert connection.state is VsockState.CONNECTED
    return connection


def refused(connection: VsockConnection, data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        connection.take(data)
    return caught.value.code or ""


def test_data_both_ways() -> None:
    connection = connected()
    assert connection.window == 4096
    header = connection.data(100)
    assert (header.operation, header.length) == (Op.RW, 100)
    assert connection.window == 3996
    connection.take(packet(Op.RW, b"hello", forwarded=100))
    assert connection.window == 4096
    assert (connection.read(2), connection.read(100), connection.available) == (b"he", b"llo", 0)


def test_a_refusal_and_a_break() -> None:
    with pytest.raises(BackendError) as caught:
        requested().take(packet(Op.RST))
    assert caught.value.code == "channel-closed"
    connection = connected()
    connection.take(packet(Op.RW, b"last words"))
    connection.take(packet(Op.RST))
    assert connection.state is VsockState.RESET
    assert connection.ended
    assert connection.read(100) == b"last words"
    connection.take(packet(Op.RW, b"a ghost"))
    assert (connection.available, connection.strays) == (0, 1)


@pytest.mark.parametrize("data", [b"", packet(Op.RW)[:43], packet(Op.RW, b"ab")[:-1], packet(Op.RW, b"ab") + b"c"])
def test_a_packet_of_another_length(data: bytes) -> None:
    assert refused(connected(), data) == "vsock-packet"


@pytest.mark.parametrize(
    "change",
    [
        {"source_cid": 3},
        {"source_cid": HOST_CID | 1 << 32},
        {"destination_cid": _CID + 1},
        {"destination_cid": _CID | 1 << 63},
    ],
)
def test_other_addresses_are_nothing(change: dict[str, int]) -> None:
    connection = connected()
    assert connection.take(packet(Op.RW, b"x", **change)) is None
    assert (connection.available, connection.strays) == (0, 1)


@pytest.mark.parametrize(
    "change", [{"source_port": 1}, {"destination_port": 1}, {"type": 2}, {"type": 0}, {"type": 0xFFFF}]
)
def test_other_connections_and_types_get_a_reset(change: dict[str, int]) -> None:
    connection = connected()
    answer = connection.take(packet(Op.REQUEST, **change))
    assert answer is not None
    asked = VsockHeader.parse(packet(Op.REQUEST, **change))
    assert (answer.operation, answer.type) == (Op.RST, asked.type)
    assert (answer.source_port, answer.destination_port) == (asked.destination_port, asked.source_port)
    assert (answer.source_cid, answer.destination_cid, answer.length) == (_CID, HOST_CID, 0)
    assert connection.take(packet(Op.RST, **change)) is None, "a reset is not answered, or two would go on for ever"
    assert connection.state is VsockState.CONNECTED


@pytest.mark.parametrize("operation", [Op.RW, Op.SHUTDOWN, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, Op.REQUEST])
def test_before_the_response(operation: VsockOperation) -> None:
    assert refused(requested(), packet(operation)) == "vsock-packet"


@pytest.mark.parametrize("operation", [Op.RESPONSE, Op.REQUEST])
def test_after_the_response(operation: VsockOperation) -> None:
    assert refused(connected(), packet(operation)) == "vsock-packet"


@pytest.mark.parametrize("operation", [Op.SHUTDOWN, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST])
def test_payload_where_none_belongs(operation: VsockOperation) -> None:
    assert refused(connected(), packet(operation, b"x")) == "vsock-packet"


@pytest.mark.parametrize("operation", [0, 8, 0xFFFF])
def test_operations_that_do_not_exist_are_ignored(operation: int) -> None:
    connection = connected()
    assert connection.take(packet(operation, forwarded=77)) is None
    assert connection.strays == 1
    assert connection.window == 4096


def test_shutdown_is_permanent_and_in_two_parts() -> None:
    connection = connected()
    connection.take(packet(Op.RW, b"before"))
    connection.take(packet(Op.SHUTDOWN, flags=int(VsockShutdown.SEND) | 1 << 31))
    connection.take(packet(Op.SHUTDOWN, flags=0))
    assert connection.peer_shutdown == VsockShutdown.SEND
    assert connection.ended
    assert connection.owed() is None
    assert refused(connection, packet(Op.RW, b"after")) == "vsock-packet"
    assert connection.read(100) == b"before"
    connection = connected()
    connection.take(packet(Op.SHUTDOWN, flags=int(VsockShutdown.RECEIVE)))
    assert not connection.ended
    connection.take(packet(Op.SHUTDOWN, flags=_BOTH))
    owed = connection.owed()
    assert owed is not None
    assert owed.operation == Op.RST
    assert connection.owed() is None


def test_the_host_may_fill_the_buffer_and_not_a_byte_more() -> None:
    connection = connected()
    connection.take(packet(Op.RW, bytes(_BUFFER)))
    assert refused(connection, packet(Op.RW, b"x")) == "vsock-credit"
    assert connection.available == _BUFFER


def test_what_was_read_is_the_hosts_again_only_when_it_was_told() -> None:
    connection = connected()
    connection.take(packet(Op.RW, bytes(_BUFFER)))
    connection.read(499)
    assert connection.owed() is None
    assert refused(connection, packet(Op.RW, b"x")) == "vsock-credit"
    connection.read(1)
    update = connection.owed()
    assert update is not None
    assert (update.operation, update.forwarded) == (Op.CREDIT_UPDATE, 500)
    connection.take(packet(Op.RW, bytes(500)))
    assert refused(connection, packet(Op.RW, b"x")) == "vsock-credit"


def test_a_question_for_credit_is_answered() -> None:
    connection = connected()
    connection.take(packet(Op.CREDIT_REQUEST))
    owed = connection.owed()
    assert owed is not None
    assert owed.operation == Op.CREDIT_UPDATE
    assert connection.owed() is None


@pytest.mark.parametrize("forwarded", [1, 0x8000_0000, 0xFFFF_FFFF])
def test_what_was_not_sent_was_not_taken(forwarded: int) -> None:
    assert refused(connected(), packet(Op.CREDIT_UPDATE, forwarded=forwarded)) == "vsock-credit"


def test_what_was_taken_stays_taken() -> None:
    connection = connected()
    connection.data(100)
    connection.take(packet(Op.CREDIT_UPDATE, forwarded=60))
    assert refused(connection, packet(Op.CREDIT_UPDATE, forwarded=59)) == "vsock-credit"


def test_a_host_that_gives_no_room() -> None:
    connection = connected(buffer_bytes=0)
    assert connection.window == 0
    connection.take(packet(Op.CREDIT_UPDATE, buffer_bytes=10))
    assert connection.window == 10
    connection.data(10)
    connection.take(packet(Op.CREDIT_UPDATE, buffer_bytes=3))
    assert connection.window == 0, "a buffer that shrinks below what is in it"
    connection.take(packet(Op.CREDIT_UPDATE, buffer_bytes=0xFFFF_FFFF))
    assert connection.window == 0xFFFF_FFFF - 10


def test_the_counters_wrap() -> None:
    """Both directions, past 2^32, a few bytes at a time around the edge."""
    connection = connected()
    near = 0x1_0000_0000 - 30
    for attribute in ("_sent", "_peer_taken", "_taken", "_told"):
        setattr(connection, attribute, near)
    for step in range(1, 11):
        header = connection.data(10)
        assert header.forwarded == (near + 600 * (step - 1)) & 0xFFFF_FFFF
        position = (near + 10 * step) & 0xFFFF_FFFF
        assert refused_at(connection, position + 1)
        connection.take(packet(Op.RW, bytes(600), forwarded=position))
        assert connection.window == 4096
        assert connection.read(600) == bytes(600)
    assert connection._sent == 70


def refused_at(connection: VsockConnection, forwarded: int) -> bool:
    return refused(connection, packet(Op.CREDIT_UPDATE, forwarded=forwarded & 0xFFFF_FFFF)) == "vsock-credit"
