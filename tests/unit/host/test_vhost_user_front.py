# SPDX-License-Identifier: MIT OR Apache-2.0
"""Registers in front of a vhost-user back-end: our driver before them, a back-end in Python behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.vhost_user import Request, U64Payload
from svsm.formats.virtio import DeviceStatus, Feature, MmioRegister
from svsm.host.devices.vhost_user_front import FrontBackend, VhostUserFront, serve_front
from svsm.host.devices.vhost_user_link import BackendLink
from svsm.host.devices.virtio_ring import Window
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.storage.drivers.virtio.socket_registers import SocketRegisters
from svsm.testing.block_conformance import CHECKS, Check
from svsm.testing.vhost_user_backend import Backend, reply
from svsm.testing.virtio_harness import SMALL_POLICY
from tests.vhost_user_support import OFFERED, Backends, subject

GPA = 0x3010_0000
POLICY = dataclasses.replace(SMALL_POLICY, deadline_seconds=20.0)


class Bench(Backends):
    """Drivers, registers and back-ends over one sealed memory file."""

    def __init__(self, stack: contextlib.ExitStack, policy: BlkPolicy = POLICY) -> None:
        super().__init__(stack)
        self.policy = policy
        self.size = memory_bytes(policy)
        self.memory = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
        stack.callback(os.close, self.memory)
        os.ftruncate(self.memory, GPA + self.size)
        fcntl.fcntl(self.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.view = memoryview(mmap.mmap(self.memory, self.size, offset=GPA))

    def introduced(self, backend: Backend) -> FrontBackend:
        link = BackendLink(backend.endpoint(), seconds=10.0)
        self.stack.callback(link.close)
        return FrontBackend(link, self.memory, address=GPA, size_bytes=self.size)

    def front(self, backend: Backend) -> VhostUserFront:
        return VhostUserFront(self.introduced(backend), Window(self.view, address=GPA), interrupt=lambda: None)

    def driver(self, backend: Backend) -> VirtioBlk:
        front = self.introduced(backend)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        window = Window(self.view, address=GPA)
        served = threading.Thread(target=serve_front, args=(theirs, front, window), daemon=True)
        served.start()
        transport = MmioTransport(SocketRegisters(ours))
        made = VirtioBlk(transport, DmaMemory(self.view, address=GPA), policy=self.policy)

        def end() -> None:
            made.close()
            served.join(10)
            front.link.close()
            theirs.close()

        self.stack.callback(end)
        return made


@pytest.fixture
def bench() -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(stack)


VARIANTS = {
    "split": POLICY,
    "packed": dataclasses.replace(POLICY, packed=True),
    "three-queues": dataclasses.replace(POLICY, queues=3, packed=False, event_idx=False, spins=1),
}


def _quick(variant: str, check: Check) -> bool:
    return variant == "split" or check.__name__ == "writes_are_read_back"


@pytest.mark.parametrize(
    ("variant", "check"),
    [
        pytest.param(
            variant, check, marks=() if _quick(variant, check) else pytest.mark.long, id=f"{variant}-{check.__name__}"
        )
        for variant in VARIANTS
        for check in CHECKS
    ],
)
def test_conformance(variant: str, check: Check) -> None:
    with contextlib.ExitStack() as stack:
        bench = Bench(stack, VARIANTS[variant])
        packed = int(Feature.RING_PACKED) if variant != "packed" else 0
        check(subject(lambda features: bench.backend(features=(OFFERED | features) & ~packed), bench.driver))


def test_the_platform_bit_is_the_registers_own_and_is_not_passed_on(bench: Bench) -> None:
    front = bench.front(bench.backend())
    front.write32(MmioRegister.DEVICE_FEATURES_SELECT, 1)
    assert front.read32(MmioRegister.DEVICE_FEATURES) & Feature.ACCESS_PLATFORM >> 32
    for select, word in ((0, 0), (1, (Feature.VERSION_1 | Feature.ACCESS_PLATFORM) >> 32)):
        front.write32(MmioRegister.DRIVER_FEATURES_SELECT, select)
        front.write32(MmioRegister.DRIVER_FEATURES, word)
    front.write32(MmioRegister.STATUS, 3)
    front.write32(MmioRegister.STATUS, 11)
    assert front.read32(MmioRegister.STATUS) == 11, "the back-end, which did not offer it, would have refused"
    assert not front.dead


def test_features_that_were_not_offered_are_not_accepted(bench: Bench) -> None:
    front = bench.front(bench.backend(features=OFFERED & ~int(Feature.EVENT_IDX)))
    for select, word in ((0, int(Feature.EVENT_IDX)), (1, Feature.VERSION_1 >> 32)):
        front.write32(MmioRegister.DRIVER_FEATURES_SELECT, select)
        front.write32(MmioRegister.DRIVER_FEATURES, word)
    front.write32(MmioRegister.STATUS, 11)
    assert front.read32(MmioRegister.STATUS) == 3
    assert not front.dead


def test_a_queue_outside_the_shared_memory_is_not_made_ready(bench: Bench) -> None:
    front = bench.front(bench.backend())
    front.write32(MmioRegister.QUEUE_SELECT, 0)
    front.write32(MmioRegister.QUEUE_SIZE, 16)
    for low, address in ((0x80, GPA), (0x90, GPA + 0x1000), (0xA0, GPA - 0x1000)):
        front.write32(low, address)
        front.write32(low + 4, 0)
    front.write32(MmioRegister.QUEUE_READY, 1)
    assert front.read32(MmioRegister.QUEUE_READY) == 0
    assert not front.dead


def test_a_back_end_that_dies_is_a_device_that_needs_a_reset_and_takes_none(bench: Bench) -> None:
    backend = bench.backend()
    driver = bench.driver(backend)
    driver.write([(0, b"\x55" * 512)])
    driver.flush()
    backend.join()
    with pytest.raises(BackendError) as caught:
        driver.read([(0, 512)])
    assert caught.value.code == "block-io"
    assert caught.value.details["violation"] == "virtio-needs-reset"
    assert bench.driver(backend).read([(0, 512)]) == [b"\x55" * 512]


def test_after_the_back_end_has_died_no_reset_takes(bench: Bench) -> None:
    front = bench.front(bench.backend())
    front.write32(MmioRegister.STATUS, 3)
    front.die()
    assert front.read32(MmioRegister.STATUS) == 3 | DeviceStatus.NEEDS_RESET
    front.write32(MmioRegister.STATUS, 0)
    assert front.read32(MmioRegister.STATUS) == DeviceStatus.NEEDS_RESET
    front.write32(MmioRegister.STATUS, 11)
    assert not front.read32(MmioRegister.STATUS) & DeviceStatus.FEATURES_OK


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x01" * 12, reply(Request.GET_PROTOCOL_FEATURES, bytes(8)), reply(Request.GET_FEATURES, bytes(8))],
    ids=["hangs-up", "nonsense", "another-request", "too-old"],
)
def test_a_back_end_that_cannot_be_used_is_refused(bench: Bench, answer: bytes) -> None:
    ours, theirs = socket.socketpair()

    def speak() -> None:
        with theirs:
            theirs.recv(64)
            theirs.sendall(answer)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    with pytest.raises(SvsmError) as caught:
        FrontBackend(BackendLink(ours, seconds=5.0), bench.memory, address=GPA, size_bytes=bench.size)
    assert caught.value.code in ("vhost-user-gone", "vhost-user-reply", "vhost-user-features")
    speaker.join(5)


def test_a_back_end_that_drips_is_given_up_at_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    answer = iter(reply(Request.GET_FEATURES, U64Payload(1 << 30).pack())[:-1])
    stop = threading.Event()

    def drip() -> None:
        for byte in answer:
            theirs.sendall(bytes([byte]))
            if stop.wait(0.02):
                return

    speaker = threading.Thread(target=drip, daemon=True)
    speaker.start()
    link = BackendLink(ours, seconds=0.1)
    with theirs, pytest.raises(BackendError) as caught:
        link.features()
    stop.set()
    assert caught.value.code == "vhost-user-gone"
    assert link.fileno() == -1
    speaker.join(5)
