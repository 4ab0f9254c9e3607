# SPDX-License-Identifier: MIT OR Apache-2.0
"""Descriptions of files: complete, in order, pages in ranges, JSON-able."""

from __future__ import annotations

import json

from svsm.formats.igvm import HeaderType, IgvmBuilder, PageDataType, PageFlag, PlatformType
from svsm.formats.igvm.layout import PublicKey, Signature, SnpIdBlock
from svsm.formats.snp.vmsa import Segment, Vmsa
from svsm.launch.inspect import describe


def test_everything_is_listed_in_order() -> None:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP, shared_gpa_boundary=1 << 46, highest_vtl=2)
    builder.policy(0x30000)
    builder.required_memory(0x100000, 0x2000)
    builder.parameter_area(3, 0x1000)
    builder.parameter(HeaderType.MEMORY_MAP, index=3, byte_offset=64)
    builder.parameter_insert(0x8000, index=3)
    builder.pages(0x10000, b"a" * 4096 + b"b" * 4096 + b"a" * 4096)
    builder.page(0x13000)
    builder.page(0x1000, data_type=PageDataType.SECRETS)
    builder.page(0x200000, flags=PageFlag.IS_2MB_PAGE | PageFlag.UNMEASURED)
    vmsa = Vmsa(rip=0x1234, cs=Segment(8, 0xC9B, 0xFFFFFFFF, 0))
    builder.vp_context(0xFFFFFFFFF000, vmsa.pack(), vp_index=0)
    file = builder.finish()
    found = describe(file)
    assert found["headers"] == 13
    assert found["platforms"] == [
        {"platform": "SEV_SNP", "mask": "0x1", "highest_vtl": 2, "shared_gpa_boundary": hex(1 << 46)}
    ]
    page = {"header": "PAGE_DATA", "mask": "0x1", "type": "NORMAL", "flags": []}
    assert found["launch"] == [
        {"header": "GUEST_POLICY", "policy": "0x30000", "mask": "0x1"},
        {"header": "REQUIRED_MEMORY", "gpa": "0x100000", "mask": "0x1", "number_of_bytes": "0x2000", "flags": 0},
        {"header": "PARAMETER_AREA", "number_of_bytes": "0x1000", "parameter_area_index": 3, "file_offset": 0},
        {"header": "MEMORY_MAP", "parameter_area_index": 3, "byte_offset": 64},
        {"header": "PARAMETER_INSERT", "gpa": "0x8000", "mask": "0x1", "parameter_area_index": 3},
        page | {"gpa": "0x10000", "size_bytes": "0x3000", "content": "data"},
        page | {"gpa": "0x13000", "size_bytes": "0x1000", "content": "empty"},
        page | {"gpa": "0x1000", "size_bytes": "0x1000", "type": "SECRETS", "content": "empty"},
        page
        | {"gpa": "0x200000", "size_bytes": "0x200000", "flags": ["is_2mb_page", "unmeasured"], "content": "empty"},
        {
            "header": "VP_CONTEXT",
            "gpa": "0xfffffffff000",
            "mask": "0x1",
            "platform": "SEV_SNP",
            "vp_index": 0,
            "registers": {
                "cs.selector": "0x8",
                "cs.attributes": "0xc9b",
                "cs.limit": "0xffffffff",
                "rip": "0x1234",
            },
        },
    ]
    json.dumps(found)


def test_an_id_block_is_shown_flat() -> None:
    builder = IgvmBuilder()
    builder.platform(PlatformType.SEV_SNP)
    signature, key = Signature(b"r" * 72, b"s" * 72), PublicKey(2, 0, b"x" * 72, b"y" * 72)
    zero = bytes(16)
    builder.id_block(SnpIdBlock(1, 0, bytes(3), b"d" * 48, zero, zero, 1, 5, 1, 0, signature, key, signature, key))
    entries = describe(builder.finish())["launch"]
    assert isinstance(entries, list)
    assert entries[0]["ld"] == (b"d" * 48).hex()
    assert entries[0]["guest_svn"] == 5
    assert entries[0]["id_public_key.qx"] == (b"x" * 72).hex()
