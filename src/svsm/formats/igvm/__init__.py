# SPDX-License-Identifier: MIT OR Apache-2.0
"""IGVM, the file format that describes a confidential VM's launch: reader, writer, launch plan."""

from __future__ import annotations

from svsm.formats.igvm.file import Header, IgvmFile
from svsm.formats.igvm.launch import LaunchStep, Order, StepKind, guest_policy, id_block_header, plan, plan_runs
from svsm.formats.igvm.layout import HeaderType, PageDataType, PageFlag, PlatformType
from svsm.formats.igvm.writer import IgvmBuilder

__all__ = [
    "Header",
    "HeaderType",
    "IgvmBuilder",
    "IgvmFile",
    "LaunchStep",
    "Order",
    "PageDataType",
    "PageFlag",
    "PlatformType",
    "StepKind",
    "guest_policy",
    "id_block_header",
    "plan",
    "plan_runs",
]
