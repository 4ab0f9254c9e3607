# SPDX-License-Identifier: MIT OR Apache-2.0
"""The launch state machine: digest, policy, pages, ID block, each refusal with its firmware status."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from svsm.formats.errors import ProtocolError
from svsm.formats.snp.cpuid_page import CpuidFunction, pack_cpuid_page, parse_cpuid_page
from svsm.formats.snp.digest import LaunchDigest
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.id_block import EcdsaSignature, IdAuth, IdBlock, PspPublicKey, key_digest
from svsm.formats.snp.page_info import PageType
from svsm.formats.snp.secrets import SecretsPage
from svsm.hardware.launch import GuestContext, Launch, LaunchState, corrected_cpuid_page
from svsm.testing.machine_harness import throwaway_chip

POLICY = 0x3_0000
PAGE = b"\x5a" * 4096
CHIP = throwaway_chip()


def started(policy: int = POLICY) -> Launch:
    made = Launch(CHIP, os.urandom)
    made.start(policy)
    return made


def status_of(error: pytest.ExceptionInfo[ProtocolError]) -> object:
    assert error.value.code == "psp-refused"
    return error.value.details["status"]


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (0x1_0000, FirmwareStatus.INVALID_PARAM),
        (POLICY | 1 << 26, FirmwareStatus.INVALID_PARAM),
        (POLICY | 1 << 63, FirmwareStatus.INVALID_PARAM),
        (0x2_0000, FirmwareStatus.POLICY_FAILURE),
        (POLICY | 0x0200, FirmwareStatus.POLICY_FAILURE),
        (POLICY | 0x013B, FirmwareStatus.POLICY_FAILURE),
        (POLICY | 1 << 18, FirmwareStatus.POLICY_FAILURE),
        (POLICY | 1 << 22, FirmwareStatus.POLICY_FAILURE),
        (POLICY | 1 << 23, FirmwareStatus.POLICY_FAILURE),
        (POLICY | 1 << 24, FirmwareStatus.POLICY_FAILURE),
    ],
)
def test_policies_that_the_platform_does_not_keep(policy: int, status: int) -> None:
    launch = Launch(CHIP, os.urandom)
    with pytest.raises(ProtocolError) as error:
        launch.start(policy)
    assert status_of(error) == status
    assert launch.state is LaunchState.INIT


@pytest.mark.parametrize("policy", [POLICY, POLICY | 0x0137, POLICY | 1 << 19, POLICY | 1 << 20, POLICY | 1 << 25])
def test_policies_that_it_keeps(policy: int) -> None:
    assert started(policy).state is LaunchState.LAUNCH


def test_commands_out_of_order() -> None:
    launch = Launch(CHIP, os.urandom)
    with pytest.raises(ProtocolError) as error:
        launch.update(PageType.NORMAL, 0, PAGE)
    assert status_of(error) == FirmwareStatus.INVALID_GUEST_STATE
    with pytest.raises(ProtocolError):
        launch.finish(host_data=bytes(32), id_block=None, id_auth=None, author_key=False)
    launch.start(POLICY)
    with pytest.raises(ProtocolError):
        launch.start(POLICY)
    launch.finish(host_data=bytes(32), id_block=None, id_auth=None, author_key=False)
    commands: list[Callable[[], object]] = [
        lambda: launch.start(POLICY),
        lambda: launch.update(PageType.NORMAL, 0, PAGE),
        lambda: launch.finish(host_data=bytes(32), id_block=None, id_auth=None, author_key=False),
    ]
    for again in commands:
        with pytest.raises(ProtocolError) as error:
            again()
        assert status_of(error) == FirmwareStatus.INVALID_GUEST_STATE


def test_digest_is_the_chain_over_the_pages() -> None:
    launch = started()
    expected = LaunchDigest()
    for number, kind in enumerate((PageType.NORMAL, PageType.ZERO, PageType.UNMEASURED, PageType.VMSA)):
        launch.update(kind, number * 4096, PAGE)
        expected.update(kind, number * 4096, PAGE)
    assert launch.digest == expected.value


@pytest.mark.parametrize("kind", [0, 7, 255, 1 << 60])
def test_unknown_page_types(kind: int) -> None:
    with pytest.raises(ProtocolError) as error:
        started().update(kind, 0, PAGE)
    assert status_of(error) == FirmwareStatus.INVALID_PARAM


def test_secrets_are_fresh_and_what_the_context_has() -> None:
    first, second = started(), started()
    written = first.update(PageType.SECRETS, 0x1000, PAGE)
    assert written is not None
    page = SecretsPage.parse(written)
    first.finish(host_data=bytes(32), id_block=None, id_auth=None, author_key=False)
    assert first.context is not None
    assert first.context.vmpcks == page.vmpcks
    assert len(set(page.vmpcks)) == 4
    assert page.fms == CHIP.fms
    other = second.update(PageType.SECRETS, 0x1000, PAGE)
    assert other is not None
    assert not set(page.vmpcks) & set(SecretsPage.parse(other).vmpcks)
    assert page.vmpck0.hex() not in repr(page)
    assert page.vmpck0.hex() not in repr(first.context)


def test_a_zero_page_is_zero_afterwards() -> None:
    assert started().update(PageType.ZERO, 0, PAGE) == bytes(4096)


def test_cpuid_page_of_the_chip_is_accepted() -> None:
    launch = started()
    assert launch.update(PageType.CPUID, 0x2000, CHIP.cpuid_page()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"eax_in": 0x1234},
        {"ebx": 0},
        {"eax": 0xFFFF_FFFF},
        {"xcr0_in": 7},
    ],
)
def test_cpuid_page_that_claims_too_much_is_refused_and_corrected(change: dict[str, int]) -> None:
    functions = parse_cpuid_page(CHIP.cpuid_page())
    functions[0] = functions[0].replace(**change)
    page = pack_cpuid_page(functions)
    launch = started()
    before = launch.digest
    with pytest.raises(ProtocolError) as error:
        launch.update(PageType.CPUID, 0x2000, page)
    assert status_of(error) == FirmwareStatus.INVALID_PARAM
    assert launch.digest == before
    corrected = corrected_cpuid_page(page, CHIP)
    assert corrected is not None
    assert corrected_cpuid_page(corrected, CHIP) is None
    launch.update(PageType.CPUID, 0x2000, corrected)


def test_cpuid_features_may_be_hidden_but_not_invented() -> None:
    functions = parse_cpuid_page(CHIP.cpuid_page())
    features = next(i for i, function in enumerate(functions) if function.eax_in == 1)
    fewer = list(functions)
    fewer[features] = fewer[features].replace(edx=fewer[features].edx & ~1)
    assert corrected_cpuid_page(pack_cpuid_page(fewer), CHIP) is None
    more = list(functions)
    more[features] = more[features].replace(ecx=0xFFFF_FFFF)
    corrected = corrected_cpuid_page(pack_cpuid_page(more), CHIP)
    assert corrected is not None
    assert parse_cpuid_page(corrected)[features].ecx == functions[features].ecx


@pytest.mark.parametrize("page", [b"\xff" * 4096, (65).to_bytes(4, "little") + bytes(4092)])
def test_cpuid_page_that_is_none_becomes_the_chips(page: bytes) -> None:
    assert corrected_cpuid_page(page, CHIP) == CHIP.cpuid_page()


# ---- ID block ----------------------------------------------------------------------------------------------------


def psp_key(key: ec.EllipticCurvePrivateKey) -> PspPublicKey:
    numbers = key.public_key().public_numbers()
    return PspPublicKey(2, numbers.x.to_bytes(72, "little"), numbers.y.to_bytes(72, "little"), bytes(880))


def signed(key: ec.EllipticCurvePrivateKey, message: bytes) -> EcdsaSignature:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384())))
    return EcdsaSignature(r.to_bytes(72, "little"), s.to_bytes(72, "little"), bytes(368))


ID_KEY, AUTHOR_KEY = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())


def id_block(digest: bytes, **changes: object) -> IdBlock:
    return IdBlock(digest, b"F" * 16, b"I" * 16, 1, 7, POLICY).replace(**changes)


def id_auth(block: IdBlock) -> IdAuth:
    key = psp_key(ID_KEY)
    author = psp_key(AUTHOR_KEY)
    return IdAuth(
        1,
        1,
        bytes(56),
        signed(ID_KEY, block.pack()),
        key,
        bytes(60),
        signed(AUTHOR_KEY, key.pack()),
        author,
        bytes(892),
    )


def finish(launch: Launch, block: IdBlock, auth: IdAuth, *, author: bool = False) -> GuestContext:
    launch.finish(host_data=b"H" * 32, id_block=block.pack(), id_auth=auth.pack(), author_key=author)
    assert launch.context is not None
    return launch.context


@pytest.mark.parametrize("author", [False, True])
def test_id_block(author: bool) -> None:
    launch = started()
    launch.update(PageType.NORMAL, 0, PAGE)
    block = id_block(launch.digest)
    auth = id_auth(block)
    context = finish(launch, block, auth, author=author)
    assert (context.family_id, context.image_id, context.guest_svn) == (b"F" * 16, b"I" * 16, 7)
    assert context.id_key_digest == key_digest(psp_key(ID_KEY))
    assert context.author_key_digest == (key_digest(psp_key(AUTHOR_KEY)) if author else bytes(48))
    assert context.author_key_enabled is author
    assert context.host_data == b"H" * 32


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("digest", FirmwareStatus.BAD_MEASUREMENT),
        ("policy", FirmwareStatus.POLICY_FAILURE),
        ("version", FirmwareStatus.INVALID_PARAM),
        ("algorithm", FirmwareStatus.INVALID_PARAM),
        ("author-algorithm", FirmwareStatus.INVALID_PARAM),
        ("curve", FirmwareStatus.INVALID_PARAM),
        ("signature", FirmwareStatus.BAD_SIGNATURE),
        ("zero-signature", FirmwareStatus.BAD_SIGNATURE),
        ("author-signature", FirmwareStatus.BAD_SIGNATURE),
        ("off-curve", FirmwareStatus.BAD_SIGNATURE),
        ("image-id-after-signing", FirmwareStatus.BAD_SIGNATURE),
        ("id-key-after-signing", FirmwareStatus.BAD_SIGNATURE),
    ],
)
def test_id_block_refusals(case: str, status: int) -> None:
    launch = started()
    launch.update(PageType.NORMAL, 0, PAGE)
    block = id_block(launch.digest)
    if case == "digest":
        block = id_block(bytes(48))
    elif case == "policy":
        block = block.replace(policy=POLICY | 1 << 19)
    elif case == "version":
        block = block.replace(version=2)
    auth = id_auth(block)
    zero = EcdsaSignature(bytes(72), bytes(72), bytes(368))
    changes: dict[str, dict[str, object]] = {
        "algorithm": {"id_key_algorithm": 2},
        "author-algorithm": {"author_key_algorithm": 0},
        "curve": {"id_key": auth.id_key.replace(curve=1)},
        "signature": {"id_block_signature": signed(AUTHOR_KEY, block.pack())},
        "zero-signature": {"id_block_signature": zero},
        "author-signature": {"id_key_signature": signed(ID_KEY, auth.id_key.pack())},
        "off-curve": {"id_key": auth.id_key.replace(qx=(5).to_bytes(72, "little"))},
        "id-key-after-signing": {"id_key": psp_key(AUTHOR_KEY)},
    }
    auth = auth.replace(**changes.get(case, {}))
    if case == "image-id-after-signing":
        block = block.replace(image_id=b"X" * 16)
    with pytest.raises(ProtocolError) as error:
        finish(launch, block, auth, author=True)
    assert status_of(error) == status
    assert launch.context is None
    launch.finish(host_data=bytes(32), id_block=None, id_auth=None, author_key=False)


@pytest.mark.parametrize(
    ("host_data", "block", "auth"), [(31, None, None), (32, 96, None), (32, 95, 4096), (32, 96, 4095)]
)
def test_finish_with_wrong_sizes(host_data: int, block: int | None, auth: int | None) -> None:
    with pytest.raises(ProtocolError) as error:
        started().finish(
            host_data=bytes(host_data),
            id_block=None if block is None else bytes(block),
            id_auth=None if auth is None else bytes(auth),
            author_key=False,
        )
    assert status_of(error) == FirmwareStatus.INVALID_PARAM


def test_functions_of_the_chip_name_it() -> None:
    functions = {function.eax_in: function for function in parse_cpuid_page(CHIP.cpuid_page())}
    vendor = b"".join(word.to_bytes(4, "little") for word in (functions[0].ebx, functions[0].edx, functions[0].ecx))
    assert vendor == b"AuthenticAMD"
    assert functions[1].eax == 0x00A0_0F11
    assert functions[0x8000_001F].eax & 1 << 4
    assert isinstance(functions[1], CpuidFunction)
