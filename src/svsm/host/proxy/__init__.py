# SPDX-License-Identifier: MIT OR Apache-2.0
"""The proxy: relays a confidential VM's serial line to a key broker's HTTP. Untrusted by both.

It sees ciphertext, a token it cannot alter and sealed channel frames. What it does well is survive: a bad kernel, a
bad broker, a connection that never ends, cost that one connection and nothing else.

`kbs_client` speaks HTTP to the broker, `relay` carries one connection, `server` accepts them.
"""

from svsm.host.proxy.relay import Limits
from svsm.host.proxy.server import listen, serve

__all__ = ["Limits", "listen", "serve"]
