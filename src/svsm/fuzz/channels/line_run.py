# SPDX-License-Identifier: MIT OR Apache-2.0
"""A program against a channel over virtio: the device, what it says instead of the truth, and what must come of it.

The device is one of `svsm.host.devices`, honest by itself. `StreamDevice` lies in completions and registers,
`Speaker` puts other contents into buffers. What reached the driver is told to the rules; see `svsm.fuzz.channels` for
what is demanded in the end, and `LineRun.run` for what is demanded of each call.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Final, Protocol

from svsm.abi.channel import Channel
from svsm.abi.errors import SvsmError
from svsm.formats.virtio import DeviceStatus, DeviceType, Feature, MmioRegister
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.program import shared_memory
from svsm.fuzz.disks.verdict import Clock
from svsm.fuzz.disks.virtio_device import GPA
from svsm.fuzz.target import expect
from svsm.host.devices.virtio_console import LINE_FEATURES
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing, Window
from svsm.host.devices.virtio_stream import MmioStream, StreamBackend
from svsm.kernel.channels.virtio_line import LinePolicy, line_memory_bytes
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.testing.channel_harness import LineRegisters

__all__ = ["POLICY", "Echo", "LineRules", "LineRun", "Speaker", "StreamDevice"]

POLICY: Final = LinePolicy(buffers=8, buffer_bytes=256, start_seconds=0.1, rekick_seconds=0.02, spins=1)
_SECONDS: Final = 0.05
_CALLS: Final = 12
_MOST_DRAINS: Final = 64
_WORD: Final = 0xFFFF_FFFF
_SENT: Final = bytes(at * 11 % 251 + 1 for at in range(3000))
_RING_CODES: Final = ("virtio-used-id", "virtio-used-length", "virtio-used-unexpected", "virtio-used-index")


class LineRules(Protocol):
    """What follows a conversation."""

    code: str

    @property
    def ended(self) -> bool:
        """The stream has an end."""

    @property
    def deaf(self) -> bool:
        """Nobody takes what is sent."""


class Echo:
    """A `Peer` that gives back what it gets; what that is, was sent."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def write(self, data: bytes) -> int:
        """All of it."""
        expect(data in _SENT, "something is sent that nobody wanted to send")
        self._waiting += data
        return len(data)

    def read(self, most: int) -> bytes | None:
        """A piece."""
        piece = bytes(self._waiting[:most])
        del self._waiting[: len(piece)]
        return piece or None

    def close(self) -> None:
        """Nothing."""


class StreamDevice(MmioStream):
    """An honest device, until told otherwise.

    Attributes:
        heard: Told what a filled buffer holds, as the driver will see it, and of which queue it is.
        sent: Told what the driver sent.
        ring_lie: Instead of the next completion: what kind, and of which queue; None for the truth.
        storm: Waiting takes no time.
        registers: What is read instead, by offset.
    """

    def __init__(self, stream: StreamBackend, window: Window) -> None:
        self.heard: Callable[[int, bytes], None] = lambda _index, _data: None
        self.ring_lie: tuple[int, int] | None = None
        self.told: tuple[str, ...] = ()
        self.storm = False
        self.registers: dict[int, int] = {}
        super().__init__(stream, window)

    def read32(self, offset: int) -> int:
        """A trapped load."""
        value = super().read32(offset)
        return self.registers.get(offset, value)

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """Tell what is in the buffer; lie where it was asked for."""
        index = next(at for at, queue in enumerate(self.queues) if queue.ring is ring)
        lie = self.ring_lie
        if lie is not None and lie[1] == index:
            self.ring_lie = None
            self._lie(lie[0], index, ring, chain, written)
            return
        self._tell(index, chain, written)
        super().complete(ring, chain, written)

    def _tell(self, index: int, chain: Chain, written: int) -> None:
        parts = [part for part in chain.parts if part.device_writes]
        if parts:
            whole = self.window.take(parts[0].address, parts[0].length)
            expect(not any(whole[written:]), "a buffer is not zeroed before it is lent")
            self.heard(index, whole[:written])

    def _lie(self, kind: int, index: int, ring: DeviceRing, chain: Chain, written: int) -> None:
        identifier, length = chain.identifier, written
        if kind == 0:
            identifier, self.told = identifier | 0x4000, ("virtio-used-id",)
        elif kind == 1:
            length, self.told = _WORD, ("virtio-used-length",)
        elif kind == 2:
            self._tell(index, chain, written)
            super().complete(ring, chain, written)
            self.told = (*_RING_CODES, "channel-timeout", "")
        else:
            self.told = ("channel-timeout", "")
            return
        if isinstance(ring, DeviceSplitRing):
            ring.put_used(identifier, length)
            ring.set_used_index(ring.next_used + 1)
        elif isinstance(ring, DevicePackedRing):
            ring.put_used(identifier, length, wrap=ring.used_wrap)
            ring.skip(1)


