"""The door of an engine rank: one daemon thread, one unix socket, messages of a u32 length (little endian) and JSON.

A connection that sends nonsense is closed; the others do not notice. Messages are answered one after the other.
"""

import contextlib
import json
import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

LENGTH = struct.Struct("<I")
MOST = 1 << 20  # bytes of a message to a rank
SEND_S = 30.0  # for the other side to take an answer
BACKLOG = 16

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class Door(threading.Thread):
    """Answers messages at `path` by `handler`, which must not raise."""

    def __init__(self, path: str, handler: Handler) -> None:
        """Listens from here on; a socket that was left at `path` is replaced. Raises OSError where that cannot be."""
        super().__init__(name="slime-door", daemon=True)
        self.path = path
        self._handler = handler
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = f"{path}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        self._listener.bind(fresh)
        os.chmod(fresh, 0o600)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        os.replace(fresh, path)
        self._inode = os.stat(path).st_ino
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    @property
    def open(self) -> bool:
        """Whether the thread answers and its socket is the one at its path."""
        try:
            return self.is_alive() and os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Answer no more. The socket at the path may be another's by now and stays."""
        self._wake.send(b"x")

    def run(self) -> None:
        pending: dict[socket.socket, bytearray] = {}
        while True:
            for key, _ in self._selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is self._woken:
                    for each in (*pending, self._listener, self._woken, self._wake):
                        each.close()
                    return
                if ready is self._listener:
                    self._accept(pending)
                elif not self._serve(ready, pending[ready]):
                    self._selector.unregister(ready)
                    ready.close()
                    del pending[ready]

    def _accept(self, pending: dict[socket.socket, bytearray]) -> None:
        with contextlib.suppress(OSError):  # it has gone again
            connection, _ = self._listener.accept()
            connection.settimeout(SEND_S)
            pending[connection] = bytearray()
            self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: socket.socket, received: bytearray) -> bool:
        """Take what has come and answer what is whole. False: the connection is to be closed."""
        try:
            data = connection.recv(1 << 16)
            received += data
            while data and len(received) >= LENGTH.size:
                [length] = LENGTH.unpack_from(received)
                if length > MOST:
                    return False
                if len(received) < LENGTH.size + length:
                    break
                message = json.loads(received[LENGTH.size : LENGTH.size + length])
                del received[: LENGTH.size + length]
                if not isinstance(message, dict):
                    return False
                answer = json.dumps(self._handler(message), separators=(",", ":")).encode()
                connection.sendall(LENGTH.pack(len(answer)) + answer)
        except (OSError, ValueError, RecursionError):
            return False
        return bool(data)
