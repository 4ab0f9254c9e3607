# SPDX-License-Identifier: MIT OR Apache-2.0
"""IGVM files that Microsoft's crate and COCONUT's igvmbuilder wrote, and what their readers make of them.

Origin, tool versions and commands: ``README.md`` in the vectors. Nothing of a header is left out of a comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import lzma
import tarfile
import time
from typing import Any

import pytest

from svsm.formats.errors import FormatError, IntegrityError, SvsmError
from svsm.formats.igvm import HeaderType, IgvmBuilder, IgvmFile, Order, PageFlag, PlatformType, guest_policy
from svsm.formats.igvm.file import packed_size_bytes, page_bytes
from svsm.formats.igvm.layout import (
    PARAMETER_TYPES,
    Corim,
    ErrorRange,
    GuestPolicy,
    PageData,
    PageTableRelocation,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RelocatableRegion,
    RequiredMemory,
    SnpIdBlock,
    SupportedPlatform,
    VbsMeasurement,
    VpContext,
)
from svsm.formats.record import Record
from svsm.formats.snp.vmsa import Segment, Vmsa
from svsm.launch.digest import launch_digest
from svsm.launch.id_block import check_id_blocks, demand_id_blocks
from tests.support import vectors

_REFUSED = {
    "base-cca-v2": "igvm-unsupported-architecture",
    "platform-cca-v2": "igvm-unsupported-architecture",
    "init-cca-policy-hashes-v2": "igvm-unsupported-architecture",
    "platform-vsm-aarch64-v2": "igvm-unsupported-architecture",
    # a page with the 2 MiB flag and 4 KiB of data: igvmmeasure aborts, the crate takes it for 4 KiB
    "directive-page-2mb-data-v1": "igvm-data-range",
    "directive-page-2mb-data-v2": "igvm-data-range",
}
"""Files of the set that are refused, and why."""

_OURS_IS_IGVMMEASURES = {"directive-page-2mb-empty-v1", "directive-page-2mb-empty-v2"}
"""Where the two peers disagree and ours is igvmmeasure's digest; everywhere else it is the crate's."""

_NAMES = {
    "VP_COUNT_PARAMETER": "VP_COUNT",
    "ENVIRONMENT_INFO_PARAMETER": "ENVIRONMENT_INFO",
    "PAGE_TABLE_RELOCATION_REGION": "PAGE_TABLE_RELOCATION",
}
_VMSA_NAMES = {
    "pat": "g_pat",
    "attrib": "attributes",
    "interrupt_ssp_table_addr": "isst_addr",
    "last_branch_from_ip": "br_from",
    "last_branch_to_ip": "br_to",
    "last_excp_from_ip": "last_excp_from",
    "last_excp_to_ip": "last_excp_to",
    "exit_info1": "guest_exit_info_1",
    "exit_info2": "guest_exit_info_2",
    "exit_int_info": "guest_exit_int_info",
    "next_rip": "guest_nrip",
    "guest_error_code": "guest_exit_code",
    "x87dp": "x87_dp",
    "x87_op": "x87_fop",
}
"""The crate's register names where they are not ours."""


@functools.cache
def _manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((vectors("igvm") / "manifest.json").read_text())
    return loaded


@functools.cache
def _stored() -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in _manifest()["files"].items() if entry["path"]}


def _image(name: str) -> bytes:
    path = vectors("igvm") / _stored()[name]["path"]
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _supported() -> list[str]:
    return [name for name in _stored() if name not in _REFUSED]


def _number(text: str | int) -> int:
    return int(text, 16) if isinstance(text, str) else text


def _blob(file: IgvmFile, offset: int, length: int) -> dict[str, Any]:
    if not offset:
        return {"len": 0}
    data = bytes(file.data_at(offset, length, start=file.data_start))
    shown: dict[str, Any] = {"len": length, "sha256": hashlib.sha256(data).hexdigest()}
    return shown | ({"hex": data.hex()} if length <= 32 else {})


def _numbers(entry: dict[str, Any], *names: str) -> list[int]:
    return [_number(entry[name]) for name in names]


def _check_page(file: IgvmFile, entry: dict[str, Any], body: PageData) -> None:
    assert [body.gpa, body.compatibility_mask, body.flags, body.data_type] == _numbers(
        entry, "gpa", "compatibility_mask", "flags_raw", "data_type"
    )
    flags = {
        "is_2mb_page": bool(body.flags & PageFlag.IS_2MB_PAGE),
        "unmeasured": bool(body.flags & PageFlag.UNMEASURED),
        "shared": bool(body.flags & PageFlag.SHARED),
    }
    assert entry["flags"] == flags
    length = page_bytes(body) if body.file_offset else 0
    assert entry["data"] == _blob(file, body.file_offset, length)


