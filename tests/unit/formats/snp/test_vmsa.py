# SPDX-License-Identifier: MIT OR Apache-2.0
"""The VMSA: offsets of the manual, the record, and the view that agrees with it."""

from __future__ import annotations

import dataclasses
import random

import pytest

from svsm.formats.errors import FormatError
from svsm.formats.snp.vmsa import VMSA_FIELDS, Segment, Vmsa, VmsaView

_MANUAL = {
    "es.selector": 0x000,
    "cs.base": 0x018,
    "ldtr.limit": 0x074,
    "tr.attributes": 0x092,
    "vmpl": 0x0CA,
    "cpl": 0x0CB,
    "efer": 0x0D0,
    "cr4": 0x148,
    "cr3": 0x150,
    "cr0": 0x158,
    "dr7": 0x160,
    "dr6": 0x168,
    "rflags": 0x170,
    "rip": 0x178,
    "rsp": 0x1D8,
    "rax": 0x1F8,
    "cr2": 0x240,
    "g_pat": 0x268,
    "pkru": 0x2E8,
    "rcx": 0x308,
    "rbx": 0x318,
    "rbp": 0x328,
    "r8": 0x340,
    "r15": 0x378,
    "guest_exit_info_1": 0x390,
    "guest_exit_info_2": 0x398,
    "sev_features": 0x3B0,
    "vintr_ctrl": 0x3B8,
    "guest_exit_code": 0x3C0,
    "virtual_tom": 0x3C8,
    "event_inj": 0x3E0,
    "xcr0": 0x3E8,
    "mxcsr": 0x408,
    "x87_fcw": 0x410,
}
"""AMD 24593, table B-4."""


def test_offsets_are_the_manuals() -> None:
    assert {name: VMSA_FIELDS[name][0] for name in _MANUAL} == _MANUAL


def test_any_page_round_trips() -> None:
    page = random.Random(3).randbytes(4096)
    assert Vmsa.parse(page).pack() == page


def test_replace_touches_one_register() -> None:
    page = bytearray(random.Random(4).randbytes(4096))
    changed = Vmsa.parse(page).replace(rax=0x1122334455667788).pack()
    page[0x1F8:0x200] = bytes.fromhex("8877665544332211")
    assert changed == page


def test_the_view_agrees_with_the_record() -> None:
    page = bytearray(random.Random(5).randbytes(4096))
    vmsa, view = Vmsa.parse(page), VmsaView(page)
    for name in VMSA_FIELDS:
        register, _, part = name.partition(".")
        value = getattr(vmsa, register)
        assert view.get(name) == (getattr(value, part) if part else value), name


def test_every_integer_of_the_record_is_in_the_view() -> None:
    integers = set()
    for field in dataclasses.fields(Vmsa()):
        value = getattr(Vmsa(), field.name)
        if isinstance(value, Segment):
            integers |= {f"{field.name}.{part}" for part in ("selector", "attributes", "limit", "base")}
        elif isinstance(value, int):
            integers.add(field.name)
    assert integers == set(VMSA_FIELDS)


def test_the_view_writes_in_place_and_nothing_else() -> None:
    page = bytearray(4096)
    view = VmsaView(memoryview(page))
    view.set("rip", 0xFFFFFFFFFFFFFFFF)
    view.set("vmpl", 2)
    view.set("cs.limit", 0xFFFFFFFF)
    assert Vmsa.parse(page) == Vmsa(rip=2**64 - 1, vmpl=2, cs=Segment(0, 0, 0xFFFFFFFF, 0))


@pytest.mark.parametrize(("name", "value"), [("vmpl", 256), ("cs.attributes", 1 << 16), ("rip", -1), ("rip", 1 << 64)])
def test_values_that_do_not_fit(name: str, value: int) -> None:
    page = bytearray(4096)
    with pytest.raises(FormatError) as caught:
        VmsaView(page).set(name, value)
    assert caught.value.code == "vmsa-register"
    assert page == bytes(4096)


@pytest.mark.parametrize("name", ["", "cs", "reserved_0xc8", "rzx", "fpreg_xmm"])
def test_unknown_registers(name: str) -> None:
    for action in (lambda: VmsaView(bytearray(4096)).get(name), lambda: VmsaView(bytearray(4096)).set(name, 0)):
        with pytest.raises(FormatError) as caught:
            action()
        assert caught.value.code == "vmsa-register"


@pytest.mark.parametrize("page", [bytearray(4095), bytearray(4097), memoryview(bytes(4096))])
def test_a_view_needs_a_writable_page(page: bytearray | memoryview) -> None:
    with pytest.raises(FormatError) as caught:
        VmsaView(page)
    assert caught.value.code == "vmsa-page"
