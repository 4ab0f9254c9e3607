# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an image consists of, and what the host adds to it: IGVM, OVMF, settings, launch configuration, device tree.

A checksum would stop every mutation at the door. So an IGVM file or an envelope is tried as it is and, where only the
checksum was wrong, once more with the checksum repaired: an attacker can compute one too.
"""

from __future__ import annotations

import functools
import itertools
import uuid
import zlib

from svsm.formats.boot_devices import BootDevices, PciHost, SerialPort, VirtioMmio
from svsm.formats.errors import SvsmError
from svsm.formats.fdt import DeviceTree
from svsm.formats.igvm import IgvmBuilder, IgvmFile, Order, PlatformType, guest_policy, id_block_header, plan_runs
from svsm.formats.igvm.id_block import split_header
from svsm.formats.igvm.layout import FixedHeaderV1, FixedHeaderV2, HeaderType, PageDataType, SnpIdBlock
from svsm.formats.launch_configuration import LaunchConfiguration, TpmConfiguration, TpmFront, pack_area, parse_area
from svsm.formats.ovmf import Ovmf
from svsm.formats.settings import SETTINGS_BYTES, Settings
from svsm.formats.snp.cpuid_page import CPUID_PAGE_SIZE, CpuidFunction, pack_cpuid_page, parse_cpuid_page
from svsm.formats.snp.ghcb import MMIO_BYTES, MMIO_GPA
from svsm.formats.snp.id_block import IdAuth, IdBlock
from svsm.formats.snp.policy import GuestPolicy
from svsm.formats.tpm_envelope import MAX_STATE_BYTES, TpmEnvelope
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect, judge
from svsm.kernel.devices import read_devices
from svsm.launch.build import build_image
from svsm.launch.digest import launch_digest
from svsm.launch.id_block import check_id_blocks, demand_id_blocks
from svsm.launch.inspect import describe
from svsm.launch.ovmf_image import describe_ovmf_launch

__all__ = ["ROWS"]

_CHECKSUM_OFFSET = 20
_MAX_RUNS = 4096
_MAX_MEASURED_PAGES = 64


def _with_checksum(image: bytes) -> bytes:
    """The file with the checksum that its fixed header and variable headers should have."""
    if len(image) < FixedHeaderV2.SIZE:
        return image
    first = FixedHeaderV1.parse_at(image, 0)
    size = FixedHeaderV2.SIZE if first.format_version == 2 else FixedHeaderV1.SIZE
    blank = image[:_CHECKSUM_OFFSET] + bytes(4) + image[_CHECKSUM_OFFSET + 4 : size]
    checksum = zlib.crc32(image[size : size + first.variable_header_size], zlib.crc32(blank))
    return image[:_CHECKSUM_OFFSET] + checksum.to_bytes(4, "little") + image[_CHECKSUM_OFFSET + 4 :]


def _igvm(data: bytes) -> None:
    try:
        file = IgvmFile.parse(data)
    except SvsmError as error:
        if error.code != "igvm-checksum":
            raise
        data = _with_checksum(data)
        file = IgvmFile.parse(data)
    expect(file.pack() == data, "an accepted IGVM file packs to itself")
    for order in Order:
        judge(_plan, file, order)
    judge(lambda: guest_policy(file))
    judge(lambda: _id_block(file))
    judge(lambda: describe(file))


def _plan(file: IgvmFile, order: Order) -> None:
    runs = list(itertools.islice(plan_runs(file, order=order), _MAX_RUNS))
    expect(all(run.pages > 0 for run in runs), "a run of a launch plan has pages")
    if sum(run.pages for run in runs) <= _MAX_MEASURED_PAGES:
        digest = launch_digest(file, order=order)
        expect(len(digest) == 48, "a launch digest has 48 bytes")
        judge(lambda: demand_id_blocks(check_id_blocks(file, digest), digest))


def _id_block(file: IgvmFile) -> None:
    header = id_block_header(file)
    if header is not None:
        block, auth = split_header(header, policy=guest_policy(file) or 0)
        expect(IdBlock.parse(block.pack()) == block, "an ID block survives the wire")
        expect(IdAuth.parse(auth.pack()) == auth, "ID authentication survives the wire")


def _igvm_seeds() -> list[bytes]:
    seeds = [build_image(loader=b"pass\n", archive=b"a" * 5000, settings=b"{}")]
    for version in (1, 2):
        builder = IgvmBuilder(format_version=version)
        builder.platform(PlatformType.SEV_SNP)
        builder.policy(GuestPolicy.MUST_BE_ONE | GuestPolicy.SMT)
        builder.required_memory(0x10_0000, 0x4000)
        builder.parameter_area(0, 4096, b"x" * 10)
        builder.parameter(HeaderType.MEMORY_MAP, index=0, byte_offset=8)
        builder.page(0x1000, data_type=PageDataType.SECRETS)
        builder.page(0x2000, data_type=PageDataType.CPUID_DATA)
        builder.pages(0x10_0000, bytes(range(256)) * 32)
        builder.parameter_insert(0x4000, index=0)
        seeds.append(builder.finish().pack())
    with_id = IgvmBuilder()
    with_id.platform(PlatformType.SEV_SNP)
    with_id.policy(GuestPolicy.MUST_BE_ONE)
    blank = SnpIdBlock.parse(bytes(SnpIdBlock.SIZE))
    with_id.id_block(blank.replace(compatibility_mask=1, version=1, id_key_algorithm=1))
    with_id.page(0x1000, b"page".ljust(4096, b"\0"))
    seeds.append(with_id.finish().pack())
    return [seed for seed in seeds if len(seed) <= 32768]


def _ovmf(data: bytes) -> None:
    # The table counts from the end of a whole number of pages: the input is the end of the file.
    image = data.rjust(-(-max(1, len(data)) // 4096) * 4096, b"\0")
    firmware = Ovmf.parse(image)
    expect(firmware.image == image, "the firmware keeps its bytes")
    expect(firmware.gpa + len(image) == 1 << 32, "firmware ends at 4 GiB")
    for section in firmware.sections:
        expect(section.gpa + section.size_bytes <= firmware.gpa, "a section lies below the firmware")
    if sum(section.size_bytes for section in firmware.sections) <= 1 << 20:
        judge(lambda: describe_ovmf_launch(firmware, vcpus=2, signature=0x800F12).pack())


def _ovmf_seed(sections: list[tuple[int, int, int]], *, reset: bool) -> bytes:
    def guid(text: str) -> bytes:
        return uuid.UUID(text).bytes_le

    def entry(content: bytes, name: str) -> bytes:
        return content + (len(content) + 18).to_bytes(2, "little") + guid(name)

    metadata = b"ASEV" + b"".join(word.to_bytes(4, "little") for word in (16 + 12 * len(sections), 1, len(sections)))
    metadata += b"".join(word.to_bytes(4, "little") for section in sections for word in section)
    table = entry((0x80B004).to_bytes(4, "little"), "00f771de-1a7e-4fcb-890e-68c77e2fb44e") if reset else b""
    table += entry((512).to_bytes(4, "little"), "dc886566-984a-4798-a75e-5585a7bf67cc")
    table += (len(table) + 18).to_bytes(2, "little") + guid("96b582de-1fb2-45f7-baea-a366c55a082d")
    return metadata.ljust(480 - len(table), b"\0") + table + bytes(32)


def _ovmf_seeds() -> list[bytes]:
    some = [(0x80_0000, 0x9000, 1), (0x80_D000, 0x1000, 2), (0x80_E000, 0x1000, 3), (0x80_F000, 0x1000, 4)]
    return [_ovmf_seed(some, reset=True), _ovmf_seed(some[:1], reset=False)]


def _settings(data: bytes) -> None:
    page = data if len(data) > SETTINGS_BYTES else data.ljust(SETTINGS_BYTES, b"\0")
    found = Settings.parse(page)
    expect(found.pack() == page, "accepted settings pack to themselves")


def _settings_seeds() -> list[bytes]:
    return [Settings(broker_public_key=b"k" * length).pack().rstrip(b"\0") for length in (1, 120, 512)]


def _launch_configuration(data: bytes) -> None:
    outcome = judge(lambda: expect(pack_area(parse_area(data), area_bytes=len(data)) == data, "areas round-trip"))
    text = parse_area(data) if not outcome.reason else data
    found = LaunchConfiguration.parse(text)
    expect(found.to_json() == text, "an accepted launch configuration is canonical")
    expect(len(found.host_data()) == 32, "HOST_DATA has 32 bytes")


@functools.cache
def _configuration() -> bytes:
    tpms = (TpmConfiguration("tpm0", TpmFront.SOCKET), TpmConfiguration("tpm1", TpmFront.SVSM))
    volume = "00000000-1111-2222-3333-444444444444"
    return LaunchConfiguration(volume_id=volume, name="vm", tpms=tpms).to_json()


def _launch_configuration_seeds() -> list[bytes]:
    return [_configuration(), pack_area(_configuration(), area_bytes=512)]


def _device_tree(data: bytes) -> None:
    """As the kernel takes it."""
    judge(lambda: _same_tree(data))
    found = read_devices(data)
    windows = sorted(
        (device.gpa, device.size_bytes) if isinstance(device, VirtioMmio) else (device.window_gpa, device.window_bytes)
        for device in found.devices
        if not isinstance(device, SerialPort)
    )
    end = MMIO_GPA
    for gpa, size_bytes in windows:
        expect(gpa >= end, "windows lie where registers may, and apart")
        end = gpa + size_bytes
    expect(end <= MMIO_GPA + MMIO_BYTES, "windows lie where registers may")
    again = BootDevices.parse(found.tree().pack())
    expect(set(again.devices) == set(found.devices), "what was read can be written")


def _same_tree(data: bytes) -> None:
    tree = DeviceTree.parse(data)
    expect(DeviceTree.parse(tree.pack()) == tree, "an accepted tree is the same when it is written")


def _device_tree_seeds() -> list[bytes]:
    virtio, pci, serial = VirtioMmio(0xFEB0_0000), PciHost(0xE000_0000, 16 << 20), SerialPort(0x3E8)
    some = [
        BootDevices(),
        BootDevices((virtio,), disk=virtio),
        BootDevices((pci, serial), disk=pci, key_channel=serial),
        BootDevices((virtio, VirtioMmio(0xFEB0_0200)), disk=virtio, key_channel=VirtioMmio(0xFEB0_0200)),
    ]
    return [devices.tree().pack() for devices in some]


def _envelope(data: bytes) -> None:
    try:
        found = TpmEnvelope.parse(data)
    except SvsmError as error:
        if error.code != "tpm-envelope-checksum":
            raise
        blank = data[:60] + bytes(4)
        data = data[:60] + zlib.crc32(data[64:], zlib.crc32(blank)).to_bytes(4, "little") + data[64:]
        found = TpmEnvelope.parse(data)
    expect(found.pack() == data, "an accepted envelope packs to itself")
    expect(0 < len(found.state) <= MAX_STATE_BYTES, "an envelope holds state")


def _envelope_seeds() -> list[bytes]:
    return [TpmEnvelope(b"state", 7, None).pack(), TpmEnvelope(bytes(300), (1 << 64) - 1, b"\0\x0b" + b"n" * 32).pack()]


def _cpuid(data: bytes) -> None:
    choices = Choices(data)
    page = choices.edited(_cpuid_page()) if choices.flag() else choices.rest()
    page = page[:CPUID_PAGE_SIZE].ljust(CPUID_PAGE_SIZE, b"\0")
    functions = parse_cpuid_page(page)
    expect(parse_cpuid_page(pack_cpuid_page(functions)) == functions, "CPUID functions survive the page")


@functools.cache
def _cpuid_page() -> bytes:
    return pack_cpuid_page([CpuidFunction(leaf, 0, 1, 0, 1, 2, 3, 4, 0) for leaf in range(5)])


ROWS = (
    Target("igvm", "IGVM files: parse, plan, measure, describe", _igvm, _igvm_seeds, max_bytes=32768),
    Target("ovmf", "the end of an OVMF image: GUID table and SEV metadata", _ovmf, _ovmf_seeds, max_bytes=4096),
    Target("settings", "the owner's settings page", _settings, _settings_seeds),
    Target(
        "launch-configuration",
        "the parameter area and the launch configuration in it",
        _launch_configuration,
        _launch_configuration_seeds,
    ),
    Target(
        "device-tree",
        "the loader's device tree, and the places of devices in it",
        _device_tree,
        _device_tree_seeds,
        max_bytes=4096,
    ),
    Target("tpm-envelope", "the envelope of a TPM's state in the volume", _envelope, _envelope_seeds, max_bytes=2048),
    Target("cpuid-page", "the CPUID page", _cpuid, lambda: [b"\1", b"\0\2"], max_bytes=4096),
)