class Speaker:
    """What is behind the device: an honest backend, or something else.

    Args:
        backend: The honest one.

    Attributes:
        honest: What the backend says: by queue and room, None for nothing.
        say: What is said instead.
        silent: Says nothing any more.
        deaf: Takes nothing any more.
        device_type, options, configured: Instead of the backend's.
        sent: Told what the driver sent, and over which queue.
    """

    def __init__(self, backend: StreamBackend) -> None:
        self._backend = backend
        self.honest = self.say = backend.receive
        self.sent: Callable[[int, bytes], None] = lambda _index, _data: None
        self.silent = self.deaf = False
        self.device_type, self.options = backend.device_type, backend.options
        self.configured: bytes | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def configuration(self) -> bytes:
        """The configuration space."""
        return self._backend.configuration() if self.configured is None else self.configured

    def transmit(self, index: int, data: bytes) -> int:
        """What the driver sends; all of it is taken, or nothing."""
        if self.deaf:
            return 0
        self.sent(index, data)
        return self._backend.transmit(index, data)

    def receive(self, index: int, room: int) -> bytes | None:
        """What goes into a buffer."""
        return None if self.silent else self.say(index, room)


class _Registers(LineRegisters):
    """With interrupts without end, where the device wants them."""

    def __init__(self, device: StreamDevice, clock: Clock) -> None:
        super().__init__(device, clock)  # type: ignore[arg-type]  # this clock has what theirs has
        self._stream = device

    def wait_interrupt(self, seconds: float) -> bool:
        """The device's turn."""
        if self._stream.storm:
            self._stream.service()
            return True
        return super().wait_interrupt(seconds)


