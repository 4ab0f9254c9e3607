# SPDX-License-Identifier: MIT OR Apache-2.0
"""A byte flipped in the image file that boots: an error or another launch digest, and never a key.

The real image, at positions of each kind that the file's own structure names; tests/unit/launch flips every byte of
a small image of the same layout, also with the checksum made right again. A flip is made in memory for the digests,
and in a file for whole boots of a used VM: its owner's broker must not have counted one more release, and the disk
must be as it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from svsm.crypto.token import SigningKey
from svsm.formats.errors import SvsmError
from svsm.formats.igvm import IgvmFile
from svsm.formats.igvm.layout import PAGE_SIZE, PageData, VpContext
from svsm.formats.settings import Settings
from svsm.launch.build import ARCHIVE_GPA, LOADER_GPA, build_image
from svsm.launch.digest import SETTINGS_GPA, launch_digest
from svsm.launch.payload import build_payload
from tests.e2e.boot_support import Estate, Instance, Vm, sha256_of, svsm

pytestmark = pytest.mark.e2e

FIXED_BYTES = 24


class Image:
    """An image file and where in it things are."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        self.file = IgvmFile.parse(self.data)
        self.digest = launch_digest(self.file)
        self.places = dict(self._places())

    def _places(self) -> Iterator[tuple[str, range]]:
        start = self.file.data_start
        yield "fixed header", range(FIXED_BYTES)
        yield "variable headers", range(FIXED_BYTES, start)
        pages: dict[int, int] = {}
        for header in self.file.headers:
            for body in header.each():
                if isinstance(body, PageData) and body.file_offset:
                    pages[body.gpa] = body.file_offset
                if isinstance(body, VpContext):
                    yield "VMSA", range(body.file_offset, body.file_offset + PAGE_SIZE)
        loader = [pages[gpa] for gpa in sorted(pages) if LOADER_GPA <= gpa < SETTINGS_GPA]
        archive = [pages[gpa] for gpa in sorted(pages) if gpa >= ARCHIVE_GPA]
        yield "loader", range(loader[0], loader[-1])
        yield "loader's last page with its padding", range(loader[-1], loader[-1] + PAGE_SIZE)
        yield "archive", range(archive[0], archive[-1])
        yield "archive's last page with its padding", range(archive[-1], archive[-1] + PAGE_SIZE)
        settings = pages[SETTINGS_GPA]
        yield "settings", range(settings, settings + 160)
        yield "settings' padding", range(settings + 512, settings + PAGE_SIZE)

    def flipped(self, offset: int, mask: int = 1) -> bytes:
        """The file with one byte changed."""
        data = self.data.copy()
        data[offset] ^= mask
        return bytes(data)

    def verdict(self, data: bytes) -> str:
        """What measuring says of a changed file."""
        try:
            digest = launch_digest(IgvmFile.parse(data))
        except SvsmError:
            return "error"
        return "same digest" if digest == self.digest else "other digest"


@pytest.fixture(scope="module")
def image(owner: Estate) -> Image:
    return Image(owner.image)


def test_the_places_cover_the_file(image: Image) -> None:
    sizes = {name: len(place) for name, place in image.places.items()}
    assert all(sizes.values())
    assert max(place.stop for place in image.places.values()) <= len(image.data)
    assert sizes["archive"] > 0.9 * len(image.data)
    assert any(image.data[offset] for offset in image.places["settings"])
    assert not any(image.data[offset] for offset in image.places["settings' padding"])


def _check_flips(image: Image, count: int, rng: random.Random) -> None:
    for name, place in image.places.items():
        wanted = "error" if name in ("fixed header", "variable headers") else "other digest"
        offsets = {place[0], place[-1], *(rng.choice(place) for _ in range(count))}
        for offset in sorted(offsets)[: count + 2]:
            assert image.verdict(image.flipped(offset, 1 << rng.randrange(8))) == wanted, (name, offset)


def test_a_flipped_byte_is_an_error_or_another_digest(image: Image) -> None:
    _check_flips(image, 1, random.Random(1))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_many_flipped_bytes_are_errors_or_other_digests(image: Image) -> None:
    _check_flips(image, 30, random.Random(2))


def _not_a_key(vm: Vm, image: Path) -> Instance:
    """Boot with `image`; no key may come of it."""
    disk, released = sha256_of(vm.disk), vm.row()["attestations"]
    with vm.boot(image=image) as instance:
        ended = instance.ended()
    assert instance.find("ready") is None
    assert ended.exit_code in (1, 3)
    assert ended.code is not None
    assert vm.row()["attestations"] == released
    assert sha256_of(vm.disk) == disk
    return instance


