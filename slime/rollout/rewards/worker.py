"""A reward worker: a process that the rollout manager may kill. `python -m slime.rollout.rewards.worker SOCKET_FD PARENT_PID`.

It is told the RewardConfig and the knob that names its function, and answers ("ready", is_async) or ("failed", text). Then it judges:
(number, samples) in, (number, verdicts) out. A synchronous function gets one judgement at a time, an asynchronous one as many as come.
The process ends with its parent.
"""

import asyncio
import ctypes
import os
import signal
import socket
import sys

from slime.config import RewardConfig
from slime.rollout.rewards.judgement import Judgement, load_judgement
from slime.rollout.rewards.wire import frame, receive, receive_blocking
from slime.types import Sample

PR_SET_PDEATHSIG = 1


def main() -> int:
    die_with_parent(int(sys.argv[2]))
    sock = socket.socket(fileno=int(sys.argv[1]))
    cfg: RewardConfig
    cfg, knob = receive_blocking(sock)
    try:
        judgement = load_judgement(cfg, knob)
    except ValueError as error:
        sock.sendall(frame(("failed", str(error))))
        return 1
    sock.sendall(frame(("ready", judgement.is_async)))
    try:
        if judgement.is_async:
            asyncio.run(judge_many(sock, judgement, cfg.timeout_s))
        else:
            judge_one_by_one(sock, judgement)
    except EOFError:
        return 0  # the manager has closed
    return 0


def judge_one_by_one(sock: socket.socket, judgement: Judgement) -> None:
    while True:
        number, samples = receive_blocking(sock)
        sock.sendall(frame((number, judgement.run(samples))))


async def judge_many(sock: socket.socket, judgement: Judgement, timeout_s: float) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    under_way: set[asyncio.Task[None]] = set()

    async def judge(number: int, samples: list[Sample]) -> None:
        writer.write(frame((number, await judgement.run_async(samples, timeout_s))))
        await writer.drain()

    while True:
        task = asyncio.create_task(judge(*await receive(reader)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, also while a reward function hangs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
