"""The host agent's side of an engine rank's door, and the commands that go to it as weight updates (see inserver.py)."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Self

from slime.sync.inserver_socket import LENGTH
from slime.sync.livemap import LiveMap

MOST = 1 << 30  # bytes of an answer
ASK_S = 30.0


class RankError(RuntimeError):
    """A rank refused, or is not there. Names it and says why."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a rank holds of one model."""

    rank: int
    models: int  # that the rank has learned
    map: LiveMap
    held: str | None
    staged: str | None
    undo: str | None
    on_device: bool  # a version is staged in the memory of a device


@dataclass(frozen=True, slots=True)
class RankReply:
    """What a command or message came to."""

    ok: bool
    error: str | None
    version: str | None
    held: str | None
    moves: tuple[int, ...]  # fingerprint of every move of the map; empty where nothing was audited
    changed: tuple[str, ...]  # storages whose elements without a source changed unasked
    seconds: dict[str, float] = field(default_factory=dict)
    entries: int = 0  # staged


def command(op: str, **fields: Any) -> str:
    """The name of the empty tensor that carries a command. Fields that are None are left out."""
    return json.dumps({"op": op} | {name: value for name, value in fields.items() if value is not None}, separators=(",", ":"))


class RankClient:
    """One rank's door. Calls raise RankError where the connection fails, TimeoutError naming the rank and the call; `stage` and `drop` also
    where the rank refuses."""

    def __init__(self, path: str, name: str, model: int = 0) -> None:
        """`name` is the rank's, for errors."""
        self.path, self.name, self.model = path, name, model
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()

    async def describe(self, timeout_s: float = ASK_S) -> Description:
        answer = await self._agreed({"op": "describe"}, timeout_s)
        return Description(
            answer["rank"],
            answer["models"],
            LiveMap.from_json(answer["map"]),
            answer["held"],
            answer["staged"],
            answer["undo"],
            answer["on_device"],
        )

    async def stage(self, path: str, version: str, parent: str, timeout_s: float) -> RankReply:
        return _reply(await self._agreed({"op": "stage", "path": path, "version": version, "parent": parent}, timeout_s))

    async def result(self, of: str, timeout_s: float = ASK_S) -> RankReply:
        """The reply to the last command with this id, or else this version, or else this op. Not ok where it failed or did not run."""
        return _reply(await self._ask({"op": "result", "of": of}, timeout_s))

    async def drop(self, version: str | None = None, timeout_s: float = ASK_S) -> None:
        """Let go what is staged and the undo log, of `version` or of any."""
        await self._agreed({"op": "drop", "version": version}, timeout_s)

    async def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _agreed(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        answer = await self._ask(message, timeout_s)
        if not answer["ok"]:
            raise RankError(f"{self.name} refused to {message['op']}: {answer['error']}")
        return answer

    async def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            async with self._turn, asyncio.timeout(timeout_s):
                return await self._exchange(message | {"model": self.model})
        except TimeoutError as error:
            await self.close()  # an answer may still come, to another question
            raise TimeoutError(f"waiting for {self.name} to {message['op']}: nothing after {timeout_s:g} s") from error
        except (OSError, EOFError, ValueError) as error:
            await self.close()
            raise RankError(
                f"{self.name} at {self.path} was lost while it should {message['op']}: {error or type(error).__name__}"
            ) from error

    async def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(self.path)
        reader, writer = self._streams
        data = json.dumps(message).encode()
        writer.write(LENGTH.pack(len(data)) + data)
        await writer.drain()
        [length] = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > MOST:
            raise ValueError(f"an answer of {length} bytes")
        return json.loads(await reader.readexactly(length))


def _reply(answer: dict[str, Any]) -> RankReply:
    return RankReply(
        answer["ok"],
        answer["error"],
        answer.get("version"),
        answer.get("held"),
        tuple(int(value, 16) for value in answer.get("moves", ())),
        tuple(answer.get("changed", ())),
        answer.get("seconds", {}),
        answer.get("entries", 0),
    )