BOOTED = ["loader's last page with its padding", "variable headers"]
MORE_BOOTED = [
    "fixed header",
    "loader",
    "archive",
    "archive's last page with its padding",
    "settings",
    "settings' padding",
    "VMSA",
]


@pytest.mark.parametrize("kind", [*BOOTED, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_BOOTED)])
def test_a_boot_with_a_flipped_byte_gets_no_key(used: Vm, image: Image, place: Path, kind: str) -> None:
    rng = random.Random(kind)
    where = image.places[kind]
    changed = place / "changed.igvm"
    changed.write_bytes(image.flipped(where[-1] if "padding" in kind else rng.choice(where)))
    instance = _not_a_key(used.twin(), changed)
    error = instance.find("error") or {}
    if kind == "settings' padding":
        assert error["code"] == "settings-format"
    elif "padding" in kind:
        # The code is the same and runs; the chip's measurement is another one, and its owner has not allowed it.
        assert error["code"] == "attestation-refused"
        assert error["details"]["reason"] == "broker-measurement-not-allowed"
        digest = launch_digest(IgvmFile.parse(changed.read_bytes())).hex()
        assert f"svsm broker volume allow {used.volume_id} {digest}" in error["hint"]
    if "header" in kind:
        assert error["code"].startswith("igvm-")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_more_boots_with_a_flipped_byte(used: Vm, image: Image, place: Path) -> None:
    rng = random.Random(4)
    vm = used.twin()
    changed = place / "changed.igvm"
    for kind in (
        "archive",
        "archive",
        "archive",
        "archive",
        "loader",
        "loader",
        "VMSA",
        "VMSA",
        "settings",
        "settings",
    ):
        changed.write_bytes(image.flipped(rng.choice(image.places[kind]), 1 << rng.randrange(8)))
        _not_a_key(vm, changed)
    with vm.boot() as instance:
        instance.ready()


def _cut(data: bytes) -> bytes:
    return data[:-1]


def _headers_only(data: bytes) -> bytes:
    return data[: IgvmFile.parse(data).data_start]


def _empty(_data: bytes) -> bytes:
    return b""


def _text(_data: bytes) -> bytes:
    return b"#!/bin/sh\necho hello\n"


@pytest.mark.long
@pytest.mark.parametrize("change", [_cut, _headers_only, _empty, _text])
def test_what_is_no_image_is_an_error(used: Vm, image: Image, place: Path, change: Callable[[bytes], bytes]) -> None:
    path = place / "no.igvm"
    path.write_bytes(change(bytes(image.data)))
    instance = _not_a_key(used.twin(), path)
    code = str((instance.find("error") or {})["code"])
    assert code.startswith("igvm-") or code == "record-truncated"


@pytest.mark.long
def test_an_image_that_is_not_there_is_an_error(used: Vm, place: Path) -> None:
    with used.twin().boot(image=place / "none") as instance:
        ended = instance.ended()
    assert (ended.exit_code, ended.code) == (1, "boot-image")
    assert "check the path" in ended.hint


@pytest.mark.long
def test_a_first_boot_blames_the_image_that_is_not_there(place: Path) -> None:
    first = svsm("boot", "--json", "--state", str(place / "first"), "--image", str(place / "none"), check=False)
    events = [json.loads(line) for line in first.stdout.splitlines()]
    failed = [event["step"] for event in events if event.get("state") == "failed"]
    assert (first.returncode, failed, events[-1]["code"]) == (1, ["image"], "boot-image")


@pytest.mark.long
def test_an_image_that_pins_another_broker_gets_nothing_even_where_it_is_allowed(owner: Estate, place: Path) -> None:
    """Its measurement is fine with the owner's broker, and what that broker signs is not fine with the image."""
    vm = owner.vm()
    payload = build_payload()
    stranger = SigningKey.generate().public_der
    path = place / "i.igvm"
    settings = Settings(stranger).pack()
    path.write_bytes(build_image(loader=payload.loader, archive=payload.archive, settings=settings))
    digest = launch_digest(IgvmFile.parse(path.read_bytes())).hex()
    with vm.boot(image=path) as instance:
        assert instance.ended().code == "attestation-refused"
    svsm("broker", "volume", "allow", vm.volume_id, digest, "--state", str(owner.folder))
    with vm.boot(image=path) as instance:
        ended = instance.ended()
    assert (ended.exit_code, ended.code) == (3, "token-signature")
    assert vm.row()["state"] == "new"
    assert not any(vm.disk.read_bytes())
