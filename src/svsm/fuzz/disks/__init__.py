# SPDX-License-Identifier: MIT OR Apache-2.0
"""Lying disks for fuzzers: small, fast devices in memory that lie on request, and what must come of each lie.

A device here is honest but for the lies that a program (the fuzzer's input) tells it to tell. Because the device knows
its lies, it also knows what the driver owes: after a lie that breaks the protocol the disk is dead, with the code that
names the lie; after one that only fails a request, that request fails; after a legal oddity everything works with the
right data. `Verdict` is that debt, `Rules` follow what registers and messages said. So a check that is taken out of a
driver shows, even where another check would have caught what it lets through.
"""
