# SPDX-License-Identifier: MIT OR Apache-2.0
"""Status codes of the SEV-SNP firmware (AMD 56860 rev 1.58 table 5)."""

from __future__ import annotations

import enum

__all__ = ["FirmwareStatus"]


class FirmwareStatus(enum.IntEnum):
    """What a PSP command returns. Only the codes that SNP commands use."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    INVALID_KEY = 0x27
