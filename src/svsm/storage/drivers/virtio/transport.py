# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a virtio transport offers a driver: features, queues, configuration, kicks and wake-ups.

A driver goes through it in one order: `reset`, `features`, `accept` (`negotiate` is these three), then for every
queue `queue_size` and `activate`, then `start`. From there on `notify`, `wait`, `take_events`, `check`. Every number
that comes out of the device is hostile: transports judge those that are theirs (sizes, status, generations), drivers
the rest.

Time is an argument: a `deadline` is a value of the clock that the driver and its transport share
(`time.monotonic`, or a test's). No call outlives its deadline, whatever the device does.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from svsm.formats.errors import ProtocolError
from svsm.formats.virtio import DeviceType, Feature, QueueAddresses

__all__ = ["PROTECTED", "Events", "Transport", "negotiate"]

PROTECTED = int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
"""What a device of a confidential VM must offer: the modern layout, and that it reaches only what is shared."""


@dataclasses.dataclass(frozen=True, slots=True)
class Events:
    """What has happened since the last look. Hints: either may be wrong."""

    used: bool
    configuration: bool


class Transport(Protocol):
    """One device behind one transport. Methods raise `ProtocolError` (``virtio-…``) or `BackendError`."""

    @property
    def device_type(self) -> int:
        """What the device says that it is (`DeviceType`), read once."""

    @property
    def mandatory_features(self) -> int:
        """Features without which the driver must refuse."""

    def reset(self, *, deadline: float) -> None:
        """Stop the device, and wait until it says that it has stopped.

        Raises:
            ProtocolError: ``virtio-reset-stuck``: memory that it was lent must not be used again.
        """

    def features(self) -> int:
        """What the device offers, each word read once."""

    def accept(self, features: int) -> None:
        """Choose features; the device must agree.

        Raises:
            ProtocolError: ``virtio-features-refused``.
        """

    def queue_size(self, index: int) -> int:
        """Most entries that queue `index` can have, 1 to 32768.

        Raises:
            ProtocolError: ``virtio-queue-missing``, ``virtio-queue-size``, ``virtio-queue-busy``.
        """

    def activate(self, index: int, size: int, addresses: QueueAddresses) -> None:
        """Give the device a queue.

        Raises:
            ProtocolError: ``virtio-queue-refused``.
        """

    def start(self) -> None:
        """DRIVER_OK."""

    def notify(self, index: int) -> None:
        """Tell the device that queue `index` has something new."""

    def wait(self, deadline: float) -> None:
        """Until something may have happened, or `deadline`. May return early for no reason."""

    def take_events(self) -> Events:
        """What has happened, and forget it."""

    def check(self) -> None:
        """Demand that the device is still well.

        Raises:
            ProtocolError: ``virtio-needs-reset``.
        """

    def configuration(self, offset: int, length: int) -> bytes:
        """Bytes of the device's configuration space, all of one generation.

        Raises:
            ProtocolError: ``virtio-config-unstable``.
        """

    def close(self) -> None:
        """Let go. Does not raise, does not reset."""


def negotiate(transport: Transport, device_type: DeviceType, wanted: int, *, deadline: float) -> int:
    """Reset a device and agree with it on features (VIRTIO 1.2 §3.1.1, steps 1 to 6).

    Args:
        transport: To the device.
        device_type: What it has to be.
        wanted: Feature bits that are used where they are offered, beside those of `PROTECTED`.
        deadline: For the device to take its reset.

    Returns:
        The features agreed upon.

    Raises:
        ProtocolError: ``virtio-device-type``, ``virtio-features-missing``, and those of the transport.
        BackendError: The transport failed.
    """
    if transport.device_type != device_type:
        raise ProtocolError(
            "the device is of another kind",
            code="virtio-device-type",
            expected=device_type,
            got=transport.device_type,
        )
    transport.reset(deadline=deadline)
    offered = transport.features()
    missing = transport.mandatory_features & ~offered
    if missing:
        raise ProtocolError(
            "the device does not offer what a confidential VM needs",
            code="virtio-features-missing",
            hint="QEMU: iommu_platform=on, and the modern interface",
            expected=transport.mandatory_features,
            got=offered,
        )
    features = offered & (transport.mandatory_features | PROTECTED | wanted)
    transport.accept(features)
    return features
