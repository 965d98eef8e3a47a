"""POST /generate, and what becomes of a request that is not answered as it should be. Of EngineClient and TeacherClient."""

from typing import Any

import aiohttp
import orjson

from slime.engine import streaming
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, EngineLost, Garbage

KEEPALIVE_S = 3.0  # below the 5 s after which SGLang closes an idle connection, so that a request never meets a closing one


class Refused(EngineLost):
    """An engine did not accept a connection: nothing was asked of it."""


def lasting_session() -> aiohttp.ClientSession:
    """Connections for any number of requests at once, without a deadline of their own. Make it where an event loop runs."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def post_generate(session: aiohttp.ClientSession, endpoint: Endpoint, body: dict[str, Any], streams: bool = False) -> dict[str, Any]:
    """The answer to a request of /generate; of one that `streams`, its whole.

    Raises EngineError for a request that the engine refuses, Refused where it accepts no connection, EngineLost where the connection
    breaks or the engine is not able to answer, Garbage for an answer that is none.
    """
    try:
        async with session.post(endpoint.url + "/generate", json=body, headers=endpoint.headers) as response:
            if response.status != 200:
                kind = EngineError if response.status < 500 else EngineLost if response.status == 503 else Garbage
                raise kind(f"{endpoint.name} refused a request: {response.status} {(await response.text())[:500]}")
            if streams:
                return await streaming.whole(response.content, endpoint.name)
            data = await response.read()
    except aiohttp.ClientConnectorError as error:
        raise Refused(f"{endpoint.name} does not accept connections at {endpoint.url} ({error.os_error})") from error
    except aiohttp.ClientError as error:
        raise EngineLost(f"{endpoint.name} at {endpoint.url} was lost while it generated: {error or type(error).__name__}") from error
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Garbage(f"{endpoint.name} answered {data[:100]!r}, which is no JSON") from error
