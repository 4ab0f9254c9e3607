# SPDX-License-Identifier: MIT OR Apache-2.0
"""ID blocks signed here: what holds, and what each change breaks."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.igvm import IgvmBuilder, IgvmFile, PlatformType
from svsm.formats.igvm.id_block import split_header
from svsm.formats.igvm.layout import PublicKey, Signature, SnpIdBlock
from svsm.formats.snp.id_block import IdBlock, PspPublicKey
from svsm.launch.digest import launch_digest
from svsm.launch.id_block import check_id_blocks, demand_id_blocks

_POLICY = 0x30000
_ID_KEY = ec.derive_private_key(0x1234567, ec.SECP384R1())
_AUTHOR_KEY = ec.derive_private_key(0x7654321, ec.SECP384R1())


def _little(number: int) -> bytes:
    return number.to_bytes(72, "little")


def _public(key: ec.EllipticCurvePrivateKey) -> PublicKey:
    numbers = key.public_key().public_numbers()
    return PublicKey(2, 0, _little(numbers.x), _little(numbers.y))


def _sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> Signature:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA384())))
    return Signature(_little(r), _little(s))


def _file(blocks: list[SnpIdBlock], *, policy: int = _POLICY) -> IgvmFile:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.policy(policy)
    builder.page(0x1000, b"p" * 4096)
    for block in blocks:
        builder.id_block(block)
    return builder.finish()


def _signed(*, author: bool = True) -> SnpIdBlock:
    digest = launch_digest(_file([]))
    family, image = b"f" * 16, b"i" * 16
    block = IdBlock(digest, family, image, 1, 7, _POLICY).pack()
    public = _public(_ID_KEY)
    psp = PspPublicKey(2, public.qx, public.qy, bytes(880)).pack()
    none = Signature(bytes(72), bytes(72))
    return SnpIdBlock(
        1,
        int(author),
        bytes(3),
        digest,
        family,
        image,
        1,
        7,
        1,
        int(author),
        _sign(_ID_KEY, block),
        public,
        _sign(_AUTHOR_KEY, psp) if author else none,
        _public(_AUTHOR_KEY) if author else PublicKey(0, 0, bytes(72), bytes(72)),
    )


@pytest.mark.parametrize("author", [False, True])
def test_a_good_block_holds(author: bool) -> None:
    file = _file([_signed(author=author)])
    digest = launch_digest(file)
    (check,) = check_id_blocks(file, digest)
    assert check.holds
    assert check.author_signature_valid is (True if author else None)
    assert (check.author_key_digest == bytes(48)) is not author
    demand_id_blocks([check], digest)


def _refusal(block: SnpIdBlock, *, policy: int = _POLICY) -> str:
    file = _file([block], policy=policy)
    digest = launch_digest(file)
    with pytest.raises(IntegrityError) as caught:
        demand_id_blocks(check_id_blocks(file, digest), digest)
    return caught.value.code


def test_each_change_is_noticed() -> None:
    good = _signed()
    other = _public(_AUTHOR_KEY)
    assert _refusal(good.replace(ld=b"x" * 48)) == "id-block-digest"
    for changed in (
        good.replace(family_id=bytes(16)),
        good.replace(image_id=bytes(16)),
        good.replace(guest_svn=8),
        good.replace(id_public_key=other),
        good.replace(id_public_key=good.id_public_key.replace(curve=1)),
        good.replace(id_public_key=good.id_public_key.replace(qx=b"\xff" * 72)),
        good.replace(id_key_signature=good.author_key_signature),
        good.replace(id_key_signature=Signature(bytes(72), bytes(72))),
        good.replace(id_key_signature=Signature(b"\xff" * 72, b"\xff" * 72)),
        good.replace(author_key_signature=good.id_key_signature),
        good.replace(author_public_key=good.id_public_key),
    ):
        assert _refusal(changed) == "id-block-signature"
    assert _refusal(good, policy=_POLICY | 1 << 19) == "id-block-signature"


def test_the_reserved_word_of_a_key_is_not_part_of_what_is_signed() -> None:
    good = _signed()
    file = _file([good.replace(id_public_key=good.id_public_key.replace(reserved_0x4=1))])
    (check,) = check_id_blocks(file, launch_digest(file))
    assert check.holds


def test_absent_and_one_bad_among_good() -> None:
    with pytest.raises(IntegrityError) as caught:
        demand_id_blocks([], bytes(48))
    assert caught.value.code == "id-block-absent"
    good = _signed()
    file = _file([good, good.replace(guest_svn=9)])
    digest = launch_digest(file)
    with pytest.raises(IntegrityError):
        demand_id_blocks(check_id_blocks(file, digest), digest)


def test_the_number_of_blocks_is_bounded() -> None:
    file = _file([_signed()] * 17)
    with pytest.raises(FormatError) as caught:
        check_id_blocks(file, bytes(48))
    assert caught.value.code == "igvm-limit"


def test_without_author_key_nothing_of_it_reaches_the_chip() -> None:
    block = dataclasses.replace(_signed(), author_key_enabled=0)
    _, auth = split_header(block, policy=_POLICY)
    assert auth.author_key_algorithm == 0
    assert auth.author_key.pack() == bytes(0x404)
    assert auth.id_key_signature.pack() == bytes(512)
    assert len(auth.pack()) == 4096
