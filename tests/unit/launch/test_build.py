# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our image: layout, register contract, payload digest, and what every byte of the file is good for."""

from __future__ import annotations

import collections
import hashlib
import struct
import zlib

import pytest

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.igvm import IgvmBuilder, IgvmFile, PlatformType, StepKind, guest_policy, plan
from svsm.formats.snp.page_info import PageType
from svsm.formats.snp.vmsa import Vmsa
from svsm.kernel import simulated_platform as kernel_platform
from svsm.launch.build import (
    ARCHIVE_GPA,
    CONFIGURATION_BYTES,
    CONFIGURATION_GPA,
    CPUID_GPA,
    DEVICE_TREE_BYTES,
    DEVICE_TREE_GPA,
    LOADER_GPA,
    SECRETS_GPA,
    build_image,
    start_vmsa,
)
from svsm.launch.digest import (
    SETTINGS_GPA,
    launch_digest,
    launch_digest_from_payload,
    payload_digest,
)

_LOADER = b"print('hello')\n" * 300
_ARCHIVE = hashlib.shake_256(b"archive").digest(9000)
_SETTINGS = b"settings of an owner"


def _image(**changes: object) -> bytes:
    values: dict[str, object] = {"loader": _LOADER, "archive": _ARCHIVE, "settings": _SETTINGS} | changes
    return build_image(**values)  # type: ignore[arg-type]


def test_layout_and_order() -> None:
    steps = list(plan(IgvmFile.parse(_image())))
    shape = [(step.page_type, step.gpa) for step in steps]
    assert shape == [
        *((PageType.UNMEASURED, CONFIGURATION_GPA + 4096 * index) for index in range(4)),
        *((PageType.UNMEASURED, DEVICE_TREE_GPA + 4096 * index) for index in range(4)),
        (PageType.SECRETS, SECRETS_GPA),
        (PageType.CPUID, CPUID_GPA),
        (PageType.NORMAL, LOADER_GPA),
        (PageType.NORMAL, LOADER_GPA + 4096),
        (PageType.NORMAL, ARCHIVE_GPA),
        (PageType.NORMAL, ARCHIVE_GPA + 4096),
        (PageType.NORMAL, ARCHIVE_GPA + 8192),
        (PageType.NORMAL, SETTINGS_GPA),
        (PageType.VMSA, 0xFFFFFFFFF000),
    ]
    loaded = {step.gpa: bytes(step.contents) for step in steps if step.contents is not None}
    assert b"".join(loaded[LOADER_GPA + 4096 * index] for index in range(2)) == _LOADER.ljust(8192, b"\0")
    assert b"".join(loaded[ARCHIVE_GPA + 4096 * index] for index in range(3)) == _ARCHIVE.ljust(12288, b"\0")
    assert loaded[SETTINGS_GPA] == _SETTINGS.ljust(4096, b"\0")


def test_kernel_and_image_agree_on_the_areas() -> None:
    assert (CONFIGURATION_BYTES, DEVICE_TREE_BYTES) == (
        kernel_platform.CONFIGURATION_BYTES,
        kernel_platform.DEVICE_TREE_BYTES,
    )
    assert CONFIGURATION_GPA + CONFIGURATION_BYTES <= DEVICE_TREE_GPA
    assert DEVICE_TREE_GPA + DEVICE_TREE_BYTES <= LOADER_GPA


def test_the_register_contract_is_measured() -> None:
    step = list(plan(IgvmFile.parse(_image())))[-1]
    assert step.kind is StepKind.VMSA
    assert step.contents is not None
    vmsa = Vmsa.parse(step.contents)
    assert (vmsa.rip, vmsa.rcx) == (LOADER_GPA, len(_LOADER))
    assert (vmsa.rdx, vmsa.r8) == (ARCHIVE_GPA, len(_ARCHIVE))
    assert (vmsa.rsi, vmsa.rdi, vmsa.r9, vmsa.rbx) == (SETTINGS_GPA, CONFIGURATION_GPA, DEVICE_TREE_GPA, SECRETS_GPA)
    assert (vmsa.vmpl, vmsa.sev_features & 1, vmsa.efer) == (0, 1, 0x1000)


def test_the_same_input_makes_the_same_bytes() -> None:
    assert _image() == _image()
    assert IgvmFile.parse(_image()).pack() == _image()


def test_the_payload_digest_is_the_same_for_every_owner() -> None:
    files = [IgvmFile.parse(_image(settings=settings)) for settings in (b"", b"a", b"b" * 4096)]
    assert len({payload_digest(file) for file in files}) == 1
    assert len({launch_digest(file) for file in files}) == 3


def test_the_launch_digest_follows_from_the_payload_digest() -> None:
    file = IgvmFile.parse(_image())
    vmsa = start_vmsa(loader_bytes=len(_LOADER), archive_bytes=len(_ARCHIVE)).pack()
    for settings in (b"", _SETTINGS, b"z" * 4096):
        expected = launch_digest(IgvmFile.parse(_image(settings=settings)))
        assert launch_digest_from_payload(payload_digest(file), settings, vmsa) == expected


