# SPDX-License-Identifier: MIT OR Apache-2.0
"""svsm: a Secure VM Service Module and the host-side tools around it.

The packages are trust domains, not layers of convenience: see docs/DESIGN.md for who may import whom and why.
"""

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"
