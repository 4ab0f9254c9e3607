# SPDX-License-Identifier: MIT OR Apache-2.0
"""The review of the key's virtio channels: `svsm.testing.review` over `svsm.fuzz.channels`."""

from __future__ import annotations

from typing import Final

from svsm.testing.channel_review_rows import ROWS
from svsm.testing.review import Review

__all__ = ["REVIEW"]

_HEAD: Final = """# Review: what a console or a socket device controls

Made from `svsm.testing.channel_review_rows` by `python -m svsm.testing.reviews channels`; a test fails when it differs.

Everything below is written by the device or its host, and read by the kernel's channels (`svsm.kernel.channels`).
"Checked in" is the function that judges it. All rows are noticed by fuzzers: the tests take the check out of the
source, row by row, and demand that the target in the last column finds that from an empty corpus. The column also has
the processor time and the number of inputs that `svsm fuzz review` needed.
The rings below are those of the disk drivers: their completions are in the [virtio page](virtio.md), as are the
registers. What the devices control and the channels never look at (sizes and names of ports, RESIZE, news of other
ports) has no row. What no check can find (bytes dropped, doubled, changed) is for the protocol above: it authenticates.
"""


REVIEW: Final = Review(
    name="channels",
    package="svsm.kernel.channels",
    rows=ROWS,
    head=_HEAD,
    attacker="device",
    rebuilt=("svsm.kernel.channels", "svsm.testing.channel_harness", "svsm.testing.virtio_harness"),
    targets={
        "": "vsock-packets",
        "virtio_line": "console-device",
        "virtio_console": "console-device",
        "vsock": "vsock-device",
    },
    fuzzers=("svsm.fuzz.targets.channels", "svsm.fuzz.channels", "svsm.fuzz.disks"),
)
