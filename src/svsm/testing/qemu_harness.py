# SPDX-License-Identifier: MIT OR Apache-2.0
"""The drivers on QEMU's device models: a machine from `svsm.host.qemu`, and what a kernel would make of its devices.

The DMA memory is a part of the guest's memory, which is mapped here; the device addresses it by guest-physical
address. Close the driver before the machine.
"""

from __future__ import annotations

from typing import Final

from svsm.host.qemu import PCI_WINDOW, Machine
from svsm.kernel.channels.uart16550 import UartChannel
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.disk import NvmeDisk, NvmePolicy
from svsm.storage.drivers.nvme.disk import memory_bytes as nvme_memory_bytes
from svsm.storage.drivers.nvme.pci import ConfigurationSpace, enable_memory_bar, find_nvme
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk
from svsm.storage.drivers.virtio.blk import memory_bytes as virtio_memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport

__all__ = ["COM_BASES", "dma_memory", "nvme_disk", "serial_channel", "virtio_disk"]

COM_BASES: Final = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""As every PC has them; the machine's own table must agree."""
_DMA_GPA: Final = 16 << 20


def dma_memory(machine: Machine, length: int) -> DmaMemory:
    """Guest memory for one device, from guest-physical 16 MiB on."""
    return DmaMemory(machine.memory[_DMA_GPA : _DMA_GPA + length], address=_DMA_GPA)


def virtio_disk(machine: Machine, policy: BlkPolicy | None = None) -> VirtioBlk:
    """The driver over microvm's virtio-mmio disk.

    Raises:
        SvsmError: The driver refuses it, or QEMU is gone.
    """
    policy = policy or BlkPolicy()
    memory = dma_memory(machine, virtio_memory_bytes(policy))
    return VirtioBlk(MmioTransport(machine.virtio_registers()), memory, policy=policy)


def nvme_disk(machine: Machine, policy: NvmePolicy | None = None) -> NvmeDisk:
    """The driver over q35's NVMe disk: found on PCI, mapped, switched on.

    Raises:
        SvsmError: The driver refuses it, or QEMU is gone.
    """
    policy = policy or NvmePolicy()
    space = ConfigurationSpace(machine.ports())
    where = find_nvme(space)
    address, size = enable_memory_bar(space, where, window_gpa=PCI_WINDOW[0], window_bytes=PCI_WINDOW[1])
    memory = dma_memory(machine, nvme_memory_bytes(policy))
    return NvmeDisk(machine.nvme_registers(address, size), memory, policy=policy)


def serial_channel(machine: Machine, index: int = 2) -> UartChannel:
    """The kernel's 16550 driver on COM1 to COM4; COM3 by default.

    Raises:
        SvsmError: There is no such port, or QEMU is gone.
    """
    base, interrupt = COM_BASES[index]
    return UartChannel(machine.ports(), base=base, interrupt=interrupt)
