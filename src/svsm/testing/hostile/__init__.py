# SPDX-License-Identifier: MIT OR Apache-2.0
"""A device that attacks its driver: a device model with hooks, a catalogue of named cases, trials that judge.

    from svsm.testing.hostile.matrix import TRANSPORTS, cells

    for transport in TRANSPORTS:
        for cell in cells(transport):
            print(cell.number, cell.name, cell.ring, cell.run() == cell.expected)

``python -m svsm.testing.hostile`` does that, and serves an attack to somebody else's vhost-user front-end;
docs/hostile.md is its page.
"""
