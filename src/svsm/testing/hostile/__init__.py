# SPDX-License-Identifier: MIT OR Apache-2.0
"""A device that attacks its driver: `device` is the device model with hooks, `attacks` the catalogue of named cases,
`trial` runs a driver against one of them and says what came of it.

    from svsm.testing.hostile.attacks import ATTACKS
    from svsm.testing.hostile.trial import run

    for attack in ATTACKS:
        for ring in RINGS:
            print(attack.name, ring, run(attack, ring))
"""
