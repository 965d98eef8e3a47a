"""A small process between the host agent and one server: the server ends when the agent does, however the agent ends.

    agent --pipe--> guard --starts--> server (a process group of its own)

The agent holds the other end of the guard's standard input. Its first line is what to start, as JSON; the end of the pipe, which the kernel
brings about when the agent dies, means that the server's whole group is killed. If the guard itself is killed, the kernel kills the server
(PR_SET_PDEATHSIG), whose own children watch for that.

The server's output passes through the guard into the log, so that keys, which SGLang prints among its arguments, are not written there.
Run by path with `python -S`; the standard library only.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def main() -> int:
    spec = json.loads(sys.stdin.buffer.readline())
    server = subprocess.Popen(
        spec["command"],
        env=spec["environment"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    signal.signal(signal.SIGTERM, lambda *_: kill_group(server.pid))
    threading.Thread(target=wait_for_agent, args=(server.pid,), daemon=True).start()
    copy_log(server, spec["log"], [secret.encode() for secret in spec["secrets"]])
    code = server.wait()
    kill_group(server.pid)  # what the server's main process left behind
    return code if code >= 0 else 128 - code


def die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for_agent(group: int) -> None:
    """Block until the agent closes the pipe or dies."""
    while os.read(0, 1):
        pass
    kill_group(group)


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def copy_log(server: subprocess.Popen, path: str, secrets: list[bytes]) -> None:
    """Copy the server's lines into the log without the secrets, until its last process closes them."""
    assert server.stdout is not None
    with open(path, "ab", buffering=0) as log:
        for line in server.stdout:
            for secret in secrets:
                line = line.replace(secret, b"***")
            log.write(line)


if __name__ == "__main__":
    sys.exit(main())
