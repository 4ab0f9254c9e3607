# SPDX-License-Identifier: MIT OR Apache-2.0
"""Lying devices under the key's channels: a virtio console and a virtio socket device.

As in `svsm.fuzz.disks`, the device knows what it has said: `ConsoleRules` and `VsockRules` say what the driver owes to
that. Which of its news a call has seen is the driver's matter; so after the last call the device falls silent, and
whoever reads on must come to the end that the rules know: the error that names the lie, the end of the stream, or the
deadline, with all the bytes that were sent and no others.
"""
