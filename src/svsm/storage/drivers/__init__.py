# SPDX-License-Identifier: MIT OR Apache-2.0
"""Drivers: one for each way in which a host can offer a disk. Nothing above knows which it is."""
