# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demonstration guest's image: its code is its listing, its page tables map what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from svsm.abi.errors import StateError
from svsm.abi.platform import PAGE_SIZE, Gpa
from svsm.formats.guest_mailbox import DATA_OFFSET, MailboxControl
from svsm.formats.snp.vmsa import Vmsa
from svsm.kernel.guest_stub import GUEST_IMAGE_BYTES, STUB_CODE, build_guest_image
from tests.support import peer

LISTING = Path(__file__).resolve().parents[3] / "docs" / "guest-stub.s"
BASE = Gpa(0x4000_0000)
MAILBOX = Gpa(0x3000_0000)


def test_the_listing_assembles_to_the_code(tmp_path: Path) -> None:
    tools = {name: peer(name) for name in ("as", "objcopy")}
    made, raw = tmp_path / "stub.o", tmp_path / "stub.bin"
    subprocess.run([tools["as"], "--64", "-o", made, LISTING], check=True)
    subprocess.run([tools["objcopy"], "-O", "binary", "-j", ".text", made, raw], check=True)
    assert raw.read_bytes() == STUB_CODE


def test_the_listing_and_the_mailbox_agree_on_offsets() -> None:
    listing = dict(re.findall(r"\.set (\w+), +(0x[0-9a-fA-F]+)", LISTING.read_text(encoding="utf-8")))
    names = list(MailboxControl.__dataclass_fields__)
    expected = {
        ("OUT_" + name[7:] if name.startswith("result_") else name).upper(): 8 * index
        for index, name in enumerate(names)
    }
    for name in ("RAX", "RCX", "RDX", "R8", "R9"):
        expected["IN_" + name] = expected.pop(name)
    expected["DATA"] = DATA_OFFSET
    constants = {"GHCB_MSR", "RUN_VMPL_REQ"}
    assert {name: int(value, 16) for name, value in listing.items() if name not in constants} == expected


def test_image_pages_and_registers() -> None:
    image = build_guest_image(base_gpa=BASE, mailbox_gpa=MAILBOX)
    assert sorted(image.pages) == list(range(BASE, BASE + GUEST_IMAGE_BYTES, PAGE_SIZE))
    assert {len(page) for page in image.pages.values()} == {PAGE_SIZE}
    vmsa = Vmsa.parse(image.vmsa_page())
    assert (vmsa.vmpl, vmsa.rip, vmsa.rdi, vmsa.rsi) == (2, BASE, MAILBOX, image.calling_area_gpa)
    assert vmsa.efer & 0x1500 == 0x1500
    assert vmsa.pack() == image.vmsa_page()
    pml4 = int.from_bytes(image.pages[Gpa(vmsa.cr3)][:8], "little")
    pointers = image.pages[Gpa(pml4 & ~0xFFF)]
    for address in (0, MAILBOX, BASE, (512 << 30) - 1):
        entry = int.from_bytes(pointers[8 * (address >> 30) : 8 * (address >> 30) + 8], "little")
        assert entry & 0x83 == 0x83
        assert entry & ~0xFFF == address & ~((1 << 30) - 1)


@pytest.mark.parametrize(
    ("base", "mailbox"),
    [
        (BASE + 1, MAILBOX),
        (BASE, MAILBOX + 8),
        (BASE, BASE + 0x5000),
        (BASE, BASE - PAGE_SIZE),
        ((512 << 30) - PAGE_SIZE, MAILBOX),
        (BASE, 512 << 30),
        (-PAGE_SIZE, MAILBOX),
    ],
)
def test_addresses_that_do_not_work(base: int, mailbox: int) -> None:
    with pytest.raises(StateError) as caught:
        build_guest_image(base_gpa=Gpa(base), mailbox_gpa=Gpa(mailbox))
    assert caught.value.code == "guest-image-address"
