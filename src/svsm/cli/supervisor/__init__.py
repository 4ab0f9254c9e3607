# SPDX-License-Identifier: MIT OR Apache-2.0
"""The supervisor behind `svsm boot`: makes the descriptors, starts the roles, and then only watches.

It holds no end of any secret channel once the roles run: what it reads are the roles' event lines, what it shows
is made from them. `state` keeps the state directory, `progress` the boot log, `roles` starts a role in a process of
its own, `session` is the order of a boot.
"""