def _vmsa_fields(vmsa: Vmsa) -> dict[str, Any]:
    blank, shown = Vmsa(), {}
    for field in dataclasses.fields(vmsa):
        value = getattr(vmsa, field.name)
        if value == getattr(blank, field.name):
            continue
        shown[field.name] = dataclasses.asdict(value) if isinstance(value, Segment) else value
    return shown


def _manifest_vmsa(entry: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in entry.items():
        ours = _VMSA_NAMES.get(name, name)
        if isinstance(value, dict):
            shown[ours] = {_VMSA_NAMES.get(part, part): _number(number) for part, number in value.items()}
        elif ours in ("fpreg_x87", "fpreg_xmm", "fpreg_ymm") or ours.startswith("reserved"):
            shown[ours] = bytes.fromhex(value)
        else:
            shown[ours] = _number(value)
    return shown


def _check_context(file: IgvmFile, entry: dict[str, Any], body: VpContext) -> None:
    assert body.compatibility_mask == _number(entry["compatibility_mask"])
    assert body.vp_index == entry["vp_index"]
    start = file.data_start
    if entry["kind"] == "SNP_VMSA":
        assert body.gpa == _number(entry["gpa"])
        page = bytes(file.data_at(body.file_offset, 4096, start=start))
        assert hashlib.sha256(page).hexdigest() == entry["vmsa"]["page_sha256"]
        vmsa = Vmsa.parse(page)
        assert vmsa.pack() == page
        assert _vmsa_fields(vmsa) == _manifest_vmsa(entry["vmsa"]["nonzero_fields"])
    elif entry["kind"] == "X64_VBS":
        count = len(entry["registers"])
        assert int.from_bytes(file.data_at(body.file_offset, 4, start=start), "little") == count
        for index, register in enumerate(entry["registers"]):
            raw = bytes(file.data_at(body.file_offset + 4 + 32 * index, 32, start=start))
            name = _number(register["name_id"]).to_bytes(4, "little")
            assert raw == bytes([register["vtl"]]) + name + bytes(11) + bytes.fromhex(register["value16"])
    else:
        assert entry["kind"] == "X64_NATIVE"
        assert int.from_bytes(file.data_at(body.file_offset, 8, start=start), "little") == _number(
            entry["context"]["rax"]
        )


def _check_id_block(entry: dict[str, Any], body: SnpIdBlock) -> None:
    assert body.compatibility_mask == _number(entry["compatibility_mask"])
    for name in ("author_key_enabled", "version", "guest_svn", "id_key_algorithm", "author_key_algorithm"):
        assert getattr(body, name) == entry[name]
    for name in ("ld", "family_id", "image_id"):
        assert getattr(body, name).hex() == entry[name]
    assert body.reserved_0x5.hex() == entry["reserved"]
    for name in ("id_key_signature", "author_key_signature"):
        signature = getattr(body, name)
        assert (signature.r.hex(), signature.s.hex()) == (entry[name]["r_comp"], entry[name]["s_comp"])
    for name in ("id_public_key", "author_public_key"):
        key = getattr(body, name)
        assert (key.curve, key.reserved_0x4, key.qx.hex(), key.qy.hex()) == tuple(
            entry[name][part] for part in ("curve", "reserved", "qx", "qy")
        )


def _check_simple(file: IgvmFile, entry: dict[str, Any], body: Record) -> None:
    """Headers whose fields the manifest names as the format does."""
    match body:
        case SupportedPlatform():
            assert [body.compatibility_mask, body.shared_gpa_boundary] == _numbers(
                entry, "compatibility_mask", "shared_gpa_boundary"
            )
            assert body.highest_vtl == entry["highest_vtl"]
            assert body.platform_version == entry["platform_version"]
            assert body.platform_type == entry["platform_type_id"]
            assert PlatformType(body.platform_type).name == entry["platform_type"]
        case GuestPolicy():
            assert [body.policy, body.compatibility_mask] == _numbers(entry, "policy", "compatibility_mask")
        case ParameterArea():
            assert [body.number_of_bytes, body.parameter_area_index] == _numbers(
                entry, "number_of_bytes", "parameter_area_index"
            )
            assert entry["initial_data"] == _blob(file, body.file_offset, body.number_of_bytes)
        case Parameter():
            assert [body.parameter_area_index, body.byte_offset] == [
                entry["parameter_area_index"],
                entry["byte_offset"],
            ]
        case ParameterInsert():
            assert [body.gpa, body.compatibility_mask, body.parameter_area_index] == _numbers(
                entry, "gpa", "compatibility_mask", "parameter_area_index"
            )
        case RequiredMemory():
            assert [body.gpa, body.compatibility_mask, body.number_of_bytes] == _numbers(
                entry, "gpa", "compatibility_mask", "number_of_bytes"
            )
            assert bool(body.flags) == entry["vtl2_protectable"]
        case ErrorRange():
            assert [body.gpa, body.compatibility_mask, body.size_bytes] == _numbers(
                entry, "gpa", "compatibility_mask", "size_bytes"
            )
        case RelocatableRegion():
            names = (
                "compatibility_mask",
                "relocation_alignment",
                "relocation_region_gpa",
                "relocation_region_size",
                "minimum_relocation_gpa",
                "maximum_relocation_gpa",
                "vp_index",
                "vtl",
            )
            assert [getattr(body, name) for name in names] == _numbers(entry, *names)
            flags = [entry[name] for name in ("is_vtl2", "apply_rip_offset", "apply_gdtr_offset")]
            assert flags == [bool(body.flags & bit) for bit in (1, 2, 4)]
        case PageTableRelocation():
            short = ("compatibility_mask", "gpa", "size", "used_size", "vp_index", "vtl")
            assert [getattr(body, name) for name in short] == _numbers(entry, *short)
        case Corim():
            blob = entry.get("document") or entry["signature"]
            assert body.compatibility_mask == _number(entry["compatibility_mask"])
            assert blob == _blob(file, body.file_offset, body.size_bytes)
        case VbsMeasurement():
            assert [body.compatibility_mask, body.policy_flags] == _numbers(entry, "compatibility_mask", "policy_flags")
            for name in ("version", "product_id", "module_id", "security_version"):
                assert getattr(body, name) == entry[name]
            assert [body.boot_digest_algorithm, body.signing_algorithm] == [
                entry["boot_digest_algo"],
                entry["signing_algo"],
            ]
            for name in ("boot_measurement_digest", "signature", "public_key"):
                assert getattr(body, name).hex() == entry[name]
        case _:
            raise AssertionError(f"{entry['header']} is not compared")


def _each(file: IgvmFile) -> list[tuple[HeaderType, Record]]:
    return [(header.kind, body) for header in file.headers for body in header.each()]


def test_the_refused_files_are_refused_for_their_reason() -> None:
    for name, code in _REFUSED.items():
        with pytest.raises(FormatError) as caught:
            IgvmFile.parse(_image(name))
        assert caught.value.code == code, name


def test_every_header_of_every_file_reads_as_the_manifest_says() -> None:
    compared = 0
    for name in _supported():
        entry, file = _stored()[name], IgvmFile.parse(_image(name))
        bodies = _each(file)
        expected = entry["platforms"] + entry["initializations"] + entry["directives"]
        assert len(bodies) == len(expected) == len(entry["tlv"]), name
        position = entry["fixed_header"]["variable_header_offset"]
        for (kind, body), stated, tlv in zip(bodies, expected, entry["tlv"], strict=True):
            offset = [body.file_offset] if isinstance(body, PageData | ParameterArea | VpContext | Corim) else []
            assert [position, int(kind), body.SIZE, *offset] == tlv, name
            position += packed_size_bytes(body.SIZE)
            assert kind.name == _NAMES.get(stated["header"], stated["header"]), name
            if isinstance(body, PageData):
                _check_page(file, stated, body)
            elif isinstance(body, VpContext):
                _check_context(file, stated, body)
            elif isinstance(body, SnpIdBlock):
                _check_id_block(stated, body)
            else:
                _check_simple(file, stated, body)
            compared += 1
    assert compared > 2000


def test_every_file_packs_to_its_own_bytes() -> None:
    for name in _supported():
        image = _image(name)
        assert hashlib.sha256(image).hexdigest() == _stored()[name]["sha256"]
        assert IgvmFile.parse(image).pack() == image, name


def _rebuild(file: IgvmFile) -> bytes:
    """The same directives through our writer, which decides about file offsets itself."""
    builder = IgvmBuilder(format_version=file.format_version)
    start = file.data_start
    vsm = [p.compatibility_mask for p in file.platforms() if p.platform_type == PlatformType.VSM_ISOLATION]
    for kind, body in _each(file):
        offset, length = getattr(body, "file_offset", 0), 4096
        if isinstance(body, ParameterArea):
            length = body.number_of_bytes
        elif isinstance(body, Corim):
            length = body.size_bytes
        elif isinstance(body, PageData):
            length = page_bytes(body)
        elif isinstance(body, VpContext) and body.compatibility_mask in vsm:
            length = 4 + 32 * int.from_bytes(file.data_at(offset, 4, start=start), "little")
        data = file.data_at(offset, length, start=start) if offset else b""
        builder.add(kind, body.replace(file_offset=0) if offset else body, data)
    return builder.finish().pack()


def test_the_writer_makes_the_crates_bytes() -> None:
    for name in set(_supported()) - {"qemu-snp-vmsa-last"}:  # its headers were moved afterwards
        image = _image(name)
        assert _rebuild(IgvmFile.parse(image)) == image, name


def _snp_names() -> list[str]:
    return [name for name in _supported() if "SEV_SNP" in _stored()[name]["crate_measurements"]]


def test_snp_digests() -> None:
    """All digests of the manifest; where the peers differ, both answers are pinned and ours is one of them."""
    agreed = differing = 0
    for name in _snp_names():
        entry, ours = _stored()[name], launch_digest(IgvmFile.parse(_image(name))).hex()
        crate, tool = entry["crate_measurements"]["SEV_SNP"], entry["igvmmeasure"].get("sev-snp")
        if entry.get("snp_digests_differ"):
            assert crate != tool
            assert ours == (tool if name in _OURS_IS_IGVMMEASURES else crate), name
            differing += 1
        else:
            answers = {answer for answer in (crate, tool) if isinstance(answer, str)}
            assert answers == {ours}, name
            agreed += 1
    assert (agreed, differing) == (62, 13)


def test_native_zero_digests() -> None:
    """igvmmeasure --native-zero, for the files about which the peers agree."""
    compared = 0
    for name in _snp_names():
        entry = _stored()[name]
        answer = entry["igvmmeasure"].get("sev-snp native-zero")
        if isinstance(answer, str) and not entry.get("snp_digests_differ"):
            assert launch_digest(IgvmFile.parse(_image(name)), native_zero=True).hex() == answer, name
            compared += 1
    assert compared > 50


def test_kvm_launches_the_vmsa_last() -> None:
    """igvmbuilder without --sort puts pages after the VMSA; KVM then reports the digest of the moved VMSA."""
    plain, last = (IgvmFile.parse(_image(name)) for name in ("qemu-snp", "qemu-snp-vmsa-last"))
    assert launch_digest(plain) != launch_digest(last)
    assert launch_digest(plain, order=Order.KVM) == launch_digest(last) == launch_digest(last, order=Order.KVM)


def test_a_file_without_policy_is_measured() -> None:
    """The policy is no part of the digest: igvmmeasure's answer, not the crate's error."""
    file = IgvmFile.parse(_image("mixed-no-policy-v1"))
    assert guest_policy(file) is None
    assert launch_digest(file).hex() == _stored()["mixed-no-policy-v1"]["igvmmeasure"]["sev-snp"]


def test_id_blocks() -> None:
    keys = _manifest()["keys"]
    for name in ("signed-qemu-snp", "signed-qemu-snp-author", "signed-qemu-snp-native", "signed-twice"):
        file = IgvmFile.parse(_image(name))
        digest = launch_digest(file)
        checks = check_id_blocks(file, digest)
        demand_id_blocks(checks, digest)
        assert len(checks) == (2 if name == "signed-twice" else 1)
        for check in checks:
            assert check.id_key_digest.hex() == keys["id"]["sha384_of_psp_form"]
            if check.author_signature_valid is not None:
                assert check.author_key_digest.hex() == keys["author"]["sha384_of_psp_form"]


def test_id_block_for_native_zero_pages() -> None:
    file = IgvmFile.parse(_image("signed-vanadium-snp-native-zero"))
    assert not check_id_blocks(file, launch_digest(file))[0].holds
    digest = launch_digest(file, native_zero=True)
    assert check_id_blocks(file, digest)[0].holds


def test_a_tampered_signed_file_does_not_hold() -> None:
    file = IgvmFile.parse(_image("signed-qemu-snp-tampered"))
    digest = launch_digest(file)
    checks = check_id_blocks(file, digest)
    assert checks[0].id_signature_valid
    with pytest.raises(IntegrityError) as caught:
        demand_id_blocks(checks, digest)
    assert caught.value.code == "id-block-digest"


_MORE_LENIENT = {"no-file-data", "vbs-register"}
"""Accepted here, refused by the crate: a file without data is legal, and VBS register names are not interpreted."""

_STRICTER = {
    "offset-32-gap": "igvm-header-gap",
    "offset-28-gap": "igvm-header-gap",
    "v2-as-v1": "igvm-header-gap",
    "padding-ascii-0": "igvm-padding",
    "platform-boundary-odd": "igvm-alignment",
    "plain-platform-mask-dup": "igvm-duplicate",
    "reloc-min-above-max": "igvm-relocation",
    "reloc-flags": "igvm-flags",
    "area-huge-empty": "igvm-limit",
    "area-2tib-empty": "igvm-limit",
    "param-offset": "igvm-parameter-range",
    "page-flags": "igvm-flags",
    "page-flags-shared-2mb": "igvm-alignment",
    "reqmem-flags": "igvm-flags",
    "vp-reserved": "igvm-reserved",
    "vp-twice": "igvm-duplicate",
    "idblock-reserved": "igvm-reserved",
    "idblock-author-2": "igvm-value",
    "idblock-version": "igvm-value",
    "idblock-algo": "igvm-value",
    "idblock-mask": "igvm-mask",
    "corim-offset-0": "igvm-data-range",
    "cca-hash-9": "igvm-unsupported-architecture",
    "cca-lfa-2": "igvm-unsupported-architecture",
    "cca-vp-tail": "igvm-unsupported-architecture",
}
"""Accepted by the crate, refused here, and why."""

_LAUNCH_REFUSED = {
    "page-duplicate": "igvm-overlap",
    "page-over-insert": "igvm-overlap",
    "native-gpa": "igvm-no-platform",
    "native-vtl-2": "igvm-no-platform",
}
"""Well-formed, but not to be launched as SNP guests."""

_REASONS = {
    "file-empty": "record-truncated",
    "magic-swapped": "igvm-magic",
    "version-0x3": "igvm-version",
    "total-minus-1": "igvm-size",
    "size-max": "igvm-size",
    "checksum-covers-fixed": "igvm-checksum",
    "type-0x80000302-real": "igvm-unsupported-header",
    "type-0x306": "igvm-unsupported-header",
    "order-platform-late": "igvm-header-order",
    "length-max-8": "igvm-header-length",
    "platform-mask-3": "igvm-mask",
    "platform-type-7": "igvm-unsupported-platform",
    "policy-reserved": "igvm-reserved",
    "reloc-align-0": "igvm-relocation",
    "reloc-size-wrap": "igvm-address",
    "area-huge-data": "igvm-limit",
    "param-after-insert": "igvm-parameter-area",
    "page-offset-max": "igvm-data-range",
    "vp-mask-both": "igvm-mask",
    "vbs-count-max": "igvm-limit",
    "corim-order": "igvm-value",
}
"""A sample of the others, each for its own reason."""


@functools.cache
def _malformed() -> dict[str, bytes]:
    found = {}
    with tarfile.open(vectors("igvm") / "malformed.tar.xz") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            found[member.name.removesuffix(".igvm")] = stream.read()
    return found


def _verdict(image: bytes) -> str:
    try:
        file = IgvmFile.parse(image)
    except SvsmError as error:
        return error.code
    assert file.pack() == image
    return "accept"


def test_malformed_files() -> None:
    """Each is a value or an `SvsmError`, in bounded time, and the crate's verdict but for the pinned differences."""
    stated = _manifest()["malformed"]
    assert set(_malformed()) == set(stated)
    for name, image in _malformed().items():
        assert hashlib.sha256(image).hexdigest() == stated[name]["sha256"]
        started = time.perf_counter()
        verdict = _verdict(image)
        assert time.perf_counter() - started < 1, name
        crate_accepts = stated[name]["igvm_0_5_0"] == "accept"
        if name in _STRICTER:
            assert crate_accepts
            assert verdict == _STRICTER[name], name
        elif name in _MORE_LENIENT:
            assert not crate_accepts
            assert verdict == "accept", name
        else:
            assert (verdict == "accept") == crate_accepts, (name, verdict)
        assert verdict == _REASONS.get(name, verdict), name


def test_malformed_files_that_parse_can_be_measured_or_are_refused() -> None:
    for name, image in _malformed().items():
        if _verdict(image) != "accept":
            continue
        file = IgvmFile.parse(image)
        if name in _LAUNCH_REFUSED:
            with pytest.raises(FormatError) as caught:
                launch_digest(file)
            assert caught.value.code == _LAUNCH_REFUSED[name]
        else:
            assert len(launch_digest(file)) == 48


def test_every_parameter_header_occurs_in_the_vectors() -> None:
    seen = {kind for name in _supported() for kind, _ in _each(IgvmFile.parse(_image(name)))}
    assert seen >= PARAMETER_TYPES
    assert seen == set(HeaderType)
