# SPDX-License-Identifier: MIT OR Apache-2.0
"""NVMe for a driver that takes its controller for an attacker.

`pci` finds the controller and maps its registers, `controller` is the registers, `queue` a pair of queues, `identify`
what the disk says about itself and what is believed of it, `slots` the bounce buffers, `disk` the `BlockDevice`. The
review is `docs/review/nvme.md`.
"""