class LineRun(abc.ABC):
    """One program.

    Args:
        data: The program. Its first byte says which ring; its second, what kind of lies there are.
        device_type: What the device is.
    """

    rules: LineRules
    channel: Channel

    def __init__(self, data: bytes) -> None:
        self.choices = choices = Choices(data)
        form = choices.unsigned(1)
        self.common = LINE_FEATURES & ~(int(Feature.RING_PACKED) if form & 1 else 0)
        self.common &= ~(int(Feature.EVENT_IDX) if form & 2 else 0)
        self.form = form >> 2
        self.clock = Clock()
        self.expected_start = ""
        self.delivered = bytearray()
        self.taken = 0
        self.fault: SvsmError | None = None
        self.speaker = Speaker(self.backend())
        view = memoryview(shared_memory(line_memory_bytes(POLICY, queues=6)))
        self.device = StreamDevice(self.speaker, Window(view, address=GPA))  # type: ignore[arg-type]  # a speaker plays a back-end
        self.device.heard, self.speaker.sent = self.heard, self.sent
        self.memory = DmaMemory(view, address=GPA)

    # ---- what a kind of device adds ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def backend(self) -> StreamBackend:
        """The honest device."""

    @abc.abstractmethod
    def open(self) -> Channel:
        """The driver."""

    @abc.abstractmethod
    def heard(self, index: int, data: bytes) -> None:
        """A buffer that the driver gets."""

    @abc.abstractmethod
    def sent(self, index: int, data: bytes) -> None:
        """A buffer that the driver has sent."""

    @abc.abstractmethod
    def say(self, index: int, room: int) -> bytes | None:
        """What a lying device says."""

    @abc.abstractmethod
    def misconfigure(self, choices: Choices) -> None:
        """The device is another from the start, or none that can be; books it in `expected_start`."""

    @abc.abstractmethod
    def bounded(self) -> None:
        """What the driver holds is no more than it promised."""

    @property
    def broken(self) -> bool:
        """The stream ends without an end."""
        return False

    # ---- the whole program ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start, call, fall silent, and hear what the driver has to say. Raises what ended the channel."""
        choices, kind = self.choices, self.choices.below(6)
        if kind == 0:
            self._another_device(choices.below(8))
        elif kind == 1:
            self.device.ring_lie = choices.below(4), choices.below(6)
        early = kind > 1 and choices.flag()
        if early:
            self.speaker.say = self.say
        self.clock.begin()
        try:
            registers = _Registers(self.device, self.clock)
            self.transport = MmioTransport(registers, clock=self.clock, pause=self.clock.pause)
            self.channel = self.open()
        except SvsmError as error:
            self._refused(error)
            raise
        expect(not self.expected_start, f"started in spite of {self.expected_start}")
        if kind > 1:
            self.speaker.say = self.say
            self.device.storm = choices.below(8) == 1
            self.speaker.deaf = choices.below(8) == 1
        try:
            calls = 0
            while choices.more and calls < _CALLS:
                calls += 1
                self._call(choices.unsigned(1))
            self._end()
        finally:
            self.clock.begin()
            self.channel.close()
        if self.fault is not None:
            raise self.fault

    def _another_device(self, kind: int) -> None:
        """What no driver may start with."""
        if kind < 2:
            self.device.registers[int(MmioRegister.DEVICE_ID)] = int(DeviceType.BLOCK)
            self.expected_start = "virtio-device-type"
        elif kind == 2:
            self.common &= ~int(Feature.ACCESS_PLATFORM)
            self.device.registers[int(MmioRegister.DEVICE_FEATURES)] = int(Feature.VERSION_1) >> 32
            self.expected_start = "virtio-features-missing"
        else:
            self.misconfigure(self.choices)

    def codes(self) -> tuple[str, ...]:
        """What may end the channel."""
        stopped = ("virtio-needs-reset",) if self.device.status & DeviceStatus.NEEDS_RESET else ()
        return (*(code for code in (self.rules.code, self.expected_start) if code), *stopped, *self.device.told)

    def _refused(self, error: SvsmError) -> None:
        if self.expected_start:
            expect(error.code == self.expected_start, f"not refused for {self.expected_start}")
        expect(error.code == "channel-timeout" or error.code in self.codes(), f"refused for {error.code}, and why")
        expect(error.code != "channel-timeout" or self.speaker.say == self.say or self.told, "an honest device is late")

    @property
    def told(self) -> bool:
        """A ring has lied."""
        return bool(self.device.told)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _call(self, kind: int) -> None:
        choices = self.choices
        if kind & 15 == 15:
            self.device.status |= DeviceStatus.NEEDS_RESET
        elif kind & 15 == 14:
            self.device.ring_lie = choices.below(4), choices.below(6)
        if kind & 3 == 0:
            self._send(1 + choices.below(600))
        else:
            self._receive((1, 40, 600, 3000)[kind >> 4 & 3])
        self.bounded()

    def _guarded(self, action: Callable[[], object]) -> SvsmError | None:
        """Make a call; what is dead says the same again, and time is bounded."""
        begun, fault = self.clock.now, self.fault
        self.clock.begin()
        error: SvsmError | None = None
        try:
            action()
        except SvsmError as raised:
            error = raised
        expect(fault is None or error is fault, "what is dead says why, always the same")
        expect(self.clock.now - begun <= 2 * _SECONDS, "a call ends at its deadline")
        if error is not None and error.code != "channel-timeout" and fault is None:
            self.fault = error
            lost = error.code == "channel-closed" and (self.rules.deaf or self.broken)
            expect(lost or error.code in self.codes(), f"ended by {error.code}, and nobody knows why")
        return error

    def _send(self, length: int) -> SvsmError | None:
        deaf, data = self.rules.deaf, _SENT[:length]
        error = self._guarded(lambda: self.channel.send(data, deadline=self.clock.now + _SECONDS))
        expect(error is not None or not deaf, "sent to somebody who does not listen")
        return error

    def _receive(self, most: int) -> tuple[bytes, SvsmError | None]:
        got: list[bytes] = []
        error = self._guarded(lambda: got.append(self.channel.receive(most, deadline=self.clock.now + _SECONDS)))
        data = got[0] if got else b""
        expect(len(data) <= most, "no more than was asked for")
        expect(data == self.delivered[self.taken : self.taken + len(data)], "what is received is what was sent")
        self.taken += len(data)
        if error is None and not data:
            expect(self.rules.ended, "the stream ends, and nobody has ended it")
        return data, error

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """The device is silent now: all of its news is seen, and the end is what they say."""
        self.speaker.silent, self.speaker.deaf = True, False
        data, error = self._receive(3000)
        turns = 0
        while data and error is None:
            turns += 1
            expect(turns < _MOST_DRAINS, "a silent device is not drained")
            data, error = self._receive(3000)
        if error is not None and self.fault is None:  # nothing more came
            expect(not self.rules.ended, "the end of the stream is missed")
            expect(not self.broken, "a break of the stream is missed")
            expect(self.taken == len(self.delivered) or self.told, "bytes are missing")
        if self.fault is None:
            error = self._send(1) or error
        if self.fault is None:  # else it was judged when it was met
            codes, code = self.codes(), "" if error is None else error.code
            expect(code in self.device.told or not self.told, "a ring lies, and is believed")
            expect(not codes or self.told, f"alive in spite of {codes}")
