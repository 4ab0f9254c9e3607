# SPDX-License-Identifier: MIT OR Apache-2.0
"""The TPM core in this process: one library, one TPM, a store that the test controls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

import svsm.services.vtpm
from svsm.formats import tpm
from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.tpm_envelope import TpmEnvelope
from svsm.services.syscalls import KernelGone
from svsm.services.vtpm.library import Library
from svsm.services.vtpm.tpm import DictionaryAttack, Tpm
from svsm.testing import libtpms_abi
from tests.support import absent

NV_DEFINE = bytes.fromhex(
    "80020000002d0000012a4000000100000009400000090000000000"  # TPM2_NV_DefineSpace by the owner
    "0000"  # no authorisation value
    "000e01500001000b0206000600000008"  # index, SHA-256, owner and auth may read and write, no policy, 8 bytes
)


@functools.cache
def library() -> Library:
    """There is one per process."""
    try:
        return Library("libtpms.so.0")
    except BackendError as error:
        raise absent(f"libtpms ({error})") from None


class Store:
    """One file."""

    def __init__(self) -> None:
        self.contents = b""
        self.stores = 0
        self.fail: Exception | None = None

    def load(self) -> bytes:
        """The file."""
        return self.contents

    def store(self, data: bytes) -> None:
        """Replace it."""
        if self.fail is not None:
            raise self.fail
        self.contents = data
        self.stores += 1


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def make(store: Store) -> Callable[[], Tpm]:
    def made() -> Tpm:
        return Tpm(library(), store.load, store.store)

    return made


def _write(value: bytes) -> bytes:
    body = len(value).to_bytes(2, "big") + value + b"\0\0"
    rest = bytes.fromhex("400000010150000100000009400000090000000000") + body
    return tpm.CommandHeader(0x8002, 10 + len(rest), 0x137).pack() + rest


def _code(response: bytes) -> int:
    return tpm.response_code(response)


def _started(make: Callable[[], Tpm]) -> Tpm:
    made = make()
    made.prepare(new_guest=True)
    made.power_on(startup=True)
    return made


def test_the_generated_declarations_are_those_of_their_source() -> None:
    generated = Path(svsm.services.vtpm.__file__).with_name("_libtpms_abi.py").read_text()
    assert generated == libtpms_abi.generate()


def test_manufacture_is_one_store_with_the_parameters_asked_for(make: Callable[[], Tpm], store: Store) -> None:
    made = make()
    made.prepare(new_guest=True)
    assert store.stores == 1
    name = made.ek_name
    assert name is not None
    assert len(name) == tpm.EK_NAME_BYTES
    made.power_on(startup=True)
    properties = tpm.parse_properties(made.execute(tpm.get_capability(6, 0x20E, 4)))
    expected = DictionaryAttack()
    assert properties[0x20E] == 0
    assert properties[0x20F] == expected.max_tries
    assert properties[0x210] == expected.recovery_seconds
    assert properties[0x211] == expected.lockout_recovery_seconds
    made.power_off(orderly=True)


def test_the_announced_name_is_the_one_of_the_key_the_guest_creates(make: Callable[[], Tpm]) -> None:
    made = _started(make)
    _, public = tpm.parse_create_primary(made.execute(tpm.create_ek()))
    assert tpm.ek_name(public) == made.ek_name
    made.power_off(orderly=True)


def test_a_second_start_finds_the_same_tpm_and_stores_nothing_before_it_is_powered(
    make: Callable[[], Tpm], store: Store
) -> None:
    first = _started(make)
    first.power_off(orderly=True)
    before, stores = store.contents, store.stores
    second = make()
    second.prepare(new_guest=True)
    assert (store.contents, store.stores) == (before, stores)
    assert second.ek_name == first.ek_name


def test_a_lost_store_is_a_failure_and_the_old_state_comes_back(make: Callable[[], Tpm], store: Store) -> None:
    made = _started(make)
    assert _code(made.execute(NV_DEFINE)) == 0
    assert _code(made.execute(_write(b"12345678"))) == 0
    before = store.contents
    store.fail = OSError("lost")
    assert _code(made.execute(_write(b"87654321"))) == tpm.RC_FAILURE
    assert not made.running
    store.fail = None
    assert _code(made.execute(tpm.get_random(1))) == tpm.RC_FAILURE  # until the guest resets
    assert store.contents == before
    made.power_on(startup=True)
    read = tpm.CommandHeader(0x8002, 35, 0x14E).pack() + bytes.fromhex(
        "40000001015000010000000940000009000000000000080000"
    )
    assert b"12345678" in made.execute(read)
    made.power_off(orderly=True)


def test_a_kernel_that_goes_away_during_a_store_ends_the_service(make: Callable[[], Tpm], store: Store) -> None:
    made = _started(make)
    store.fail = KernelGone("gone", code="syscall-closed")
    with pytest.raises(KernelGone):
        made.execute(NV_DEFINE)
    assert not made.running


@pytest.mark.parametrize("damage", [0, 20, 63, 200, -1])
def test_a_damaged_state_file_is_refused_and_not_overwritten(
    make: Callable[[], Tpm], store: Store, damage: int
) -> None:
    make().prepare(new_guest=True)
    damaged = bytearray(store.contents)
    damaged[damage] ^= 0x10
    store.contents = bytes(damaged)
    with pytest.raises(SvsmError):
        make().prepare(new_guest=True)
    assert store.contents == bytes(damaged)


def test_a_state_that_the_library_refuses_is_an_error(make: Callable[[], Tpm], store: Store) -> None:
    store.contents = TpmEnvelope(b"nonsense" * 100, 1, None).pack()
    with pytest.raises(BackendError) as caught:
        make().prepare(new_guest=True)
    assert caught.value.code == "tpm-state"


def test_pcrs_of_an_earlier_guest_cannot_be_resumed(make: Callable[[], Tpm], store: Store) -> None:
    first = _started(make)
    assert _code(first.execute(tpm.shutdown(tpm.SU_STATE))) == 0
    saved = store.contents
    first.power_off(orderly=False)  # killed: nobody could discard it
    assert store.contents == saved
    crashed = make()
    crashed.prepare(new_guest=False)
    crashed.power_on(startup=False)
    assert _code(crashed.execute(tpm.startup(tpm.SU_STATE))) == 0  # the saved state was really there
    crashed.power_off(orderly=False)
    store.contents = saved
    second = make()
    second.prepare(new_guest=True)
    second.power_on(startup=False)
    assert _code(second.execute(tpm.startup(tpm.SU_STATE))) != 0
    assert _code(second.execute(tpm.startup())) == 0
    second.power_off(orderly=True)


def test_an_orderly_end_discards_what_the_guest_saved(make: Callable[[], Tpm]) -> None:
    first = _started(make)
    assert _code(first.execute(tpm.shutdown(tpm.SU_STATE))) == 0
    first.power_off(orderly=True)
    first.power_on(startup=False)  # CMD_SHUTDOWN, then CMD_INIT for the next guest
    assert _code(first.execute(tpm.startup(tpm.SU_STATE))) != 0
    first.power_off(orderly=False)


def test_after_change_eps_the_name_is_computed_anew(make: Callable[[], Tpm]) -> None:
    first = _started(make)
    old = first.ek_name
    rest = bytes.fromhex("4000000c00000009400000090000000000")
    assert _code(first.execute(tpm.CommandHeader(0x8002, 10 + len(rest), tpm.CC_CHANGE_EPS).pack() + rest)) == 0
    assert first.ek_name is None
    first.power_off(orderly=True)
    second = _started(make)
    _, public = tpm.parse_create_primary(second.execute(tpm.create_ek()))
    assert second.ek_name == tpm.ek_name(public)
    assert second.ek_name not in (None, old)
    second.power_off(orderly=True)


def test_a_tpm_that_is_off_answers_failure(make: Callable[[], Tpm]) -> None:
    made = make()
    made.prepare(new_guest=True)
    assert made.execute(tpm.get_random(4)) == tpm.failure_response()


def test_the_buffer_size_changes_only_while_off(make: Callable[[], Tpm]) -> None:
    made = _started(make)
    assert made.buffer_size(0) == (4096, 2808, 4096)
    with pytest.raises(SvsmError):
        made.buffer_size(3000)
    made.power_off(orderly=True)
    assert made.buffer_size(3000)[0] == 3000
    assert made.buffer_size(4096)[0] == 4096


@pytest.mark.parametrize("command", [b"", b"\x80", bytes(10), bytes(4096), b"\xff" * 4096, tpm.get_random(8)[:-1]])
def test_nonsense_is_answered_by_the_tpm_with_an_error(make: Callable[[], Tpm], command: bytes) -> None:
    made = _started(make)
    assert _code(made.execute(command)) != 0
    assert _code(made.execute(tpm.get_random(8))) == 0
    made.power_off(orderly=True)
