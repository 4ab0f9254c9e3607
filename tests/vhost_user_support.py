# SPDX-License-Identifier: MIT OR Apache-2.0
"""What tests over vhost-user share: back-ends in Python over fresh disks, and a conformance subject made of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from svsm.abi.block import BlockDevice
from svsm.formats.virtio import BlkFeature, Feature
from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.testing.block_conformance import SIZE_BYTES, Subject, initial_content
from svsm.testing.vhost_user_backend import PROTOCOL_FEATURES, Backend, Script
from svsm.testing.virtio_harness import disk_file

__all__ = ["OFFERED", "Backends", "subject"]

OFFERED = ALL_FEATURES & ~int(Feature.ACCESS_PLATFORM)
"""As a daemon offers: it knows nothing of the platform."""


class Backends:
    """Makes back-ends, and takes them and their disks away again.

    Args:
        stack: When that is.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack

    def backend(
        self, script: Script | None = None, *, features: int = OFFERED, protocol_features: int = PROTOCOL_FEATURES
    ) -> Backend:
        """One with three queues, over a fresh disk with `initial_content`."""
        descriptor = disk_file(SIZE_BYTES, initial_content())
        self.stack.callback(os.close, descriptor)
        options = BlkOptions(features=features, queue_size=1024, queues=3)
        made = Backend(descriptor, options, script=script, protocol_features=protocol_features)
        self.stack.callback(made.join)
        return made


def subject(backend: Callable[[int], Backend], driver: Callable[[Backend], BlockDevice]) -> Subject:
    """For the conformance checks: opening again is a new driver at the same back-end.

    Args:
        backend: A fresh one, with these feature bits more.
        driver: One at this back-end.
    """
    backends: list[Backend] = []

    def create(features: int = 0) -> BlockDevice:
        backends.append(backend(features))
        return driver(backends[-1])

    return Subject(
        create=create, reopen=lambda: driver(backends[-1]), create_read_only=lambda: create(int(BlkFeature.RO))
    )
