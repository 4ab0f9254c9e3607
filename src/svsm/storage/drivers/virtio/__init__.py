# SPDX-License-Identifier: MIT OR Apache-2.0
"""Virtio for a driver that takes its device for an attacker.

`queue` is what split and packed rings have in common, `split` and `packed` are the rings, `transport` is what a
transport offers, `mmio` the registers, `blk_config` what a disk says about itself and what is believed of it, `blk`
the `BlockDevice`. The review is `docs/review/virtio.md`.
"""
