"""What the rollout manager and a reward worker say to one another: pickled values behind their length, over a socket."""

import asyncio
import pickle
import socket
from typing import Any

LENGTH = 8  # bytes, little-endian


def frame(value: Any) -> bytes:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(LENGTH, "little") + data


async def receive(reader: asyncio.StreamReader) -> Any:
    """The next value. Raises EOFError where the other side has gone."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH), "little")
        return pickle.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise EOFError("the other side has gone") from error


def receive_blocking(sock: socket.socket) -> Any:
    """The next value. Raises EOFError where the other side has gone."""
    return pickle.loads(_exactly(sock, int.from_bytes(_exactly(sock, LENGTH), "little")))


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        try:
            part = sock.recv(count - len(data))
        except ConnectionError as error:
            raise EOFError("the other side has gone") from error
        if not part:
            raise EOFError("the other side has gone")
        data += part
    return bytes(data)
