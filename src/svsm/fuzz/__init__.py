# SPDX-License-Identifier: MIT OR Apache-2.0
"""Fuzzers for everything that reads bytes from somebody who is not trusted. Test equipment: nothing imports it.

`target` says what a target is, `targets` lists them all, `choices` turns bytes into decisions, `builtin` is an engine
that needs nothing, `worker` is the process in which a target runs (atheris there, where it is installed), `runner`
starts it and sums up. Start with ``svsm fuzz --list`` and docs/fuzzing.md.
"""
