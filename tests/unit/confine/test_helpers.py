# SPDX-License-Identifier: MIT OR Apache-2.0
"""Callback slots, uids of roles, memory kept out of dumps, and the shape of a process's report."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from svsm.confine import Isolation, Role, callbacks
from svsm.confine.callbacks import SLOTS, executable, install, slot_code
from svsm.confine.identity import role_uid
from svsm.formats.errors import BackendError, StateError

ADD_ONE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The page of slots with its data page, mapped as the loader maps them (executable and writable, though)."""
    monkeypatch.setattr(callbacks._Slots, "base", 0)
    monkeypatch.setattr(callbacks._Slots, "used", 0)
    memory = mmap.mmap(-1, 8192, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(slot_code())
    anchor = ctypes.c_char.from_buffer(memory)
    install(ctypes.addressof(anchor))
    yield ctypes.addressof(anchor)
    del anchor
    memory.close()


def address(function: object) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert value is not None
    return value


def test_outside_a_payload_an_address_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks._Slots, "base", 0)
    assert executable(12345) == 12345


def test_every_slot_calls_its_own_function(slots: int) -> None:
    functions = [ADD_ONE(lambda value, more=index: value + more) for index in range(SLOTS)]
    addresses = [executable(address(function)) for function in functions]
    assert addresses == [slots + 32 * index for index in range(SLOTS)]
    assert [ADD_ONE(where)(100) for where in addresses] == [100 + index for index in range(SLOTS)]
    with pytest.raises(BackendError) as caught:
        executable(address(functions[0]))
    assert caught.value.code == "confine-callbacks"


def test_what_is_no_closure_gets_no_slot(slots: int) -> None:
    assert slots
    something = ctypes.create_string_buffer(b"\x90" * 64)
    with pytest.raises(BackendError) as caught:
        executable(ctypes.addressof(something))
    assert caught.value.code == "confine-callbacks"
    with pytest.raises(StateError):
        install(4096)


def test_slot_code_is_one_page_of_fixed_bytes() -> None:
    assert len(slot_code()) == 4096
    assert slot_code()[:32].hex() == "f30f1efa4c8b15f50f0000ff25f70f0000" + "cc" * 15


def test_uids_are_apart_and_bounded() -> None:
    uids = [role_uid(role, instance) for role in Role for instance in (0, 1, 255)]
    if os.geteuid() == 0:
        assert len(set(uids)) == len(uids)
        assert all(uid is not None and uid >> 16 == 0x5356 for uid in uids)
    else:
        assert set(uids) == {None}
    for instance in (-1, 256):
        with pytest.raises(StateError) as caught:
            role_uid(Role.SERVICE, instance)
        assert caught.value.code == "confine-instance"


def test_the_report_has_stable_keys() -> None:
    report = Isolation(Role.KERNEL, 1, True, 7, True, ())
    assert sorted(report.as_json()) == ["landlock_abi", "own_uid", "reduced", "role", "seccomp", "uid"]
