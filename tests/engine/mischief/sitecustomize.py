"""Real SGLang servers that misbehave on demand: in every process of an engine whose rollout.engine_python `servers.mischievous` made.

While the file $SLIME_TEST_MISCHIEF.<port> is there, the HTTP application of the server at that port does to its answers of /generate what
the file says: `slow` keeps them back, `cut` sends half of them, `odd` sends JSON that is no answer.
"""

import asyncio
import importlib.machinery
import importlib.util
import os
import pathlib
import sys

HERE = str(pathlib.Path(__file__).parent)


def load_the_next_one() -> None:
    """Python imports one sitecustomize alone: the engine's own is behind this one."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != HERE])
    if spec is not None and spec.loader is not None:
        sys.modules["the_next_sitecustomize"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


class Patch:
    """Wraps FastAPI's applications once they are imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "fastapi.applications":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            call = module.FastAPI.__call__

            async def wrapped(self, scope, receive, send):
                what = mischief(scope)
                if what == "slow":
                    await asyncio.sleep(600)
                await call(self, scope, receive, spoiling(send, what) if what else send)

            module.FastAPI.__call__ = wrapped

        spec.loader.exec_module = exec_module
        return spec


def mischief(scope) -> str:
    if scope["type"] != "http" or scope["path"] != "/generate":
        return ""
    try:
        return pathlib.Path(f"{os.environ['SLIME_TEST_MISCHIEF']}.{scope['server'][1]}").read_text()
    except OSError:
        return ""


def spoiling(send, what):
    async def spoilt(message):
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message["headers"] if name != b"content-length"]
            message = message | {"headers": kept}
        elif message["type"] == "http.response.body" and message.get("body"):
            body = message["body"]
            message = message | {"body": body[: len(body) // 2] if what == "cut" else b'{"output_ids": [7], "meta_info": {}}'}
        await send(message)

    return spoilt


load_the_next_one()
sys.meta_path.insert(0, Patch())