def test_policy_and_boundary_do_not_change_the_digest() -> None:
    other = IgvmFile.parse(_image(policy=0xB0000, vtom_gpa=1 << 46))
    assert guest_policy(other) == 0xB0000
    assert launch_digest(other) == launch_digest(IgvmFile.parse(_image()))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"loader": b""}, "image-loader"),
        ({"loader": bytes(SETTINGS_GPA - LOADER_GPA + 1)}, "image-loader"),
        ({"archive": b""}, "image-archive"),
        ({"settings": bytes(4097)}, "image-settings"),
        ({"policy": 0x10000}, "image-policy"),
        ({"policy": 1 << 64 | 0x30000}, "image-policy"),
        ({"policy": -1}, "image-policy"),
        ({"vtom_gpa": 1}, "igvm-alignment"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, object], code: str) -> None:
    with pytest.raises(FormatError) as caught:
        _image(**changes)
    assert caught.value.code == code


def test_other_files_have_no_payload_digest() -> None:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    builder.page(0x1000, b"x" * 4096)
    _demand_no_payload_digest(builder)
    builder.page(SETTINGS_GPA, b"s" * 4096)
    _demand_no_payload_digest(builder)
    builder.vp_context(0xFFFFFFFFF000, Vmsa(rsi=1).pack(), vp_index=0)
    _demand_no_payload_digest(builder)
    builder.page(0x2000, b"y" * 4096)
    _demand_no_payload_digest(builder)


def _demand_no_payload_digest(builder: IgvmBuilder) -> None:
    with pytest.raises(FormatError) as caught:
        payload_digest(builder.finish())
    assert caught.value.code == "igvm-not-our-layout"


def _resealed(image: bytearray) -> bytes:
    size = struct.unpack_from("<I", image, 12)[0]
    image[20:24] = bytes(4)
    image[20:24] = struct.pack("<I", zlib.crc32(image[: 24 + size]))
    return bytes(image)


def _verdict(image: bytes, expected: bytes) -> str:
    try:
        return "same" if launch_digest(IgvmFile.parse(image)) == expected else "other digest"
    except SvsmError:
        return "error"


def _unmeasured_fields(image: bytes) -> dict[int, str]:
    """File offset of each byte that the launch digest does not cover, and what it is: derived from the format."""
    names = {
        (0x001, 0): "platform header",
        (0x101, 0): "policy",
        (0x305, 0): "required memory",
        (0x301, 8): "index and initial contents of the parameter area",
        (0x312, 0): "where in which area the device tree is",
    }
    found: dict[int, str] = {}
    position, end = 24, 24 + struct.unpack_from("<I", image, 12)[0]
    while position < end:
        kind, length = struct.unpack_from("<II", image, position)
        if kind in (0x101, 0x305, 0x312):
            found |= dict.fromkeys(range(position, position + 8), "head of a header that adds nothing to the digest")
        for offset in range(length):
            if kind in (0x001, 0x101, 0x305, 0x312):
                found[position + 8 + offset] = names[kind, 0]
            elif kind == 0x301 and offset >= 8:
                found[position + 8 + offset] = names[kind, 8]
            elif kind == 0x302 and 12 <= offset < 16 and image[position + 8 + 20]:
                found[position + 8 + offset] = "data offset of a secrets or CPUID page"
            elif kind in (0x302, 0x303, 0x304) and 8 <= offset < 12:
                found[position + 8 + offset] = "further bits of a compatibility mask"
            elif kind == 0x302 and 20 <= offset < 22:
                found[position + 8 + offset] = "kind of a CPUID page"
            elif kind == 0x302 and offset == 16 and image[position + 8 + 20]:
                found[position + 8 + offset] = "unmeasured flag of a secrets or CPUID page"
            elif kind == 0x304 and 16 <= offset < 18:
                found[position + 8 + offset] = "VP index"
        position += 8 + length + -length % 8
    return found


def _flip_each(positions: range) -> collections.Counter[str]:
    image = _image()
    expected = launch_digest(IgvmFile.parse(image))
    verdicts: collections.Counter[str] = collections.Counter()
    for position in positions:
        damaged = bytearray(image)
        damaged[position] ^= 0xFF
        verdicts[_verdict(bytes(damaged), expected)] += 1
    return verdicts


def test_flipped_bytes_are_errors_or_another_digest() -> None:
    """As stored: all headers are under the checksum, all data in a measured page. Headers whole, data sampled."""
    end = 24 + struct.unpack_from("<I", _image(), 12)[0]
    assert _flip_each(range(end)) == {"error": end}
    sample = range(end, len(_image()), 41)
    assert _flip_each(sample) == {"other digest": len(sample)}


@pytest.mark.long
def test_every_flipped_byte_is_an_error_or_another_digest() -> None:
    verdicts = _flip_each(range(len(_image())))
    assert set(verdicts) == {"error", "other digest"}


def test_with_the_checksum_corrected_only_unmeasured_fields_can_change() -> None:
    """Who changes a header can also make its checksum right; then only what SNP does not measure is free."""
    image = _image()
    expected = launch_digest(IgvmFile.parse(image))
    allowed = _unmeasured_fields(image)
    free: collections.Counter[str] = collections.Counter()
    end = 24 + struct.unpack_from("<I", image, 12)[0]
    for position in range(24, end):
        for bit in range(8):
            damaged = bytearray(image)
            damaged[position] ^= 1 << bit
            if _verdict(_resealed(damaged), expected) == "same":
                assert position in allowed, position
                free[allowed[position]] += 1
    assert free == {
        "platform header": 53,
        "policy": 96,
        "required memory": 105,
        "head of a header that adds nothing to the digest": 2,
        "index and initial contents of the parameter area": 2 * 5,
        "where in which area the device tree is": 14,
        "further bits of a compatibility mask": 10 * 31,
        "data offset of a secrets or CPUID page": 12,
        "unmeasured flag of a secrets or CPUID page": 2,
        "kind of a CPUID page": 1,
        "VP index": 16,
    }
