# SPDX-License-Identifier: MIT OR Apache-2.0
"""Device models of the host: the untrusted side of what the VM drives."""
