"""Ports of this machine for processes that a test starts."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 20_000


def free_port() -> int:
    """Return a port that nothing listens on, and that no connection is given before a process listens on it.

    The system takes the ports of connections from a range of its own, also those of other tests.
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    above = int(given.read_text().split()[0]) if given.exists() else 32_768
    while True:
        port = random.SystemRandom().randrange(min(LOWEST, above - 1_000), above)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
