# SPDX-License-Identifier: MIT OR Apache-2.0
"""The vhost-user front-end against back-ends in Python: honest with both rings, and each message answered wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import BackendError, ProtocolError, StateError, SvsmError
from svsm.formats.vhost_user import (
    ProtocolFeature,
    Request,
    U64Payload,
    VhostFeature,
    VringState,
)
from svsm.formats.vhost_user_messages import judge_config, judge_header
from svsm.formats.virtio import Feature
from svsm.host.devices.virtio_ring import Chain, Window
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.vhost_user import VhostUserBlk, VhostUserTransport, open_vhost_user
from svsm.storage.drivers.virtio.vhost_user_socket import SharedMemory, connect
from svsm.testing.block_conformance import CHECKS, Check, initial_content
from svsm.testing.hostile.vhost_user_attacks import LIES as CATALOGUE
from svsm.testing.hostile.vhost_user_attacks import Liar, lie
from svsm.testing.vhost_user_backend import Backend, Conversation, reply
from svsm.testing.virtio_harness import SMALL_POLICY
from tests.vhost_user_support import OFFERED, Backends, subject

CONTENT = initial_content()
POLICY = dataclasses.replace(SMALL_POLICY, deadline_seconds=10.0, rekick_seconds=0.05)
ANSWER_SECONDS = 0.1
"""For a back-end that is in the same process and not slow."""


class Bench(Backends):
    """Makes back-ends and drivers, and takes them away again."""

    def driver(self, backend: Backend, policy: BlkPolicy = POLICY, answer_seconds: float = 10.0) -> VhostUserBlk:
        made = VhostUserBlk(backend.endpoint, policy=policy, answer_seconds=answer_seconds)
        self.stack.callback(made.close)
        return made


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(stack)


# ---- honest ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "split": POLICY,
    "packed": dataclasses.replace(POLICY, packed=True),
    "split-direct": dataclasses.replace(POLICY, packed=False, indirect=False),
    "packed-direct-sleeping": dataclasses.replace(POLICY, indirect=False, event_idx=False, spins=1),
    "three-queues": dataclasses.replace(POLICY, queues=3, packed=False),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance(bench: Bench, check: Check, variant: str) -> None:
    policy = dataclasses.replace(VARIANTS[variant], packed=variant.startswith("packed"))
    check(
        subject(
            lambda features: bench.backend(features=OFFERED | features),
            lambda backend: bench.driver(backend, policy),
        )
    )


def test_what_is_negotiated(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend)
    assert driver.features & Feature.RING_PACKED
    assert driver.get_id() == b"svsm-disk"
    assert backend.requests[:7] == [
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.SET_OWNER,
        Request.GET_QUEUE_NUM,
        Request.SET_MEM_TABLE,
        Request.SET_FEATURES,
    ]
    driver.close()
    assert Request.GET_VRING_BASE in backend.requests, "the queue was not stopped"


def test_without_acknowledgements_the_start_ends_with_an_answer(bench: Bench) -> None:
    backend = bench.backend(protocol_features=int(ProtocolFeature.CONFIG))
    driver = bench.driver(backend)
    assert Request.GET_QUEUE_NUM not in backend.requests
    assert backend.requests[-1] is Request.GET_FEATURES
    assert driver.read([(0, 4096)])[0] == CONTENT[:4096]


def test_a_reset_in_the_same_connection(bench: Bench) -> None:
    backend = bench.backend()
    shared = SharedMemory(memory_bytes(POLICY))
    bench.stack.callback(shared.close)
    driver = VirtioBlk(VhostUserTransport(backend.endpoint(), shared), shared.dma, policy=POLICY)
    bench.stack.callback(driver.close)
    for number in range(4):
        data = bytes([number]) * 8192
        driver.write([(4096, data)])
        driver.flush()
        driver.reconnect()
        assert driver.read([(4096, 8192)]) == [data]
    assert backend.requests.count(Request.SET_MEM_TABLE) == 1
    assert backend.requests.count(Request.GET_VRING_BASE) == 4


def test_unflushed_writes_are_owned_up_to_after_a_reconnect(bench: Bench) -> None:
    driver = bench.driver(bench.backend())
    driver.write([(0, bytes(512))])
    driver.reconnect()
    with pytest.raises(BackendError) as caught:
        driver.flush()
    assert caught.value.code == "block-io"
    driver.flush()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_other_side_can_neither_shrink_nor_grow_the_memory() -> None:
    shared = SharedMemory(8192)
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(shared.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    shared.close()


def test_the_three_names_of_an_address_differ() -> None:
    shared = SharedMemory(8192)
    assert shared.region.guest_address != shared.region.user_address
    assert shared.user_address(shared.dma.device_address(4096)) == shared.region.user_address + 4096
    # Nor is the made-up one where the memory really is.
    maps = Path("/proc/self/maps").read_text(encoding="ascii")
    assert f"{shared.region.user_address:x}-" not in maps
    for address in (0, shared.region.guest_address - 1, shared.region.guest_address + 8192):
        with pytest.raises(StateError):
            shared.user_address(address)
    shared.close()


def test_memory_that_cannot_be() -> None:
    for size in (0, -1):
        with pytest.raises(StateError):
            SharedMemory(size)
    with pytest.raises(StateError):
        SharedMemory(4096, guest_address=1)
    with pytest.raises(BackendError) as caught:
        SharedMemory(1 << 63)
    assert caught.value.code == "vhost-user-memory"


def test_nothing_is_left_open(bench: Bench) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    backend = bench.backend()
    gc.collect()
    before = opened()
    for _ in range(3):
        driver = VhostUserBlk(backend.endpoint, policy=POLICY)
        driver.read([(0, 512)])
        driver.reconnect()
        driver.close()
        backend.join()
        del driver  # the mapping goes with it
    for name in ("does not answer", "refuses", "sends descriptors"):
        backend.script = LIES[name](Request.SET_VRING_ADDR)
        with pytest.raises(SvsmError):
            VhostUserBlk(backend.endpoint, policy=POLICY, answer_seconds=ANSWER_SECONDS)
        backend.join()
    gc.collect()
    assert opened() == before


# ---- hostile --------------------------------------------------------------------------------------------------------


def _refuse(_: Conversation, honest: bytes) -> bytes:
    return honest[:12] + U64Payload(1).pack()


LIES: dict[str, Liar] = {
    **{name: liar for name, (liar, _) in CATALOGUE.items()},
    "leaves the payload out": lie(lambda _, honest: honest[:8] + bytes(4)),
    "refuses": lie(_refuse),
}
CODES = {
    "vhost-user-reply",
    "vhost-user-timeout",
    "vhost-user-gone",
    "vhost-user-refused",
    "vhost-user-features",
    "vhost-user-config",
    "virtio-features-refused",
    "virtio-features-missing",
}
MEANT_OTHERWISE = {
    # A number in a GET's answer is no refusal, and 1 is a possible one.
    ("refuses", Request.GET_QUEUE_NUM),
    ("refuses", Request.GET_VRING_BASE),
    ("refuses", Request.GET_CONFIG),
}


def _attack(bench: Bench, backend: Backend, seconds: float = ANSWER_SECONDS) -> None:
    """A whole life over one connection: start, a read, a reset."""
    policy = dataclasses.replace(POLICY, deadline_seconds=seconds)
    shared = SharedMemory(memory_bytes(policy))
    bench.stack.callback(shared.close)
    transport = VhostUserTransport(backend.endpoint(), shared, answer_seconds=seconds)
    driver = VirtioBlk(transport, shared.dma, policy=policy)
    bench.stack.callback(driver.close)
    assert driver.read([(0, 512)]) == [CONTENT[:512]]
    transport.reset(deadline=time.monotonic() + seconds)
    # What came behind the last answer, in one piece with it, is found by the next look.
    transport.check()


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("target", Request)
def test_a_wrong_answer_to_each_message(bench: Bench, target: Request, name: str) -> None:
    if target is Request.SET_PROTOCOL_FEATURES or (name, target) in MEANT_OTHERWISE:
        return
    backend = bench.backend(LIES[name](target))
    began = time.monotonic()
    with pytest.raises(SvsmError) as caught:
        _attack(bench, backend)
    # Behind the start, the driver says it as a disk's error, with the violation beside it.
    found = caught.value.details.get("violation", caught.value.code)
    assert found in CODES or (target is Request.GET_CONFIG and found == "virtio-blk-geometry")
    assert time.monotonic() - began < 5.0, "no exchange outlives its deadline"


def _hang_up() -> bytes:
    raise EOFError


@pytest.mark.parametrize(
    ("say", "code"), [(_hang_up, "vhost-user-gone"), (lambda: bytes(1 << 20), "vhost-user-reply")], ids=["end", "flood"]
)
def test_where_no_answer_belongs(bench: Bench, say: Callable[[], bytes], code: str) -> None:
    """Acknowledgements are agreed by SET_PROTOCOL_FEATURES, so it has none itself."""

    def script(_: Conversation, request: Request, honest: bytes) -> bytes:
        return say() if request is Request.SET_PROTOCOL_FEATURES else honest

    with pytest.raises(SvsmError) as caught:
        _attack(bench, bench.backend(script))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("target", "payload", "code"),
    [
        (Request.GET_FEATURES, U64Payload(0).pack(), "vhost-user-features"),
        (Request.GET_FEATURES, U64Payload(int(VhostFeature.PROTOCOL_FEATURES)).pack(), "virtio-features-missing"),
        (Request.GET_PROTOCOL_FEATURES, U64Payload(0).pack(), "vhost-user-features"),
        (Request.GET_QUEUE_NUM, U64Payload(0).pack(), "virtio-queue-missing"),
        (Request.GET_QUEUE_NUM, U64Payload(257).pack(), "vhost-user-reply"),
        (Request.GET_QUEUE_NUM, U64Payload((1 << 64) - 1).pack(), "vhost-user-reply"),
        (Request.GET_CONFIG, b"", "vhost-user-config"),
        (Request.GET_CONFIG, bytes(72), "vhost-user-reply"),
        (Request.GET_CONFIG, b"\x04" + bytes(3) + b"\x3c" + bytes(67), "vhost-user-reply"),
        (Request.GET_CONFIG, bytes(4) + b"\x3c" + bytes(7) + b"\xff" * 60, "virtio-blk-geometry"),
        (Request.GET_VRING_BASE, VringState(1, 0).pack(), "vhost-user-reply"),
        (Request.SET_FEATURES, U64Payload(1).pack(), "virtio-features-refused"),
        (Request.SET_MEM_TABLE, U64Payload(1 << 63).pack(), "vhost-user-refused"),
    ],
)
def test_contents_that_cannot_be(bench: Bench, target: Request, payload: bytes, code: str) -> None:
    def script(_: Conversation, request: Request, honest: bytes) -> bytes:
        return reply(request, payload) if request is target else honest

    with pytest.raises(ProtocolError) as caught:
        _attack(bench, bench.backend(script), 5.0)
    assert caught.value.code == code


def test_random_answers(bench: Bench) -> None:
    source = random.Random(7)
    for _ in range(30):
        number, mode = source.randrange(20), source.randrange(3)
        seen = 0

        def script(_: Conversation, request: Request, honest: bytes) -> bytes:
            nonlocal seen
            seen += 1
            if seen != number or not honest:  # noqa: B023
                return honest
            data = bytearray(honest)
            for _flip in range(1 + mode):  # noqa: B023
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
            return bytes(data)

        # Whatever comes of it, it is no other exception, and soon.
        with contextlib.suppress(SvsmError, AssertionError):
            _attack(bench, bench.backend(script))
        bench.stack.close()


def test_a_message_that_nobody_reads(bench: Bench) -> None:
    front, back = socket.socketpair()
    front.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with back, contextlib.closing(SharedMemory(4096)) as shared:
        transport = VhostUserTransport(front, shared, answer_seconds=ANSWER_SECONDS)
        began = time.monotonic()
        with pytest.raises(ProtocolError) as caught:
            transport.reset(deadline=began + ANSWER_SECONDS)
        assert caught.value.code == "vhost-user-timeout"
        with pytest.raises(ProtocolError) as again:
            transport.reset(deadline=time.monotonic() + 10)
        assert again.value.code == "vhost-user-timeout"
        assert time.monotonic() - began < 2.0
        transport.close()


def _die(window: Window, chain: Chain) -> int:
    raise EOFError


def test_a_back_end_that_dies_while_it_has_requests(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend)
    driver.write([(0, b"a" * 512)])
    driver.flush()
    conversation = backend.conversations[-1]
    backend.disk.handle = _die  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(BackendError) as caught:
        driver.read([(0, 512)])
    assert (caught.value.code, caught.value.details["violation"]) == ("block-io", "vhost-user-gone")
    assert time.monotonic() - began < 1.0
    conversation.join(5)
    with pytest.raises(BackendError):
        driver.write([(0, bytes(512))])
    del backend.disk.handle
    driver.reconnect()
    assert driver.read([(0, 512)]) == [b"a" * 512]
    assert driver.fault is None


def test_a_back_end_that_reports_an_error(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend)
    for queue in backend.conversations[-1]._queues.values():
        os.eventfd_write(queue.error, 1)
    held = threading.Event()
    backend.disk.handle = lambda window, chain: int(held.wait(1))  # type: ignore[method-assign]
    with pytest.raises(BackendError) as caught:
        driver.read([(0, 512)])
    held.set()
    assert caught.value.details["violation"] == "virtio-needs-reset"


def test_a_back_end_that_never_completes(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend, dataclasses.replace(POLICY, deadline_seconds=0.3))
    held = threading.Event()
    backend.disk.handle = lambda window, chain: int(held.wait(5))  # type: ignore[method-assign]
    with pytest.raises(BackendError) as caught:
        driver.read([(0, 512)])
    assert caught.value.details["violation"] == "virtio-timeout"
    held.set()


def test_a_back_end_that_fills_the_kick_and_storms_the_call(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend)
    for queue in backend.conversations[-1]._queues.values():
        for _ in range(3):
            os.eventfd_write(queue.call, 1 << 62)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(queue.kick, (1 << 64) - 2)
    assert driver.read([(0, 4096)] * 40) == [CONTENT[:4096]] * 40


def test_speaking_without_being_asked(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend)
    backend.conversations[-1].socket.sendall(reply(Request.GET_FEATURES, bytes(8)))
    with pytest.raises(BackendError) as caught:
        driver.poll()
    assert caught.value.details["violation"] == "vhost-user-reply"


def test_a_dead_transport_stays_dead(bench: Bench) -> None:
    driver = bench.driver(bench.backend())
    driver.close()
    with pytest.raises(StateError):
        driver.reconnect()
    with contextlib.closing(SharedMemory(4096)) as shared:
        front, back = socket.socketpair()
        back.close()
        transport = VhostUserTransport(front, shared)
        for call in (
            lambda: transport.reset(deadline=time.monotonic() + 1),
            transport.check,
            lambda: transport.accept(0),
            lambda: transport.configuration(0, 60),
            lambda: transport.notify(0),
        ):
            with pytest.raises(BackendError) as caught:
                call()
            assert caught.value.code == "vhost-user-gone"
        transport.close()
        with pytest.raises(BackendError):
            transport.wait(time.monotonic() + 1)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (-4, 8), (0, 257), (256, 1), (1 << 40, 4)])
def test_no_such_part_of_the_configuration(bench: Bench, offset: int, length: int) -> None:
    with contextlib.closing(SharedMemory(4096)) as shared:
        transport = VhostUserTransport(bench.backend().endpoint(), shared)
        with pytest.raises(ProtocolError) as caught:
            transport.configuration(offset, length)
        assert caught.value.code == "virtio-config-range"
        transport.close()


def test_nobody_at_the_socket(tmp_path: Path) -> None:
    for path in (str(tmp_path / "absent"), "\0", "x" * 200, "a\0b"):
        with pytest.raises(BackendError) as caught:
            connect(path, seconds=0.2)
        assert caught.value.code == "vhost-user-connect"
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen(1)
        with pytest.raises(ProtocolError) as late:  # connected, and nobody accepts
            open_vhost_user(str(tmp_path / "sock"), policy=dataclasses.replace(POLICY, deadline_seconds=0.2))
        assert late.value.code == "vhost-user-timeout"


def _code(call: Callable[[], object]) -> str:
    try:
        call()
    except ProtocolError as error:
        return error.code
    return ""


@given(data=st.binary(min_size=12, max_size=12), size=st.integers(0, 512), request=st.sampled_from(list(Request)))
def test_any_header(data: bytes, size: int, request: Request) -> None:
    assert _code(lambda: judge_header(data, request, size)) in ("", "vhost-user-reply")


@given(data=st.binary(max_size=80), length=st.integers(1, 64))
def test_any_configuration(data: bytes, length: int) -> None:
    assert _code(lambda: judge_config(data, 0, length)) in ("", "vhost-user-reply", "vhost-user-config")


def test_the_mapping_outlives_its_descriptor() -> None:
    shared = SharedMemory(mmap.PAGESIZE)
    shared.close()
    shared.close()
    shared.dma.bytes[0] = 1
