# SPDX-License-Identifier: MIT OR Apache-2.0
"""The TIS driver on a model of a TPM's registers: in order, in bursts, and with a TPM that breaks every rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from svsm.formats import tpm
from svsm.formats.errors import BackendError, ProtocolError, StateError
from svsm.testing.tpm_tis import PAGE_BYTES, Access, Register, Status, Tis

_RESPONSE = tpm.ResponseHeader(0x8001, 14, 0).pack() + b"four"
_SPEC_OFFSETS = (0x00, 0x08, 0x10, 0x14, 0x18, 0x24, 0x30, 0xF00)


class Model:
    """Locality 1 of a TPM; attributes are what it can do wrong."""

    def __init__(self, *, burst: int = 7) -> None:
        self.burst = burst
        self.now = 0.0
        self.access = Access.VALID
        self.grants = True
        self.gets_ready = True
        self.status = Status(0)
        self.received = b""
        self.answer = _RESPONSE
        self.left = b""
        self.forced = Status(0)
        self.cleared = Status(0)
        self.log: list[int] = []

    def clock(self) -> float:
        """A tick each time somebody looks."""
        self.now += 0.01
        return self.now

    def read(self, offset: int, width_bytes: int) -> int:
        assert offset // PAGE_BYTES == 1
        if offset % PAGE_BYTES == Register.ACCESS:
            assert width_bytes == 1
            return self.access
        assert (offset % PAGE_BYTES, width_bytes) == (Register.STS, 4)
        return (self.status | self.forced) & ~self.cleared | self.burst << 8

    def write(self, offset: int, width_bytes: int, value: int) -> None:
        self.log.append(value)
        if offset % PAGE_BYTES == Register.ACCESS:
            if value == Access.REQUEST_USE and self.grants:
                self.access |= Access.ACTIVE_LOCALITY
            elif value == Access.ACTIVE_LOCALITY:
                self.access &= ~Access.ACTIVE_LOCALITY
        elif value == Status.COMMAND_READY:
            self.received, self.left = b"", b""
            self.status = Status.COMMAND_READY if self.gets_ready else Status(0)
        elif value == Status.GO and self.status == Status.VALID:
            self.left = self.answer
            self.status = Status.VALID | Status.DATA_AVAIL

    def read_bytes(self, offset: int, count: int) -> bytes:
        assert count <= self.burst, "more than the burst count"
        taken, self.left = self.left[:count], self.left[count:]
        if not self.left:
            self.status &= ~Status.DATA_AVAIL
        return taken

    def write_bytes(self, offset: int, data: bytes) -> None:
        assert len(data) <= self.burst, "more than the burst count"
        self.received += data
        size = int.from_bytes(self.received[2:6], "big") if len(self.received) > 5 else 1 << 32
        self.status = Status.VALID | (Status.EXPECT if len(self.received) < size else Status(0))


def test_the_layout_is_the_profiles() -> None:
    assert tuple(Register) == _SPEC_OFFSETS
    assert (Access.ACTIVE_LOCALITY, Access.REQUEST_USE, Access.SEIZE) == (0x20, 0x02, 0x08)
    assert (Status.COMMAND_READY, Status.GO, Status.DATA_AVAIL, Status.EXPECT) == (0x40, 0x20, 0x10, 0x08)


@pytest.mark.parametrize("burst", [1, 2, 7, 64, 0xFFFF])
def test_a_command_in_bursts(burst: int) -> None:
    model = Model(burst=burst)
    tis = Tis(model, locality=1, clock=model.clock)
    tis.request()
    command = tpm.create_ek()
    for _ in range(2):
        tis.ready()
        tis.send(command)
        assert model.received == command
        tis.write_status(Status.GO)
        assert tis.receive(model.now + 5) == _RESPONSE
    assert tis.ask(tpm.get_random(8)) == _RESPONSE
    tis.release()
    assert not model.access & Access.ACTIVE_LOCALITY


def _no_burst(model: Model) -> None:
    model.burst = 0


def _never_ready(model: Model) -> None:
    model.gets_ready = False


def _never_valid(model: Model) -> None:
    model.cleared = Status.VALID


def _never_data(model: Model) -> None:
    model.cleared = Status.DATA_AVAIL


def _taken(model: Model) -> None:
    model.access &= ~Access.ACTIVE_LOCALITY


def _all_ones(model: Model) -> None:
    model.forced, model.burst = Status(0xFF00_00FF), 0xFFFF


def _full(model: Model) -> None:
    model.cleared = Status.EXPECT


def _hungry(model: Model) -> None:
    model.forced = Status.EXPECT


def _answers(answer: bytes) -> Callable[[Model], None]:
    def spoil(model: Model) -> None:
        model.answer = answer

    spoil.__name__ = f"answers_{len(answer)}_bytes_{answer[2:6].hex()}"
    return spoil


def _header(size: int) -> bytes:
    return tpm.ResponseHeader(0x8001, size, 0).pack()


_WRONG = [
    (_no_burst, "tis-timeout"),
    (_never_ready, "tis-timeout"),
    (_never_valid, "tis-timeout"),
    (_never_data, "tis-timeout"),
    (_taken, "tis-seized"),
    (_all_ones, "tis-seized"),
    (_full, "tis-protocol"),
    (_hungry, "tis-protocol"),
    (_answers(b"\x80\x01\0"), "tis-protocol"),
    (_answers(_header(9)), "tis-protocol"),
    (_answers(_header(4097) + bytes(4087)), "tis-protocol"),
    (_answers(_header(0xFFFF_FFFF)), "tis-protocol"),
    (_answers(_header(20) + bytes(9)), "tis-protocol"),
    (_answers(_header(20) + bytes(11)), "tis-protocol"),
]


@pytest.mark.parametrize(("spoil", "code"), _WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_tpm_that_breaks_the_rules_is_refused_in_time(spoil: Callable[[Model], None], code: str) -> None:
    model = Model()
    tis = Tis(model, locality=1, clock=model.clock)
    tis.request()
    spoil(model)
    with pytest.raises((BackendError, ProtocolError)) as caught:
        tis.ask(tpm.get_random(8), seconds=5)
    assert caught.value.code == code
    assert model.now < 60


def test_a_locality_that_is_not_granted() -> None:
    model = Model()
    model.grants = False
    tis = Tis(model, locality=1, clock=model.clock)
    for call in (tis.request, tis.seize):
        with pytest.raises(BackendError) as caught:
            call()
        assert caught.value.code == "tis-timeout"
    with pytest.raises(StateError) as wrong:
        Tis(model, locality=4)
    assert wrong.value.code == "tis-locality"
    model.access = Access(0)
    with pytest.raises(BackendError):
        tis.request()
