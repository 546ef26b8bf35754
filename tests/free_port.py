"""A port that a server of a test can take."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One on loopback below those that the kernel hands out by itself, so that none is taken before its server starts.

    By /proc/sys/net/ipv4/ip_local_port_range these begin at 32768.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(20000, 32000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])
