"""Free TCP ports for servers.

They are taken below the range from which the kernel takes ports of outgoing connections, so that no connection made between choosing a
port and the server's listening on it can occupy it.
"""

import random
import socket
from pathlib import Path

LOWEST = 20000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(host: str, count: int) -> list[int]:
    """`count` distinct ports that nothing listens on at `host`. Raises RuntimeError where there are not so many."""
    highest = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    if highest - LOWEST < 1000:
        highest = 65536
    candidates = random.SystemRandom().sample(range(LOWEST, highest), min(highest - LOWEST, 200 + 10 * count))
    free: list[int] = []
    for port in candidates:
        if len(free) == count:
            return free
        if is_free(host, port):
            free.append(port)
    raise RuntimeError(f"{host} has only {len(free)} free ports among {len(candidates)} tried in {LOWEST}-{highest}; {count} are needed")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
